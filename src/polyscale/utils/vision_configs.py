"""What can be known about a vision model from its configuration, whatever family that is."""

import json
from functools import lru_cache
from inspect import Parameter, signature

import torch
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from .validation import to_pair


def model_classes_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that `AutoModel` may give for a config; none where it knows none."""
    found = MODEL_MAPPING.get(type(config), None)
    return () if found is None else found if isinstance(found, tuple) else (found,)


def check_base(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that cannot be applied at several scales, with the reason."""
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"`vision_config` must be that of a vision model, got one of type {config.model_type!r}: give its "
            "`vision_config`, or the vision model inside (the `.tower` of a LLaVA's tower)."
        )
    missing = [name for model in model_classes_of(config)[:1] for name in _required_inputs(model)]
    if missing:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r} does not work at several scales: its model takes no plain "
            f"images, it needs {', '.join(f'`{name}`' for name in missing)} too. Of SigLIP2, the checkpoints of one "
            "resolution have the type 'siglip_vision_model'."
        )
    check_tokens_have_places(config, "`vision_config`")


def check_tokens_have_places(config: PreTrainedConfig, name: str) -> None:
    """Raises ValueError for a model whose tokens cannot be laid out as maps. `name` is what it is called there."""
    if hasattr(config, "feature_grid_for") and config.feature_grid_for() is None:
        raise ValueError(
            f"{name} of type {config.model_type!r} does not work at several scales: its tokens have no fixed "
            "place in the image, so they cannot be laid out as maps. Give a model with one token per patch."
        )


def _required_inputs(model_class: type[PreTrainedModel]) -> list[str]:
    """What the model's `forward` cannot do without, the images aside."""
    parameters = list(signature(model_class.forward).parameters.values())[1:]
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is Parameter.empty
        and parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        and parameter.name != model_class.main_input_name
    ]


def base_image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) of the images that the model was made for; None where its config does not say."""
    size = getattr(config, "image_size", None)
    return None if size is None else to_pair(tuple(size) if isinstance(size, (list, tuple)) else size, "image_size")


def base_width(config: PreTrainedConfig) -> int:
    """Channels of the model's last features."""
    widths = getattr(config, "hidden_sizes", None)
    width = widths[-1] if widths else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r} has no `hidden_size`: S2 cannot know the width of its "
            "features."
        )
    return width


def base_pooled_width(config: PreTrainedConfig) -> int:
    """Width of the model's `pooler_output`, or of what stands in for it."""
    for name in ("pooled_size", "pooler_output_size"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return base_width(config)


def base_num_layers(config: PreTrainedConfig) -> int:
    """Layers whose output is in `hidden_states`; one more comes before them."""
    if getattr(config, "num_hidden_layers", None) is not None:
        return config.num_hidden_layers
    return len(getattr(config, "hidden_sizes", None) or getattr(config, "depths", None) or [])


def base_stage_widths(config: PreTrainedConfig) -> list[int]:
    """Channels of each of the model's `hidden_states`."""
    widths = getattr(config, "hidden_sizes", None)
    if widths:
        return [widths[0], *widths]
    return [base_width(config)] * (base_num_layers(config) + 1)


def base_output_shape(config: PreTrainedConfig) -> str:
    """ "bchw" for a ConvNet, "bnc" for models with tokens."""
    is_convnet = getattr(config, "hidden_sizes", None) is not None and getattr(config, "hidden_size", None) is None
    return "bchw" if is_convnet else "bnc"


def base_num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Tokens in front of the model's output that have no place in the image: what is left of its tokens without the
    grid.

    Raises:
        ValueError: for a model whose tokens cannot be counted.
    """
    if isinstance(getattr(config, "num_prefix_tokens", None), int):
        return config.num_prefix_tokens
    size = base_image_size(config)
    grid = None if size is None else base_feature_grid(config, size)
    if grid is None or base_output_shape(config) == "bchw":
        return 0
    count = _count_output_tokens(type(config), config.to_json_string(use_diff=False), size) - grid[0] * grid[1]
    if count < 0:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r} gives fewer tokens than the {grid[0]} x {grid[1]} patches "
            "of its `image_size`: its tokens are no grid of patches."
        )
    return count


@lru_cache(maxsize=64)
def _count_output_tokens(config_class: type[PreTrainedConfig], settings: str, size: tuple[int, int]) -> int:
    """Tokens in the output of a model, prefix tokens among them; no weights and no values are made."""
    config = config_class.from_dict(json.loads(settings))
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        config.num_hidden_layers = 1  # every layer gives as many tokens as the first
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModel.from_config(config).eval()
            images = torch.zeros(1, getattr(config, "num_channels", 3), *size)
            return model(images, return_dict=True).last_hidden_state.shape[1]
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The prefix tokens (CLS, registers) of a model of type {config.model_type!r} cannot be counted from its "
            f"config ({error}): give `num_prefix_tokens`."
        ) from error


def base_feature_grid(config: PreTrainedConfig, tile: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of the model's features for a tile of (height, width) pixels; None where its config does
    not say.
    """
    if hasattr(config, "feature_grid_for"):
        return config.feature_grid_for(tile)
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    height, width = to_pair(tuple(patch) if isinstance(patch, (list, tuple)) else patch, "patch_size")
    if base_output_shape(config) == "bchw":
        reduction = 2 ** (len(config.hidden_sizes) - 1)
        height, width = height * reduction, width * reduction
    return tile[0] // height, tile[1] // width


__all__ = [
    "base_feature_grid",
    "base_image_size",
    "base_num_layers",
    "base_num_prefix_tokens",
    "base_output_shape",
    "base_pooled_width",
    "base_stage_widths",
    "base_width",
    "check_base",
    "check_tokens_have_places",
    "model_classes_of",
]
