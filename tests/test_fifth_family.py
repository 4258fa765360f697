"""A family of one's own: all that it takes is in this file, and every tool of the library knows it.

The family: a plain ViT that drops a share of its patches, spread evenly over the image. Its code travels with its
checkpoints (`save_with_code`), so the file imports what the family needs; the tools that are tried come by name.
"""

import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from polyscale.layers.token_budget import TokenBudgetMixin
from polyscale.models.auto import register_family


# the family


@strict
class ThinViTConfig(TokenBudgetMixin, PreTrainedConfig):
    """A plain ViT of which a share of the patches is kept: `keep_share`, above 0 and at most 1."""

    model_type = "thin_vit"
    budget_argument = "keep_share"
    changeable_fields = ("keep_share",)
    fixed_fields = {"num_tokens": "it follows from `keep_share`"}

    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    image_size: int | list | tuple = 32
    patch_size: int = 8
    num_channels: int = 3
    keep_share: float = 1.0
    initializer_range: float = 0.2

    num_prefix_tokens = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._grid(self.image_size, self.keep_share)

    def _grid(self, image_size, keep_share) -> tuple[int, int]:
        if not 0 < keep_share <= 1:
            raise ValueError(f"`keep_share` must be above 0 and at most 1, got {keep_share}.")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return height // self.patch_size, width // self.patch_size

    def default_budgets(self) -> list[float]:
        return [0.25, 0.5, 1.0]

    def parse_budget(self, text: str) -> float:
        return float(text)

    def num_tokens_for(self, image_size=None, keep_share=None) -> int:
        share = self.keep_share if keep_share is None else keep_share
        rows, columns = self._grid(self.image_size if image_size is None else image_size, share)
        return max(round(share * rows * columns), 1)

    def token_grid_for(self, image_size=None, keep_share=None) -> tuple[int, int] | None:
        share = self.keep_share if keep_share is None else keep_share
        return self._grid(self.image_size if image_size is None else image_size, share) if share == 1 else None


class ThinViTPreTrainedModel(PreTrainedModel):
    config: ThinViTConfig
    config_class = ThinViTConfig
    base_model_prefix = "thin_vit"
    main_input_name = "pixel_values"


class ThinViTModel(ThinViTPreTrainedModel):
    def __init__(self, config: ThinViTConfig):
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(config.hidden_size, config.num_attention_heads, 64, 0.0, batch_first=True)
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self, pixel_values=None, keep_share=None, output_hidden_states=None, return_dict=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        count = self.config.num_tokens_for(tuple(pixel_values.shape[-2:]), keep_share)
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (batch, patches, hidden)
        kept = torch.linspace(0, tokens.shape[1] - 1, count, device=tokens.device).round().long()
        states = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens[:, kept]], dim=1)
        hidden_states = [states]
        for layer in self.layers:
            states = layer(states)
            hidden_states.append(states)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=states[:, 0],
            hidden_states=tuple(hidden_states) if wanted else None,
        )
        return output if return_dict is not False else output.to_tuple()


class ThinViTForImageClassification(ThinViTPreTrainedModel):
    def __init__(self, config: ThinViTConfig):
        super().__init__(config)
        self.thin_vit = ThinViTModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values=None, labels=None, keep_share=None, **kwargs) -> ImageClassifierOutput:
        logits = self.head(self.thin_vit(pixel_values, keep_share).pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


class ThinViTImageProcessor(ViTImageProcessor):
    """The images of a ViT."""


def draw_thin_vit(model, processor, image: Image.Image, budgets) -> Image.Image:
    """The image once for each budget, side by side."""
    budgets = model.config.default_budgets() if budgets is None else budgets
    drawn = Image.new("RGB", (32 * len(budgets), 32))
    for column in range(len(budgets)):
        drawn.paste(image.resize((32, 32)), (32 * column, 0))
    return drawn


def draw_kept(axis, model, processor, image: Image.Image, budget: float) -> None:
    """The image, with the share that is kept below it."""
    axis.imshow(image)
    axis.text(0, 0, f"kept {budget}")


register_family(
    ThinViTConfig,
    ThinViTModel,
    classifier=ThinViTForImageClassification,
    image_processors={"torchvision": ThinViTImageProcessor},
    drawing=draw_thin_vit,
    budget_drawing=draw_kept,
)


# the tools

LABELS = ["blue", "green", "red"]


def tool(name: str):
    """`tool("classification.classify_images")`: what it is in the library."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"polyscale.{module}"), attribute)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("thin_vit")
    config = ThinViTConfig(id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})
    ThinViTForImageClassification(config).save_pretrained(folder)
    ThinViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of one colour each, which is their class."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for channel, name in enumerate(["red", "green", "blue"]):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (32, 32, 3))
                pixels[..., channel] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def image(data):
    return data / "test" / "red" / "0.png"


@pytest.fixture(scope="module")
def inputs(checkpoint, image):
    return AutoImageProcessor.from_pretrained(checkpoint)(Image.open(image), return_tensors="pt")["pixel_values"]


def test_auto_classes_know_it(checkpoint, inputs):
    assert type(AutoConfig.from_pretrained(checkpoint)) is ThinViTConfig
    assert type(AutoImageProcessor.from_pretrained(checkpoint)) is ThinViTImageProcessor
    model = AutoModel.from_pretrained(checkpoint).eval()
    assert type(model) is ThinViTModel
    for share, tokens in ((1.0, 16), (0.5, 8), (0.25, 4)):
        assert model(inputs, keep_share=share).last_hidden_state.shape == (1, 1 + tokens, 32)


def test_pipeline_and_classify_agree_at_each_budget(checkpoint, image):
    records, errors = tool("classification.classify_images")([image], checkpoint)
    assert errors == []
    assert [(record["budget"], record["tokens"]) for record in records] == [(0.25, 4), (0.5, 8), (1.0, 16)]
    plain = pipeline("image-classification", model=str(checkpoint), device="cpu")
    for record in records:
        plain.model.config.keep_share = record["budget"]
        best = plain(str(image))[0]
        assert (record["label"], record["score"]) == (best["label"], pytest.approx(best["score"], abs=1e-6))


def test_evaluate_scores_every_budget(checkpoint, data):
    (evaluation,) = tool("evaluation.evaluate_checkpoints")([checkpoint], data)
    assert [result.tokens for result in evaluation.results] == [4, 8, 16]
    assert evaluation.budget_texts == ["0.25", "0.5", "1.0"]
    loaded = tool("loading.load_classifier")(checkpoint)
    for result in evaluation.results:
        right = 0
        for file in sorted((data / "test").rglob("*.png")):
            pixels = loaded.image_processor(Image.open(file), return_tensors="pt")["pixel_values"]
            best = loaded.model(pixels, keep_share=result.budget).logits.argmax(-1).item()
            right += LABELS[best] == file.parent.name
        assert result.top1 == pytest.approx(right / 12)
    speeds = tool("evaluation.speed.benchmark_budgets")(loaded.model, [1.0, 0.25], batch_size=1, rounds=1)
    assert [(speed.budget, speed.tokens) for speed in speeds] == [(1.0, 16), (0.25, 4)]


def test_the_command_knows_its_budgets(checkpoint, image, tmp_path):
    runner, app = import_module("typer.testing").CliRunner(), tool("cli.app")
    arguments = ["--model", str(checkpoint), "--budgets", "0.5", ".25"]
    done = runner.invoke(app, ["classify", str(image), *arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert [record["tokens"] for record in json.loads(done.stdout)] == [8, 4]
    done = runner.invoke(app, ["show", str(image), *arguments, "--output", str(tmp_path / "show.png")])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "show.png") as drawn:
        assert drawn.size == (64, 32)
    done = runner.invoke(app, ["classify", str(image), "--model", str(checkpoint), "--patch-sizes", "4"])
    assert done.exit_code == 2
    assert "whose budget is its `keep_share`" in done.stderr


def test_it_is_trained_by_its_name(data, tmp_path):
    choices = {"epochs": 12, "batch_size": 8, "learning_rate": 3e-3, "image_size": 32}
    recipe = tool("training.make_recipe")(family="thin_vit", **choices)
    tool("training.train")(data, tmp_path / "out", recipe)
    (evaluation,) = tool("evaluation.evaluate_checkpoints")([tmp_path / "out"], data)
    assert [result.budget for result in evaluation.results] == [0.25, 0.5, 1.0]
    assert evaluation.results[-1].top1 >= 0.9
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "out")) is ThinViTImageProcessor


def test_its_drawings_are_used(checkpoint, image):
    drawn = tool("figures.show")(checkpoint, image, [0.5, 1.0])
    assert drawn.size == (64, 32)
    records, _ = tool("classification.classify_images")([image], checkpoint, [0.5])
    figure = tool("figures.draw_classification")(*tool("loading.load_classifier")(checkpoint), records)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["kept 0.5"]
    assert axis.get_title() == "keep share 0.5\n8 tokens"


def test_the_budget_of_a_llava_with_it_changes(checkpoint, image):
    make_llava = import_module(f"{__package__}.llava.llava_tiny").make_llava
    llava, processor = make_llava()
    processor = tool("llava.swap_vision_tower")(llava, AutoModel.from_pretrained(checkpoint), processor)
    assert type(processor.image_processor) is ThinViTImageProcessor
    for share, tokens in ((None, 16), (0.5, 8), (0.25, 4)):
        if share is not None:
            processor = tool("llava.set_token_budget")(llava, processor, keep_share=share)
        call = processor(images=Image.open(image), text="USER: <image> the cat", return_tensors="pt")
        assert (call["input_ids"] == llava.config.image_token_id).sum() == tokens
        assert llava(**call).logits.isfinite().all()
    call = processor(images=Image.open(image), text="USER: <image> the cat", keep_share=0.75, return_tensors="pt")
    assert (call["input_ids"] == llava.config.image_token_id).sum() == 12
    assert llava(**call).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"`num_tokens` cannot change .*it follows from `keep_share`"):
        tool("llava.set_token_budget")(llava, processor, num_tokens=4)


def test_s2_goes_around_it(checkpoint, inputs):
    model = AutoModel.from_pretrained(checkpoint).eval()
    wrapped = tool("models.s2_vision.S2VisionWrapper").from_vision_model(model, scales=[1, 2]).eval()
    images = torch.nn.functional.interpolate(inputs, (64, 64))
    with torch.no_grad():
        features = wrapped(images).last_hidden_state
        small = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic")
        first = model(small).last_hidden_state
    assert features.shape == (1, 17, 64)
    torch.testing.assert_close(features[:, 1:, :32], first[:, 1:], rtol=0, atol=1e-5)


def test_its_code_travels_with_it(checkpoint, inputs, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    folder = tool("hub.save_with_code")(model, tmp_path / "model", processor)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; sys.modules['polyscale'] = None\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        f"AutoImageProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"logits = model(torch.load({str(tmp_path / 'inputs.pt')!r}), keep_share=0.5).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    expected = model(inputs, keep_share=0.5).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)
