"""CLIP-like models with a tower of this library: equal at the stored patch size, at any budget, reloaded."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    ResNetConfig,
    ResNetModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    pipeline,
)

import polyscale
from polyscale.dual_encoders import BudgetCLIPConfig, BudgetCLIPModel, BudgetSiglipModel, swap_dual_encoder_tower
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.models.quadtree_vit.convert_quadtree_vit import load_quadtree_vit

from ..llava.llava_tiny import make_photographs, make_tokenizer


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**VISION, "vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 2}


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {name: value for name, value in TEXT.items() if name not in ("image_size", "patch_size")}
    return CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(3, 99, (2, 7), generator=generator),
    }


def make_tower(clip: CLIPModel, kind: str):
    if kind == "flexivit":
        return flexivit_from_source(load_flexivit_source(clip.vision_model))
    if kind == "quadtree_vit":
        return load_quadtree_vit(clip.vision_model, max_patch_size=16, num_tokens=16)[0]
    return polyscale.S2VisionWrapper.from_vision_model(clip.vision_model, scales=[1, 2])


def assert_same(actual, expected) -> None:
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flexivit", "quadtree_vit", "s2"])
def test_the_embeddings_of_the_own_tower_are_the_same(clip, inputs, kind):
    expected = clip(**inputs, return_loss=False)
    swapped = swap_dual_encoder_tower(clip, make_tower(clip, kind))
    assert isinstance(swapped, BudgetCLIPModel)
    assert_same(swapped(**inputs), expected)
    assert swapped.text_projection.weight is clip.text_projection.weight  # shared
    assert isinstance(clip.vision_model, CLIPVisionModel)  # unchanged


@torch.no_grad()
def test_the_budget_is_an_argument_and_a_config_field(clip, inputs):
    swapped = swap_dual_encoder_tower(clip, make_tower(clip, "flexivit"))
    called = swapped(**inputs, patch_size=16)
    assert called.vision_model_output.last_hidden_state.shape[1] == 1 + 4
    features = swapped.get_image_features(inputs["pixel_values"], patch_size=16).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), called.image_embeds)
    swapped.config.vision_config.patch_size = 16
    assert_same(swapped(**inputs), called)
    assert swapped.config.budget_argument == "patch_size"
    assert swapped.config.num_tokens_for(32) == 4
    assert swapped.config.with_budget(patch_size=4).num_tokens_for(32) == 64
    assert swapped.config.num_tokens_for(32) == 4


def test_losses_are_those_of_transformers(clip, inputs):
    pairs = {**inputs, "input_ids": inputs["input_ids"][[0, 1, 1]]}
    swapped = swap_dual_encoder_tower(clip, make_tower(clip, "flexivit"))
    torch.testing.assert_close(swapped(**pairs, return_loss=True).loss, clip(**pairs, return_loss=True).loss)


RELOAD = """
import sys, torch, polyscale
from transformers import AutoModel
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    outputs = AutoModel.from_pretrained(sys.argv[1]).eval()(**inputs, patch_size=16)
torch.save(outputs.logits_per_image, sys.argv[3])
"""


@torch.no_grad()
def test_it_reloads_in_a_fresh_process(clip, inputs, tmp_path):
    swapped = swap_dual_encoder_tower(clip, make_tower(clip, "flexivit"))
    swapped.save_pretrained(tmp_path / "model")
    torch.save(inputs, tmp_path / "inputs.pt")
    places = [str(tmp_path / name) for name in ("model", "inputs.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *places], check=True, capture_output=True)
    reloaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(reloaded, swapped(**inputs, patch_size=16).logits_per_image)


@torch.no_grad()
def test_the_zero_shot_pipeline_at_two_budgets(clip, tmp_path):
    swapped = swap_dual_encoder_tower(clip, make_tower(clip, "flexivit"))
    swapped.save_pretrained(tmp_path)
    model = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)
    assert isinstance(model, BudgetCLIPModel)
    size = {"height": 32, "width": 32}
    classifier = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=make_tokenizer(),
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
    )
    photograph = make_photographs()[0]
    scores = {}
    for patch_size in (8, 16):
        model.config.vision_config.patch_size = patch_size
        answers = classifier(photograph, candidate_labels=["cat", "this"], hypothesis_template="{}")
        scores[patch_size] = {answer["label"]: answer["score"] for answer in answers}
        assert sum(scores[patch_size].values()) == pytest.approx(1)
    assert scores[8] != scores[16]


@torch.no_grad()
def test_a_dual_encoder_of_any_text_model(inputs):
    torch.manual_seed(0)
    text = BertModel(
        BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    vision = CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config)
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text).eval()
    expected = model(**inputs)
    tower = flexivit_from_source(load_flexivit_source(vision))
    assert_same(swap_dual_encoder_tower(model, tower)(**inputs), expected)


def test_a_tower_of_another_width_gets_a_new_projection(clip):
    tower = polyscale.FlexiViTModel(
        polyscale.FlexiViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, base_patch_size=8
        )
    )
    with pytest.warns(UserWarning, match="reads 32 channels and the new tower gives 16"):
        swapped = swap_dual_encoder_tower(clip, tower)
    assert swapped.visual_projection.weight.shape == (24, 16)


def test_what_cannot_be_swapped_is_refused(clip):
    tower = make_tower(clip, "flexivit")
    with pytest.raises(ValueError, match="Siglip2Model, which takes packed patches"):
        swap_dual_encoder_tower(Siglip2Model(Siglip2Config(vision_config=SMALL, text_config=SMALL)), tower)
    with pytest.raises(ValueError, match="must be a CLIPModel, a SiglipModel or a Vision"):
        swap_dual_encoder_tower(ResNetModel(ResNetConfig()), tower)
    with pytest.raises(ValueError, match="no projection between them"):
        swap_dual_encoder_tower(
            SiglipModel(SiglipConfig(vision_config=SMALL, text_config={**SMALL, "hidden_size": 16})), tower
        )
    whole = flexivit_from_source(load_flexivit_source(clip))  # with CLIP's projection
    with pytest.raises(ValueError, match="must be FlexiViTModel, a model without a head"):
        swap_dual_encoder_tower(clip, whole)
    assert isinstance(swap_dual_encoder_tower(clip, whole.base_model).vision_model, polyscale.FlexiViTModel)
    with pytest.raises(ValueError, match="`processor` has no use for a CLIPModel"):
        polyscale.swap_vision_tower(clip, tower, processor=object())
    swapped = polyscale.swap_vision_tower(clip, tower)
    with pytest.raises(ValueError, match="`input_ids` is required"):
        swapped(pixel_values=torch.zeros(1, 3, 32, 32))


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@torch.no_grad()
def test_a_siglip_scores_pairs_by_its_own_rule(inputs, tmp_path):
    torch.manual_seed(0)
    siglip = SiglipModel(SiglipConfig(vision_config=VISION, text_config={**SMALL, "vocab_size": 99})).eval()
    tower = polyscale.FlexiViTModel(
        polyscale.FlexiViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, base_patch_size=8
        )
    ).eval()
    swapped = swap_dual_encoder_tower(siglip, tower)
    assert isinstance(swapped, BudgetSiglipModel)
    outputs = swapped(**inputs, return_loss=False)
    image = torch.nn.functional.normalize(tower(inputs["pixel_values"]).pooler_output, dim=-1)
    text = torch.nn.functional.normalize(siglip.text_model(inputs["input_ids"]).pooler_output, dim=-1)
    expected = siglip.logit_scale.exp() * image @ text.T + siglip.logit_bias
    torch.testing.assert_close(outputs.logits_per_image, expected, atol=1e-5, rtol=1e-5)
    swapped.save_pretrained(tmp_path)
    torch.testing.assert_close(
        AutoModel.from_pretrained(tmp_path)(**inputs).logits_per_image, outputs.logits_per_image
    )
    assert "siglip" in swapped.config.model_type  # transformers' pipeline pads and scores by that


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"`input_ids` must be a tensor of shape \(texts, tokens\), got a list"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"`input_ids` must be a tensor of shape .*, got \(5,\)"),
        ({"input_ids": torch.ones(3, 0, dtype=torch.long)}, r"`input_ids` must be a tensor of shape .*, got \(3, 0\)"),
        ({"input_ids": torch.ones(3, 5)}, r"`input_ids` must be a tensor of ints, got torch\.float32"),
        ({"input_ids": torch.ones(3, 5, dtype=torch.bool)}, r"`input_ids` must be a tensor of ints, got torch\.bool"),
        ({"input_ids": torch.full((3, 5), 10**6)}, "`input_ids` must be from 0 to [0-9]+, got 1000000"),
        ({"input_ids": torch.full((3, 5), -1)}, "`input_ids` must be from 0 to [0-9]+, got -1"),
        ({"attention_mask": torch.ones(3, 50)}, r"`attention_mask` must have the shape of `input_ids`, \("),
        ({"attention_mask": [[1]]}, r"`attention_mask` must be a tensor of shape \(texts, tokens\), got a list"),
        ({"pixel_values": [1]}, "`pixel_values` must be a tensor of shape"),
        ({"patch_size": True}, "`patch_size` must be an int or a pair"),
        ({"patch_size": [(8, 8)] * 99}, "a list of one .* for each of the [0-9]+ images, got 99 of them"),
        ({"num_tokens": 4}, "`num_tokens` is no argument of FlexiViTModel: its budget is set by `patch_size`"),
        ({"patchsize": 4}, r"`patchsize` is no argument of FlexiViTModel. Did you mean `patch_size`\?"),
    ],
)
def test_inputs_that_are_none(clip, inputs, change, message):
    model = polyscale.swap_vision_tower(clip, make_tower(clip, "flexivit"))
    with pytest.raises(ValueError, match=message):
        model(**(inputs | change))


def test_a_loss_needs_pairs(clip, inputs):
    model = polyscale.swap_vision_tower(clip, make_tower(clip, "flexivit"))
    with pytest.raises(ValueError, match=r"`return_loss` needs pairs: .*, got 2 texts and 3 images"):
        model(**inputs, return_loss=True)
    assert model(**inputs).logits_per_image.shape == (3, 2)


def test_models_of_texts_and_of_images_have_their_places(clip):
    for tower in (clip.text_model, clip):
        with pytest.raises(ValueError, match="`tower` must be of a model that takes `pixel_values`, got CLIP"):
            polyscale.swap_vision_tower(clip, tower)
    own = clip.config.text_config.to_dict()
    with pytest.raises(ValueError, match="`vision_config` must be of a model that takes `pixel_values`"):
        BudgetCLIPModel(BudgetCLIPConfig(text_config=own, vision_config=own))
    with pytest.raises(ValueError, match="`text_config` must be of a model that takes `input_ids`"):
        BudgetCLIPModel(BudgetCLIPConfig(text_config={"model_type": "flexivit"}))
    with pytest.raises(
        ValueError, match="A config inside BudgetCLIPConfig: Field 'hidden_size' expected int, got str"
    ):
        BudgetCLIPConfig(text_config={"hidden_size": "wide"})


def test_a_tower_that_could_not_run_is_refused_before_it_is_in(clip):
    merging = make_tower(clip, "flexivit")
    merging.config.merge_tokens_to = 3
    with pytest.raises(ValueError, match="`merge_tokens_to` must be at least 4 for 16 tokens and 2 layers"):
        polyscale.swap_vision_tower(clip, merging)
    around = polyscale.S2VisionWrapper.from_vision_model(make_tower(clip, "flexivit"), scales=[1, 2])
    around.config.vision_config.merge_tokens_to = 6
    with pytest.raises(ValueError, match="`merge_tokens_to` must be None in a model at several scales, got 6"):
        polyscale.swap_vision_tower(clip, around)
    plain = polyscale.S2VisionWrapper.from_vision_model(
        CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config), scales=[1, 2]
    )
    polyscale.apply_token_merging(plain.vision_model, num_tokens=6)
    with pytest.raises(ValueError, match="several scales merges tokens"):
        polyscale.swap_vision_tower(clip, plain)
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ValueError, match="'resnet' is a ConvNet, whose `pooler_output` is a map"):
        polyscale.swap_vision_tower(clip, resnet)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flexivit", "quadtree_vit"])
def test_a_tower_may_merge_tokens(clip, inputs, kind):
    tower = make_tower(clip, kind)
    tower.config.merge_tokens_to = 6
    swapped = polyscale.swap_vision_tower(clip, tower)
    assert swapped(**inputs).vision_model_output.last_hidden_state.shape[1] == 1 + 6
    assert swapped.config.num_tokens_for(32) == 6


@torch.no_grad()
def test_token_merging_of_a_plain_tower_stays(clip, inputs):
    tower = CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config).eval()
    polyscale.apply_token_merging(tower, num_tokens=6)
    swapped = polyscale.swap_vision_tower(clip, tower)
    assert swapped(**inputs).vision_model_output.last_hidden_state.shape[1] == 1 + 6


def test_a_model_inside_a_tower_keeps_its_attention(clip):
    around = polyscale.S2VisionWrapper.from_vision_model(
        CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config), scales=[1, 2]
    )
    around.vision_model.set_attn_implementation("eager")
    swapped = polyscale.swap_vision_tower(clip, around)
    assert around.config._attn_implementation == "sdpa"
    assert swapped.vision_model.vision_model.config._attn_implementation == "eager"


def test_the_tower_of_a_model_in_half_precision(clip):
    half = CLIPModel(clip.config).bfloat16()
    swapped = polyscale.swap_vision_tower(half, make_tower(clip, "flexivit"))
    assert swapped.dtype == swapped.config.vision_config.dtype == torch.bfloat16


def test_budgets_are_those_of_the_tower_or_none(clip):
    flexivit = polyscale.swap_vision_tower(clip, make_tower(clip, "flexivit")).config
    assert flexivit.parse_budget("8x16") == (8, 16)
    assert flexivit.format_budget((8, 16)) == "8x16"
    quadtree = polyscale.swap_vision_tower(clip, make_tower(clip, "quadtree_vit")).config
    assert quadtree.budget_ladder() == [4, 7, 10, 13, 16]
    assert quadtree.budget_for_share(32, 0.5) == quadtree.vision_config.budget_for_share(32, 0.5)
    s2 = polyscale.swap_vision_tower(clip, make_tower(clip, "s2")).config
    assert s2.parse_budget("1+2") == [1, 2]
    assert s2.fixed_fields == s2.vision_config.fixed_fields

    plain = polyscale.swap_vision_tower(clip, CLIPVisionModel(CLIPConfig(vision_config=VISION).vision_config)).config
    assert plain.default_budgets() == plain.budget_ladder() == [None]
    assert plain.num_tokens_for() == plain.max_num_tokens_for(32) == 16
    assert plain.token_grid_for((16, 32)) == (2, 4)
    with pytest.raises(ValueError, match=r"`patch_size` cannot change in .* 'clip_vision_model'. What can: nothing"):
        plain.with_budget(patch_size=4)


def test_a_tower_without_a_pooler_is_named_by_the_call(clip, inputs):
    tower = ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False)
    swapped = polyscale.swap_vision_tower(clip, tower)
    with pytest.raises(ValueError, match="`vision_model`, a ViTModel, gives no `pooler_output`"):
        swapped(**inputs)
