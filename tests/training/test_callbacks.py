from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from polyscale import FlexiViTConfig, FlexiViTForImageClassification
from polyscale.training import PatchSizeCallback
from polyscale.training.callbacks import DatasetEpochCallback
from polyscale.training.ema import EMACallback
from polyscale.training.transforms import AugmentedImages


def tiny_model(**options) -> FlexiViTForImageClassification:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    config = FlexiViTConfig(**shape, base_patch_size=4, **{"train_patch_sizes": [2, 4, [4, 8]], **options})
    return FlexiViTForImageClassification(config)


def sizes_of_a_run(model, steps, seed=0, callback=None):
    callback = callback or PatchSizeCallback()
    seen = []
    for step in steps:
        callback.on_step_begin(SimpleNamespace(seed=seed), SimpleNamespace(global_step=step), None, model=model)
        seen.append(model.flexivit.embeddings.resolve_patch_size(None))
    return seen


def test_every_forward_of_a_step_has_the_size_that_was_drawn():
    model = tiny_model().train()
    (size,) = sizes_of_a_run(model, [0])
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = model.config.num_tokens_for(16, size) + 1
    for _ in range(5):
        assert model.flexivit(pixel_values).last_hidden_state.shape[1] == expected


def test_the_draw_depends_on_seed_and_step_alone():
    run = sizes_of_a_run(tiny_model().train(), range(60))
    assert len(set(run)) == 3
    torch.manual_seed(123)  # a resumed run: other generators are elsewhere
    assert sizes_of_a_run(tiny_model().train(), range(30, 60)) == run[30:]
    assert sizes_of_a_run(tiny_model().train(), range(60), seed=1) != run
    assert sizes_of_a_run(tiny_model().train(), range(60), seed=1, callback=PatchSizeCallback(seed=0)) == run


def test_the_draw_follows_the_probabilities():
    run = sizes_of_a_run(tiny_model(train_patch_size_probs=[0.7, 0.0, 0.3]).train(), range(3000))
    assert abs(run.count((2, 2)) / 3000 - 0.7) < 0.03
    assert run.count((4, 4)) == 0


def test_evaluation_and_explicit_sizes_are_left_alone():
    model = tiny_model().train()
    sizes_of_a_run(model, [0])
    assert model.flexivit.embeddings.resolve_patch_size(8) == (8, 8)
    model.eval()
    assert model.flexivit.embeddings.resolve_patch_size(None) == (4, 4)


def test_the_end_of_a_step_gives_the_drawing_back():
    model = tiny_model().train()
    sizes_of_a_run(model, [0])
    PatchSizeCallback().on_step_end(None, None, None, model=model)
    assert model.flexivit.embeddings.step_patch_size is None
    assert {model.flexivit.embeddings.resolve_patch_size(None) for _ in range(60)} == {(2, 2), (4, 4), (4, 8)}


def test_a_step_that_ends_with_an_exception_leaves_no_size_behind():
    model = tiny_model().train()
    (size,) = sizes_of_a_run(model, [0])
    model.train()  # what a Trainer calls before each forward
    assert model.flexivit.embeddings.resolve_patch_size(None) == size
    model.eval().train()
    assert model.flexivit.embeddings.step_patch_size is None


def test_a_resumed_trainer_sets_the_mode_after_the_step_has_begun():
    model = tiny_model().eval()
    callback = PatchSizeCallback()
    callback.on_step_begin(SimpleNamespace(seed=0), SimpleNamespace(global_step=0), None, model=model)
    size = model.flexivit.embeddings.step_patch_size
    assert size is not None
    model.train()
    assert model.flexivit.embeddings.step_patch_size == size


def test_a_model_without_train_sizes_is_left_alone():
    model = tiny_model(train_patch_sizes=None).train()
    assert sizes_of_a_run(model, range(3)) == [(4, 4)] * 3


def test_a_data_set_knows_the_epoch_also_in_the_middle_of_one():
    dataset = AugmentedImages(None, None)
    for epoch, expected in ((0, 0), (1.0, 1), (2.75, 2)):
        DatasetEpochCallback(dataset).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert dataset.epoch == expected


def test_ema_is_the_recurrence(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    ema = EMACallback(decay=0.9)
    args = SimpleNamespace(output_dir=str(tmp_path))
    weights = np.random.default_rng(0).normal(size=(5, 1, 2)).astype(np.float32)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights[0]))
    ema.on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)
    expected = weights[0]
    for step in range(1, 5):
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(weights[step]))
        ema.on_step_end(args, SimpleNamespace(global_step=step), None, model=model)
        expected = 0.9 * expected + 0.1 * weights[step]

    (tmp_path / "checkpoint-4").mkdir()
    ema.on_save(args, SimpleNamespace(global_step=4, is_world_process_zero=True), None)
    assert load_file(tmp_path / "checkpoint-4" / "ema.safetensors")["weight"].numpy() == pytest.approx(expected)

    resumed = EMACallback(decay=0.9, checkpoint=tmp_path / "checkpoint-4")
    resumed.on_train_begin(args, SimpleNamespace(global_step=4), None, model=model)
    resumed.copy_to(model)
    assert model.weight.detach().numpy() == pytest.approx(expected)
