"""The config that a run trains: of a family, or of a checkpoint with some fields changed."""

import difflib
from collections.abc import Mapping, Sequence

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedConfig

from ..layers.config_checks import field_names
from ..models.auto import families, family_of
from .recipe import TrainingRecipe


def as_pair(size) -> tuple[int, int]:
    """(height, width) of an int or a pair."""
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def label_fields(label_names: Sequence[str]) -> dict:
    """Fields of a config that name its classes, of which an image has one, whatever a checkpoint was made for."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": None,
    }


def make_config(recipe: TrainingRecipe, options: Mapping, base: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """The config of a recipe: of its family, or the one of a checkpoint with some fields changed.

    Raises:
        ValueError: for an unknown family, preset or field, or a value that the config refuses.
    """
    family = family_of(base or recipe.family)
    if base is None and (recipe.family not in CONFIG_MAPPING or (family and family.classifier_class is None)):
        raise unknown_family(recipe.family)
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
        known = {name: value for name, value in sizes.items() if name in field_names(config_class)}
        if recipe.preset is not None:
            if not hasattr(config_class, "preset"):
                raise ValueError(f"`family` {recipe.family!r} has no presets.")
            return config_class.preset(recipe.preset, **{**known, **options})
        return config_class(**{**known, **options})
    except (StrictDataclassError, ValueError, TypeError) as error:
        # `preset` calls its argument a name
        raise ValueError(f"The model cannot be made: {innermost(error).replace('`name`', '`preset`')}") from error


def innermost(error: BaseException) -> str:
    """What a config said, without the validators that it went through."""
    while isinstance(error.__cause__, ValueError | TypeError):
        error = error.__cause__
    return " ".join(str(error).split())


def unknown_family(name: str) -> ValueError:
    ours = sorted(name for name, known in families().items() if known.classifier_class is not None)
    return ValueError(
        f"`family` must be a model type with an image classifier: {', '.join(ours)}, or one of transformers; got "
        f"{name!r}."
    )


def check_fields(config_class: type[PreTrainedConfig], options: Mapping) -> None:
    """Refuses names that are no fields of a config.

    Raises:
        ValueError: naming the nearest field.
    """
    labels = ("num_labels", "id2label", "label2id", "problem_type")
    known = {*field_names(config_class), *config_class.attribute_map, *labels}
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
        raise ValueError(f"The model's config is not legal: {innermost(error)}") from error


def at_image_size(config: PreTrainedConfig, recipe: TrainingRecipe) -> PreTrainedConfig:
    """The config for images of the recipe's size.

    Raises:
        ValueError: if the model takes no other size than its own.
    """
    own = getattr(config, "image_size", None)
    if own is None or as_pair(own) == tuple(recipe.image_size):
        return config
    if "image_size" in getattr(config, "changeable_fields", ()):
        height, width = recipe.image_size
        return config.with_budget(image_size=height if height == width else [height, width])
    if family_of(config) is None:
        raise ValueError(f"`image_size` must be that of the checkpoint, {own}, got {recipe.image_size}.")
    return config


__all__ = [
    "as_pair",
    "at_image_size",
    "check_fields",
    "check_saved_config",
    "innermost",
    "label_fields",
    "make_config",
    "unknown_family",
]
