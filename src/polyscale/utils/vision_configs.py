"""What S2 has to know about the configuration of the model it wraps, whatever family that is."""

from transformers import PreTrainedConfig

from .validation import to_pair


# Model types of transformers whose output begins with CLS alone; DeiT and DINO have more, SigLIP and ConvNets none.
_ONE_PREFIX_TOKEN = (
    "beit",
    "clip_vision_model",
    "clipseg_vision_model",
    "data2vec-vision",
    "dinov2",
    "vit",
    "vit_msn",
)
_CLS_AND_REGISTERS = ("dinov2_with_registers", "dinov3_vit")
_UNSUPPORTED = {
    "siglip2_vision_model": "it takes patches of one native resolution, not pictures; the "
    "fixed-resolution SigLIP2 checkpoints have the "
    "type 'siglip_vision_model'",
    "vit_mae": "its encoder drops random patches",
    "s2_vision": "it has several scales already",
}


def check_base(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that S2 cannot wrap, with the reason."""
    if config.model_type in _UNSUPPORTED:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r} does not work at several scales: "
            f"{_UNSUPPORTED[config.model_type]}."
        )
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"`vision_config` must be that of a vision model, got one of type {config.model_type!r}: "
            "give its `vision_config`."
        )


def base_image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) of the pictures that the model was made for; None where its config does not say."""
    size = getattr(config, "image_size", None)
    return None if size is None else to_pair(tuple(size) if isinstance(size, (list, tuple)) else size, "image_size")


def base_width(config: PreTrainedConfig) -> int:
    """Channels of the model's last features."""
    widths = getattr(config, "hidden_sizes", None)
    width = widths[-1] if widths else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"`vision_config` of type {config.model_type!r} has no `hidden_size`: S2 cannot know the "
            "width of its features."
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
    """Tokens in front of the model's output that have no place in the picture."""
    if isinstance(getattr(config, "num_prefix_tokens", None), int):
        return config.num_prefix_tokens
    if config.model_type in _ONE_PREFIX_TOKEN:
        return 1
    if config.model_type in _CLS_AND_REGISTERS:
        return 1 + config.num_register_tokens
    return 2 if config.model_type == "deit" else 0


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
]
