"""What a run starts from: a model with random weights or those of a checkpoint, and the image processor beside it."""

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from ..conversion import convert_checkpoint
from ..evaluation.labels import match_labels
from ..loading import checkpoint_source, load_config, load_image_processor, reading
from ..models.auto import families, family_of
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
    if "image_size" in options:
        recipe = replace(recipe, image_size=recipe.image_size or _pair(options.pop("image_size")))
    if "num_channels" in options:
        recipe = replace(recipe, num_channels=recipe.num_channels or options.pop("num_channels"))
    recipe = replace(
        recipe,
        batch_size=recipe.batch_size or default_batch_size(num_images),
        learning_rate=recipe.learning_rate or (1e-3 if recipe.init_from is None else 1e-4),
    )
    start = _fresh if recipe.init_from is None else _from_checkpoint
    point = start(recipe, options, list(label_names), shapes)
    check_saved_config(point.model.config)
    return point


def _pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def default_batch_size(num_images: int) -> int:
    """A power of two, at most 128, that gives some steps an epoch."""
    batch = _LARGEST_BATCH
    while batch > 8 and num_images < batch * _STEPS_PER_EPOCH:
        batch //= 2
    return batch


def _fresh(
    recipe: TrainingRecipe, options: dict, label_names: list[str], shapes: Sequence[tuple[int, int, int]]
) -> StartingPoint:
    recipe = replace(recipe, family=recipe.family or "flexivit", image_size=recipe.image_size)
    channels = recipe.num_channels or (len(recipe.image_mean) if recipe.image_mean else shapes[0][2])
    recipe = replace(
        recipe,
        image_size=recipe.image_size or default_image_size(shapes),
        num_channels=channels,
        image_mean=recipe.image_mean or (0.5,) * channels,
        image_std=recipe.image_std or (0.5,) * channels,
    )
    config = make_config(recipe, {**options, **label_fields(label_names)})
    with reading("family", recipe.family):
        model = AutoModelForImageClassification.from_config(config)
    processor = make_image_processor(recipe, config)
    return StartingPoint(model, processor, recipe, label_names, list(range(len(label_names))))


def label_fields(label_names: Sequence[str]) -> dict:
    """Fields of a config that name its classes."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def make_config(recipe: TrainingRecipe, options: Mapping, base: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """The config of a recipe: of its family, or the one of a checkpoint with some fields changed.

    Raises:
        ValueError: for an unknown family, preset or field, or a value that the config refuses.
    """
    family = family_of(base or recipe.family)
    if base is None and (recipe.family not in CONFIG_MAPPING or (family and family.classifier_class is None)):
        ours = [name for name, known in families().items() if known.classifier_class is not None]
        raise ValueError(
            f"`family` must be a model type with an image classifier: {', '.join(ours)}, or one of transformers; got "
            f"{recipe.family!r}."
        )
    config_class = type(base) if base is not None else CONFIG_MAPPING[recipe.family]
    if base is None and config_class not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"`family` {recipe.family!r} has no image classifier.")
    check_fields(config_class, options)
    make = family.function("training_config") if family else None
    try:
        if make is not None:
            return make(recipe.image_size, recipe.num_channels, preset=recipe.preset, base=base, **options)
        if base is not None:
            return config_class.from_dict({**base.to_dict(), **options})
        sizes = {"image_size": recipe.image_size, "num_channels": recipe.num_channels}
        known = {name: value for name, value in sizes.items() if name in config_class.__dataclass_fields__}
        if recipe.preset is not None:
            if not hasattr(config_class, "preset"):
                raise ValueError(f"`family` {recipe.family!r} has no presets.")
            return config_class.preset(recipe.preset, **{**known, **options})
        return config_class(**{**known, **options})
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"The model cannot be made: {reason}") from error
    except TypeError as error:
        raise ValueError(f"The model cannot be made of {dict(options)}: {error}") from error


def check_fields(config_class: type[PreTrainedConfig], options: Mapping) -> None:
    """Refuses names that are no fields of a config.

    Raises:
        ValueError: naming the nearest field.
    """
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, "num_labels", "id2label", "label2id"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean `{near[0]}`?" if near else "."
            raise ValueError(f"`{name}` is no field of the config of {config_class.model_type!r}{hint}")


def check_saved_config(config: PreTrainedConfig) -> None:
    """Makes sure, before anything is trained, that a config can be read once it is written.

    Raises:
        ValueError: for a value that the config would refuse then.
    """
    try:
        type(config).from_dict(config.to_dict())
    except StrictDataclassError as error:
        raise ValueError(f"The model's config is not legal: {error.__cause__ or error}") from error


def _from_checkpoint(
    recipe: TrainingRecipe, options: dict, label_names: list[str], shapes: Sequence[tuple[int, int, int]]
) -> StartingPoint:
    name = recipe.init_from
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint_source(name, "init_from")
        trust = {"trust_remote_code": recipe.trust_remote_code, "argument": "init_from"}
        config = load_config(source, **trust)
        notes = []
        if recipe.family not in (None, config.model_type):
            notes.append(f"{name} ({config.model_type}) is converted to {recipe.family}.")
            converted = Path(folder) / "model"
            with reading("init_from", name):
                convert_checkpoint(source, converted, to=recipe.family)
            source = str(converted)
            config = load_config(source, **trust)
        processor = load_image_processor(source, **trust)
        recipe = replace(recipe, family=config.model_type)
        recipe, processor = adopt_processing(recipe, processor, config)
        config = at_image_size(config, recipe)
        names, numbers, keeps_head = _classes(config, label_names, recipe.label_map)
        config = make_config(recipe, {**options, **label_fields(names)}, base=config)
        model, kept_head = _classifier_with_weights(source, name, config, recipe, keeps_head)
    notes.append(
        "The classes are those of the checkpoint: its head is kept."
        if kept_head
        else f"The head is new: the classes of the data ({listed(label_names)}) are not those of the checkpoint."
    )
    return StartingPoint(model, processor, recipe, names, numbers, notes)


def at_image_size(config: PreTrainedConfig, recipe: TrainingRecipe) -> PreTrainedConfig:
    """The config for images of the recipe's size.

    Raises:
        ValueError: if the model takes no other size than its own.
    """
    own = getattr(config, "image_size", None)
    if own is None or _pair(own) == tuple(recipe.image_size):
        return config
    if "image_size" in getattr(config, "changeable_fields", ()):
        height, width = recipe.image_size
        return config.with_budget(image_size=height if height == width else [height, width])
    if family_of(config) is None:
        raise ValueError(f"`image_size` must be that of the checkpoint, {own}, got {recipe.image_size}.")
    return config


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
) -> tuple[PreTrainedModel, bool]:
    """The classifier, all of whose weights but those of the head come from the checkpoint; whether they do too."""
    with reading("init_from", source):
        model, info = AutoModelForImageClassification.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=recipe.trust_remote_code,
        )
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
    return model, keeps_head and not new


def _with_new_head(model: PreTrainedModel, head: set[str]) -> PreTrainedModel:
    """The model with the weights of the head drawn anew."""
    fresh = type(model)(model.config).state_dict()
    model.load_state_dict({name: fresh[name] for name in head}, strict=False)
    return model


__all__ = [
    "StartingPoint",
    "at_image_size",
    "check_fields",
    "check_saved_config",
    "default_batch_size",
    "label_fields",
    "make_config",
    "starting_point",
]
