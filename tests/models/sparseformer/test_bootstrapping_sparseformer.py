from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from polyscale import FlexiViTConfig, FlexiViTModel
from polyscale.models.sparseformer.callbacks_sparseformer import LossScaleCallback
from polyscale.training.bootstrapping import BootstrapTrainer, final_token, load_teacher, make_student
from polyscale.training.transforms import collate_images


TINY = {"feature_width": 8, "num_sampling_points": 4, "generator_width": 16, "num_latent_tokens": 5}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16}


def make_teacher() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, intermediate_size=64, patch_size=8, initializer_range=0.2)
    return ViTModel(config, add_pooling_layer=False).eval()


def make_pooling_teacher(**options) -> FlexiViTModel:
    torch.manual_seed(0)
    config = FlexiViTConfig(
        **SHAPE, base_patch_size=8, use_cls_token=False, pooling="mean", initializer_range=0.2, **options
    )
    return FlexiViTModel(config).eval()


def make_clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SHAPE, intermediate_size=64, patch_size=8, initializer_factor=3.0)


class Images(Dataset):
    """Sixteen images of one colour each."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        colour = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": colour.expand(3, 16, 16).contiguous()}


def make_trainer(folder, student: PreTrainedModel, teacher: PreTrainedModel, **options) -> BootstrapTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=25,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return BootstrapTrainer(
        model=student,
        args=arguments,
        train_dataset=Images(),
        teacher=teacher,
        data_collator=collate_images,
        **options,
    )


def some_images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [make_teacher, make_pooling_teacher])
def test_a_student_has_the_last_blocks_and_freezes_the_last_third(make):
    teacher = make()
    student, report = make_student(teacher, **TINY)
    assert student.config.operations[2:] == [["attn", "mlp"]] * 2
    for layer, block in ((2, 1), (3, 2)):
        weight = student.layers[layer].mlp.fc1.weight
        assert torch.equal(weight, teacher.layers[block].mlp.fc1.weight)
        assert weight.requires_grad == (layer == 2)
    assert torch.equal(student.layernorm.weight, teacher.layernorm.weight)
    assert student.layers[0].mixing.o_proj.weight.requires_grad
    assert "layers.0.mixing.o_proj.weight" in report.new


def test_a_layer_computes_what_its_block_does():
    teacher = make_pooling_teacher()
    student, _ = make_student(teacher, **TINY)
    tokens = torch.randn(2, 7, 32)
    updated, _ = student.eval().layers[3](tokens, torch.zeros(2, 7, 4), torch.zeros(2, 4, 4, 8))
    torch.testing.assert_close(updated, teacher.layers[2](tokens))


def test_a_student_pools_as_its_teacher():
    student, _ = make_student(make_teacher(), **TINY)
    assert (student.config.pooling, student.config.cls_token_layer) == ("cls", 2)
    assert not student.layernorm.weight.requires_grad
    student, _ = make_student(make_pooling_teacher(), **TINY)
    assert (student.config.pooling, student.config.cls_token_layer) == ("mean", None)
    # the teacher takes the mean of normalised tokens, the student normalises the mean
    assert student.layernorm.weight.requires_grad
    assert student(some_images()).last_hidden_state.shape == (3, 5, 32)


def test_shapes_that_do_not_fit_are_refused():
    teacher = make_teacher()
    with pytest.raises(ValueError, match="between 1 and the teacher's 3, got 4"):
        make_student(teacher, num_blocks=4, **TINY)
    with pytest.raises(ValueError, match="`frozen_share` must be between 0 and 1"):
        make_student(teacher, frozen_share=1.5, **TINY)
    with pytest.raises(ValueError, match="fields of `SparseFormerConfig`, got 'train_patch_sizes'"):
        make_student(teacher, train_patch_sizes=[4, 8], **TINY)
    gated = Dinov2Model(Dinov2Config(**SHAPE, patch_size=8, use_swiglu_ffn=True))
    with pytest.raises(ValueError, match="gated MLPs"):
        make_student(gated, **TINY)


def test_the_final_token_is_what_a_head_reads():
    images = some_images()
    vit = ViTModel(make_teacher().config).eval()  # with a pooler, which a checkpoint need not have
    assert torch.equal(final_token(vit, images), vit(images).last_hidden_state[:, 0])
    clip = CLIPVisionModel(make_clip_config()).eval()
    cls_token = clip(images).last_hidden_state[:, 0]
    torch.testing.assert_close(final_token(clip, images), clip.post_layernorm(cls_token))
    flexivit = make_pooling_teacher()
    torch.testing.assert_close(final_token(flexivit, images), flexivit(images).last_hidden_state.mean(dim=1))
    student, _ = make_student(flexivit, **TINY)
    assert torch.equal(final_token(student, images), student(images).pooler_output)


def test_the_vision_tower_of_a_clip_is_a_teacher(tmp_path):
    config = CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
        vision_config=make_clip_config().to_dict(),
        projection_dim=8,
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert torch.equal(teacher.post_layernorm.weight, clip.vision_model.post_layernorm.weight)
    student, _ = make_student(teacher, **TINY)
    assert student.config.hidden_act == "quick_gelu"
    assert torch.equal(student.layernorm.weight, teacher.post_layernorm.weight)
    weight = student.layers[3].attention.o_proj.weight
    assert torch.equal(weight, clip.vision_model.encoder.layers[2].self_attn.out_proj.weight)


@pytest.mark.parametrize("make", [make_teacher, make_pooling_teacher])
def test_the_loss_falls_and_the_last_third_stays(tmp_path, make):
    torch.manual_seed(0)
    teacher = make()
    student, _ = make_student(teacher, restrict_grad_norm=True, **TINY)
    trainer = make_trainer(tmp_path, student, teacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert torch.equal(student.layers[3].mlp.fc1.weight, teacher.layers[2].mlp.fc1.weight)
    assert torch.equal(student.layers[3].layernorm_before.bias, teacher.layers[2].layernorm_before.bias)
    assert not torch.equal(student.layers[2].mlp.fc1.weight, teacher.layers[1].mlp.fc1.weight)


def test_the_loss_is_the_share_of_variance_that_is_missed(tmp_path):
    teacher = make_pooling_teacher()
    student, _ = make_student(teacher, **TINY)
    trainer = make_trainer(tmp_path, student, teacher)
    images = collate_images([Images()[index] for index in range(16)])["pixel_values"]
    with torch.no_grad():
        tokens, mine = teacher(images).pooler_output, student(images).pooler_output
        variance = (tokens - tokens.mean(dim=0)).square().mean()
        for rows in (slice(None), slice(3, 4)):  # a batch of one has no variance of its own
            expected = (mine[rows] - tokens[rows]).square().mean() / variance
            loss = trainer.compute_loss(student, {"pixel_values": images[rows]})
            torch.testing.assert_close(loss, expected)


def test_the_teacher_sees_images_of_its_own_kind(tmp_path):
    teacher = make_pooling_teacher()
    student, _ = make_student(teacher, **TINY)
    stats = (([0.5] * 3, [0.5] * 3), ([0.4] * 3, [0.2] * 3))
    trainer = make_trainer(tmp_path, student, teacher, image_stats=stats, teacher_size=(24, 32))
    images = torch.nn.functional.interpolate(
        (some_images() * 0.5 + 0.5 - 0.4) / 0.2, (24, 32), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(trainer.target(some_images()), teacher(images).pooler_output)


def test_the_callback_hands_on_the_scale_of_the_scaler():
    student, _ = make_student(make_teacher(), restrict_grad_norm=True, **TINY)
    optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 512.0))
    callback = LossScaleCallback()
    callback.on_step_begin(None, None, None, model=student, optimizer=optimizer)
    assert student.loss_scale.item() == 512.0
    optimizer.scaler = None
    callback.on_step_begin(None, None, None, model=student, optimizer=optimizer)
    assert student.loss_scale.item() == 1.0


def test_the_callback_does_not_read_a_scale_that_nobody_needs():
    def get_scale():
        raise AssertionError("the device was waited for")

    student, _ = make_student(make_teacher(), **TINY)
    optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=get_scale))
    LossScaleCallback().on_step_begin(None, None, None, model=student, optimizer=optimizer)
    assert student.loss_scale is None
