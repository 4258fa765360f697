"""What a run starts from: a model with random weights or those of a checkpoint, and the image processor beside it."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..conversion import convert_checkpoint
from ..evaluation.labels import match_labels
from ..loading import (
    check_finite_weights,
    checkpoint_source,
    left_over_tensors,
    load_checkpoint,
    load_config,
    load_image_processor,
    quiet_loading,
    reading,
)
from ..models.auto import family_of, projection_of
from ..utils.weight_files import check_weight_files
from .configs import at_image_size, check_saved_config, label_fields, make_config, unknown_family
from .labels import listed
from .processing import adopt_processing, default_image_size, make_image_processor
from .recipe import TrainingRecipe


_STEPS_PER_EPOCH = 8  # at least, by the default batch size
_LARGEST_BATCH = 128


@dataclass
class StartingPoint:
    """What a run starts from.

    Attributes:
        model: with a head for the classes.
        processor: to save beside it.
        recipe: with nothing left open.
        label_names: the classes in the order of the logits.
        numbers: for each class of the data, its place in `label_names`.
        notes: what is to be said of them.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    recipe: TrainingRecipe
    label_names: list[str]
    numbers: list[int]
    notes: list[str] = field(default_factory=list)


def starting_point(
    recipe: TrainingRecipe, label_names: Sequence[str], shapes: Sequence[tuple[int, int, int]], num_images: int
) -> StartingPoint:
    """The classifier that a recipe starts from.

    Args:
        recipe: the choices.
        label_names: the classes of the data.
        shapes: (height, width, channels) of some of its images.
        num_images: of the training split.

    Raises:
        ValueError: for an unknown family, preset or field, or a checkpoint that cannot be used.
    """
    options = dict(recipe.model_options)
    for name in ("image_size", "num_channels"):  # of the data too, and so choices of their own
        if options.get(name) is not None:
            set_to = replace(recipe, **{name: options.pop(name)})
            own = getattr(recipe, name)
            if own not in (None, getattr(set_to, name)):
                raise ValueError(
                    f"`{name}` is {own}, and {getattr(set_to, name)} in `model_options`: give one of them."
                )
            recipe = set_to
    recipe = completed(recipe, num_images, learning_rate=1e-3 if recipe.init_from is None else 1e-4)
    start = _fresh if recipe.init_from is None else _from_checkpoint
    point = start(recipe, options, list(label_names), shapes)
    check_saved_config(point.model.config)
    return point


def completed(recipe: TrainingRecipe, num_images: int, learning_rate: float) -> TrainingRecipe:
    """The recipe with a batch size and a learning rate."""
    return replace(
        recipe,
        batch_size=recipe.batch_size or default_batch_size(num_images),
        learning_rate=recipe.learning_rate or learning_rate,
    )


def default_batch_size(num_images: int) -> int:
    """A power of two, at most 128, that gives some steps per epoch."""
    batch = _LARGEST_BATCH
    while batch > 8 and num_images < batch * _STEPS_PER_EPOCH:
        batch //= 2
    return batch


def _fresh(
    recipe: TrainingRecipe, options: dict, label_names: list[str], shapes: Sequence[tuple[int, int, int]]
) -> StartingPoint:
    recipe = replace(recipe, family=recipe.family or "flexivit")
    channels = recipe.num_channels or shapes[0][2]
    for name in ("image_mean", "image_std"):
        if len(getattr(recipe, name) or (0,) * channels) != channels:
            raise ValueError(
                f"`{name}` must hold {channels} numbers, one for each channel; got {getattr(recipe, name)}."
            )
    recipe = replace(
        recipe,
        image_size=recipe.image_size or default_image_size(shapes),
        num_channels=channels,
        image_mean=recipe.image_mean or (0.5,) * channels,
        image_std=recipe.image_std or (0.5,) * channels,
    )
    config = make_config(recipe, {**options, **label_fields(label_names)})
    config.architectures = config.architectures or []  # transformers looks through them where a family has several
    with reading("family", recipe.family):
        model = AutoModelForImageClassification.from_config(config)
    processor = make_image_processor(recipe, config)
    if family_of(config) is None:
        _check_takes_images(model, recipe)
    return StartingPoint(model, processor, recipe, label_names, list(range(len(label_names))))


@torch.no_grad()
def _check_takes_images(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    """Refuses a model of transformers that takes no images of the recipe: one whose config keeps their size elsewhere.

    Raises:
        ValueError: with what the model says.
    """
    was_training = model.training
    try:
        model.eval()(pixel_values=torch.zeros(1, recipe.num_channels, *recipe.image_size))
    except Exception as error:  # any model may raise anything
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"A fresh model of the `family` {recipe.family!r} takes no images of {recipe.image_size[0]} x "
            f"{recipe.image_size[1]} pixels and {recipe.num_channels} channels ({type(error).__name__}: {reason}). "
            "Choose fields that fit with `model_options` (`--set`), or another family."
        ) from error
    model.train(was_training)


@dataclass
class _Opened:
    """A checkpoint of the recipe's family, converted to it if need be."""

    source: str
    config: PreTrainedConfig
    processor: BaseImageProcessor
    recipe: TrainingRecipe
    notes: list[str]


@contextmanager
def _opened(recipe: TrainingRecipe) -> Iterator[_Opened]:
    name = recipe.init_from
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint_source(name, "init_from")
        trust = {"trust_remote_code": recipe.trust_remote_code, "argument": "init_from"}
        config = load_config(source, **trust)
        notes = []
        if recipe.family not in (None, config.model_type):
            if getattr(family_of(recipe.family), "converter", None) is None:
                raise unknown_family(recipe.family)
            notes.append(f"{name} ({config.model_type}) is converted to {recipe.family}.")
            converted = Path(folder) / "model"
            with reading("init_from", name), quiet_loading():
                convert_checkpoint(source, converted, to=recipe.family)
            source = str(converted)
            config = load_config(source, **trust)
        processor = load_image_processor(source, **trust)
        recipe = replace(recipe, family=config.model_type)
        recipe, processor = adopt_processing(recipe, processor, config)
        yield _Opened(source, at_image_size(config, recipe), processor, recipe, notes)


def _from_checkpoint(
    recipe: TrainingRecipe, options: dict, label_names: list[str], shapes: Sequence[tuple[int, int, int]]
) -> StartingPoint:
    with _opened(recipe) as opened:
        names, numbers, keeps_head = _classes(opened.config, label_names, recipe.label_map)
        config = make_config(opened.recipe, {**options, **label_fields(names)}, base=opened.config)
        model, kept_head, unused = _classifier_with_weights(
            opened.source, recipe.init_from, config, opened.recipe, keeps_head
        )
    if unused:
        opened.notes.append(
            f"{len(unused)} tensors of {recipe.init_from}, such as {unused[0]!r}, have no place in this model: they "
            "are not used."
        )
    opened.notes.append(
        "The classes are those of the checkpoint: its head is kept."
        if kept_head
        else f"The head is new: the classes of the data ({listed(label_names)}) are not those of the checkpoint."
    )
    return StartingPoint(model, opened.processor, opened.recipe, names, numbers, opened.notes)


def whole_checkpoint(
    recipe: TrainingRecipe, num_images: int
) -> tuple[PreTrainedModel, BaseImageProcessor, TrainingRecipe, list[str]]:
    """The model of `recipe.init_from` with all of its weights, a head included where it has one; its image processor,
    the completed recipe, and what is to be said of them.
    """
    recipe = completed(recipe, num_images, learning_rate=5e-5)
    with _opened(recipe) as opened:
        config = make_config(opened.recipe, recipe.model_options, base=opened.config)
        model = load_checkpoint(
            opened.source,
            _whole_class(config),
            trust_remote_code=recipe.trust_remote_code,
            argument="init_from",
            called=recipe.init_from,
            config=config,
            dtype=torch.float32,
        )
    check_saved_config(model.config)
    return model, opened.processor, opened.recipe, opened.notes


def _whole_class(config: PreTrainedConfig) -> type:
    """What loads all weights of a checkpoint with this config, those of its head among them."""
    classifier = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    if classifier is not None and classifier.__name__ in (config.architectures or []):
        return AutoModelForImageClassification
    return projection_of(config) or AutoModel


def _classes(
    config: PreTrainedConfig, label_names: list[str], label_map: Mapping | None
) -> tuple[list[str], list[int], bool]:
    """The classes in the order of the logits, where each of the data is among them, and whether the head stays."""
    try:
        numbers = match_labels(label_names, config.id2label, label_map)
    except ValueError:
        if label_map:
            raise
        return label_names, list(range(len(label_names))), False
    if sorted(numbers) != list(range(config.num_labels)):
        return label_names, list(range(len(label_names))), False
    names = [config.id2label[index] for index in range(config.num_labels)]
    if all(name.startswith("LABEL_") for name in names):
        names = [label_names[numbers.index(index)] for index in range(len(numbers))]
    return names, numbers, True


def _classifier_with_weights(
    source: str, name: str, config: PreTrainedConfig, recipe: TrainingRecipe, keeps_head: bool
) -> tuple[PreTrainedModel, bool, list[str]]:
    """The classifier, all of whose weights but those of the head come from the checkpoint; whether they do too; and
    the tensors of the checkpoint that are left over.
    """
    with reading("init_from", name), quiet_loading():
        if Path(source).is_dir():
            check_weight_files(Path(source))
        model, info = AutoModelForImageClassification.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=recipe.trust_remote_code,
        )
    check_finite_weights(model, "init_from", name)
    body = f"{model.base_model_prefix}."
    lost = [key for key in info["missing_keys"] if key.startswith(body)]
    other = [entry for entry in info["mismatched_keys"] if entry[0].startswith(body)]
    if lost:
        raise ValueError(
            f"`init_from` {name!r} lacks {len(lost)} tensors, such as {sorted(lost)[0]!r}: they would stay random."
        )
    if other:
        raise ValueError(
            f"`init_from` {name!r} does not fit the model asked for: {other[0][0]} is {tuple(other[0][1])}, expected "
            f"{tuple(other[0][2])}."
        )
    is_head = {key for key in model.state_dict() if not key.startswith(body)}
    new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])} & is_head
    if not keeps_head and not new:
        model = _with_new_head(model, is_head)
    return model, keeps_head and not new, left_over_tensors(model, info["unexpected_keys"])


def _with_new_head(model: PreTrainedModel, head: set[str]) -> PreTrainedModel:
    """The model with the weights of the head drawn anew."""
    fresh = type(model)(model.config).state_dict()
    model.load_state_dict({name: fresh[name] for name in head}, strict=False)
    return model


__all__ = ["StartingPoint", "completed", "starting_point", "whole_checkpoint"]
