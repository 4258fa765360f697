"""`forward` refuses words of other families and misspelt ones, and inputs and labels of a wrong kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from polyscale import FlexiViTBackbone, QuadtreeViTBackbone
from polyscale.layers.token_budget import registered_budget_words

from ..tiny_models import FAMILIES, pixels_shape, tiny_classifier


OWN_WORDS = {
    "flexivit": {"patch_size"},
    "quadtree_vit": {"num_tokens", "split_threshold"},
    "sparseformer": set(),
    "sparseformer_video": set(),
    "s2_vision": {"scales", "img_sizes", "num_tiles"},
}
PASSING = (
    "use_cache",
    "return_dict",
    "num_items_in_batch",
    "interpolate_pos_encoding",
    "whatever",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    torch.manual_seed(0)
    return tiny_classifier(family, attn_implementation="eager")


@pytest.fixture
def pixels(family):
    return torch.randn(pixels_shape(family))


def test_every_model_says_what_an_image_costs(family, model, pixels):
    size = tuple(pixels.shape[-2:])
    for called in (model, model.base_model):
        assert called.num_tokens_for(size) == model.config.num_tokens_for(size) > 0


def test_every_family_registers_its_budget_words():
    assert registered_budget_words() >= {"patch_size", "num_tokens", "split_threshold", "scales", "img_sizes"}
    assert "image_size" not in registered_budget_words()


def test_budget_words_of_other_families_are_refused(family, model, pixels):
    own = OWN_WORDS[family]
    for word in registered_budget_words() - own:
        for called in (model, model.base_model):
            with pytest.raises(ValueError, match=f"`{word}` is no argument of {type(called).__name__}") as caught:
                called(pixels, **{word: 4})
            assert all(f"`{name}`" in str(caught.value) for name in own)


def test_pooled_only_belongs_to_models_without_a_head(model, pixels):
    with pytest.raises(ValueError, match=f"`pooled_only` is no argument of {type(model).__name__}"):
        model(pixels, pooled_only=True)


def test_a_backbone_has_no_pooled_only():
    for family, backbone_class in (("flexivit", FlexiViTBackbone), ("quadtree_vit", QuadtreeViTBackbone)):
        backbone = backbone_class(tiny_classifier(family).config)
        with pytest.raises(ValueError, match=f"`pooled_only` is no argument of {backbone_class.__name__}"):
            backbone(torch.randn(pixels_shape(family)), pooled_only=True)


@pytest.mark.parametrize(
    ("word", "meant"), [("pixel_value", "pixel_values"), ("label", "labels"), ("outputHiddenStates", "")]
)
def test_misspelt_arguments_are_refused(word, meant, family, model, pixels):
    if family == "s2_vision" and not meant:
        meant = "output_hidden_states"
    with pytest.raises(ValueError, match=rf"`{word}` is no argument of .*`{meant or 'output_hidden_states'}`"):
        model(pixels, **{word: 1})


def test_token_merging_is_refused_where_there_is_none(family, model, pixels):
    if hasattr(model.config, "merge_tokens_to"):
        everything = model(pixels, merge_tokens_to=model.config.max_num_tokens_for())
        torch.testing.assert_close(everything.logits, model(pixels).logits)
        return
    for called in (model, model.base_model):
        with pytest.raises(ValueError, match=f"`merge_tokens_to` is no argument of {type(called).__name__}"):
            called(pixels, merge_tokens_to=4)


@pytest.mark.parametrize("word", ["patchsize", "num_token", "split_treshold", "img_size", "scale"])
def test_misspelt_budget_words_are_refused_by_all(word, model, pixels):
    with pytest.raises(ValueError, match=f"`{word}` is no argument"):
        model(pixels, **{word: 4})


def test_other_words_pass_and_change_nothing(model, pixels):
    with torch.no_grad():
        expected = model(pixels).logits
        for word in PASSING:
            if word != "whatever" or model.config.model_type != "s2_vision":  # handed to the wrapped model
                torch.testing.assert_close(model(pixels, **{word: True})[0], expected)


def test_a_host_word_compiles_into_one_graph_and_a_wrong_one_says_so():
    model = tiny_classifier("flexivit")
    pixels = torch.randn(pixels_shape("flexivit"))
    with torch.no_grad():
        expected = model(pixels).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for words in ({}, {"use_cache": True, "foo_bar": 1}):
            torch.testing.assert_close(compiled(pixels, **words).logits, expected)
        torch._dynamo.reset()
        with pytest.raises(ValueError, match="`num_tokens` is no argument"):
            torch.compile(model, backend="eager")(pixels, num_tokens=4)
    torch._dynamo.reset()


def test_only_tensors_of_pixels_are_taken(family, model):
    shape = pixels_shape(family)
    image = Image.new("RGB", (32, 32))
    for wrong in (None, "cat.png", image, [image], [[0.0]], 3, np.zeros(shape, np.float32)):
        for called in (model, model.base_model):
            with pytest.raises(ValueError, match="`pixel_values`"):
                called(wrong)
    for axis in (0, -3, -2, -1):
        empty = list(shape)
        empty[axis] = 0
        with pytest.raises(ValueError, match="`pixel_values`"):
            model(torch.zeros(empty))
    with pytest.raises(ValueError, match="`pixel_values` must hold real numbers"):
        model(torch.zeros(shape, dtype=torch.complex64))


def test_labels_that_do_not_fit_are_refused(model, pixels):
    for wrong in ([0, 1], "cat", 1, torch.tensor(1), torch.tensor([1]), torch.tensor([0, 3]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="`labels`"):
            model(pixels, labels=wrong)
    loss = model(pixels, labels=torch.tensor([0, -100])).loss  # -100 stands for an entry to skip
    torch.testing.assert_close(loss, model(pixels[:1], labels=torch.tensor([0])).loss, rtol=1e-4, atol=1e-4)


def test_targets_for_each_class_name_the_setting_that_takes_them(model, pixels):
    targets = torch.zeros(len(pixels), model.config.num_labels)
    model.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match=r"for `config\.problem_type` is 'single_label_classification'"):
        model(pixels, labels=targets)
    model.config.problem_type = "multi_label_classification"
    outputs = model(pixels, labels=targets)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, targets)
    torch.testing.assert_close(outputs.loss, expected)
    model.config.problem_type = None


def test_a_refused_call_leaves_the_kind_of_labels_open(family, pixels):
    model = tiny_classifier(family)
    with pytest.raises(ValueError, match="`labels` of shape"):
        model(pixels, labels=torch.tensor([0.0, 1.0]))
    assert model.config.problem_type is None
    logits = model(pixels).logits
    loss = model(pixels, labels=torch.tensor([0, 1])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])))


def test_regression_compares_each_logit_with_its_number(family, pixels):
    one = tiny_classifier(family, num_labels=1)
    logits = one(pixels).logits
    numbers = torch.tensor([0.5, -2.0])
    for labels in (numbers, numbers[:, None]):
        torch.testing.assert_close(one(pixels, labels=labels).loss, (logits[:, 0] - numbers).square().mean())
    with pytest.raises(ValueError, match=r"number for each logit in a regression, \(2, 1\), got the shape \(2, 2\)"):
        one(pixels, labels=numbers.expand(2, 2))
    with pytest.raises(ValueError, match=r"in a regression, \(1, 1\), got the shape \(1, 2\)"):
        one(pixels[:1], labels=numbers[None])
    two = tiny_classifier(family, num_labels=2, problem_type="regression")
    for labels in (numbers, numbers[:, None]):
        with pytest.raises(ValueError, match=r"in a regression, \(2, 2\), got the shape"):
            two(pixels, labels=labels)
    labels = torch.tensor([[0.5, -2.0], [1.0, 0.0]])
    torch.testing.assert_close(two(pixels, labels=labels).loss, (two(pixels).logits - labels).square().mean())
