"""Another vision tower for a LLaVA model in memory."""

from transformers import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .image_processors import resized, tower_image_processor
from .layout import TokenLayout, to_pair_of, token_layout
from .packed import PackedTower, PackedTowerConfig, PerPictureLlavaProcessor, has_tokens_per_picture
from .projector import fit_projector, num_feature_layers


_LLAVA = (LlavaForConditionalGeneration, LlavaModel)
_LLAVA_NEXT = (LlavaNextForConditionalGeneration, LlavaNextModel)


def inner_llava(llava_model: PreTrainedModel) -> PreTrainedModel:
    """The `LlavaModel` or `LlavaNextModel` with the tower in it.

    Raises:
        ValueError: for another model.
    """
    if not isinstance(llava_model, _LLAVA + _LLAVA_NEXT):
        raise ValueError(
            "`llava_model` must be a LlavaForConditionalGeneration or a LlavaNextForConditionalGeneration, got "
            f"{type(llava_model).__name__}."
        )
    return llava_model if hasattr(llava_model, "vision_tower") else llava_model.model


def _check_tower(tower: PreTrainedModel) -> None:
    expected = MODEL_MAPPING.get(type(getattr(tower, "config", None)), None)
    expected = expected if isinstance(expected, tuple) else (expected,)
    if type(tower) not in expected:
        names = " or ".join(option.__name__ for option in expected if option is not None)
        raise ValueError(
            f"`tower` must be {names or 'a model that AutoModel gives for its config'}, a model without "
            f"a head, got {type(tower).__name__}."
        )
    if getattr(tower.config, "output_shape", "bnc") == "bchw":
        raise ValueError("`tower` gives feature maps (a ConvNet); LLaVA needs tokens.")


def _layer_is_usable(config: PreTrainedConfig, layer: int) -> bool:
    """Whether `hidden_states[layer]` exists, and has the tower's width and prefix tokens."""
    count = config.num_hidden_layers + 1
    if not -count <= layer < count:
        return False
    widths = getattr(config, "widths", None)
    if widths is None:
        return True
    after = layer % count - 1  # the layer whose output it is; -1: what goes into the first
    has_cls = config.cls_token_layer is None or after >= config.cls_token_layer
    return after >= 0 and widths[after] == config.hidden_size and has_cls


def _feature_layer(
    config: PreTrainedConfig, wanted: int | list[int] | None, current: int | list[int]
) -> int | list[int]:
    """The layer or layers that LLaVA reads: those asked for, else the model's own if the tower has them, else the
    last.
    """
    layer = current if wanted is None else wanted
    layers = [layer] if isinstance(layer, int) else layer
    inner = config.vision_config if isinstance(config, PackedTowerConfig) else config
    if all(_layer_is_usable(inner, index) for index in layers):
        return layer
    if wanted is not None:
        raise ValueError(
            f"`vision_feature_layer` {wanted!r} does not exist in the tower, or has another width than "
            "its last layer: it has "
            f"{config.num_hidden_layers} layers of {config.model_type!r}."
        )
    return -1


def check_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Raises ValueError for a processor that does not belong to a model with this config."""
    missing = [name for name in ("tokenizer", "image_processor") if getattr(processor, name, None) is None]
    if missing:
        raise ValueError(
            f"`processor` must be a processor with a tokenizer and an image processor, it has no {missing[0]}."
        )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            "`processor` does not belong to this model: its image token has the id "
            f"{processor.image_token_id}, the model's is "
            f"{config.image_token_id}."
        )


def matching_processor(
    processor: ProcessorMixin,
    config: PreTrainedConfig,
    image_processor: BaseImageProcessor | None = None,
    fit: str | None = None,
) -> ProcessorMixin:
    """A processor like `processor` for a LLaVA model with this config (its tower's among it).

    Raises:
        ValueError: if the image processor and the tower do not fit together.
    """
    tower = config.vision_config
    layout = token_layout(tower)
    shared = {
        "tokenizer": processor.tokenizer,
        "chat_template": processor.chat_template,
        "image_token": processor.image_token,
    }
    if config.model_type == "llava_next":
        return _next_processor(processor, config, layout, image_processor, shared)
    image_processor = tower_image_processor(tower, layout, processor.image_processor, image_processor, fit)
    if isinstance(tower, PackedTowerConfig):
        return PerPictureLlavaProcessor(
            image_processor, patch_size=tower.patch_size, quadtree=_quadtree_settings(tower.vision_config), **shared
        )
    return LlavaProcessor(image_processor, **layout.processor_settings, **shared)


def _quadtree_settings(config: PreTrainedConfig) -> dict | None:
    if config.model_type != "quadtree_vit":
        return None
    if config.patch_scorer != "pixel_blur":
        raise ValueError(
            "`split_threshold` in a LLaVA model needs `patch_scorer='pixel_blur'`, got "
            f"{config.patch_scorer!r}: the processor has to count the "
            "tokens of a picture, and has no network to score it with."
        )
    names = ("min_patch_size", "max_patch_size", "split_threshold", "num_tokens")
    return {name: getattr(config, name) for name in names}


def _check_next(layout: TokenLayout, tower: PreTrainedConfig) -> None:
    """LLaVA-NeXT puts the tokens of its tiles together to one grid, and takes that grid from `image_size //
    patch_size`.
    """
    size = getattr(tower, "image_size", None)
    patch = getattr(tower, "patch_size", None)
    side = size // patch if isinstance(size, int) and isinstance(patch, int) else None
    if layout.grid is None or layout.grid != (side, side) or layout.num_prefix_tokens > 1:
        raise ValueError(
            f"`tower` of type {tower.model_type!r} cannot be in a LLaVA-NeXT model: that needs a square "
            "grid of tokens of an int `image_size` and "
            f"`patch_size`, and at most one prefix token; got {layout.num_tokens} tokens, the grid "
            f"{layout.grid}, `image_size` {size!r}, `patch_size` "
            f"{patch!r} and {layout.num_prefix_tokens} prefix tokens. A LlavaForConditionalGeneration takes it."
        )


def _scaled_pinpoints(pinpoints: list, old: int, new: int) -> list[list[int]]:
    """The picture sizes that LLaVA-NeXT may cut into tiles, for tiles of another size."""
    return [[height // old * new, width // old * new] for height, width in pinpoints]


def _next_processor(processor, config, layout: TokenLayout, image_processor, shared: dict) -> ProcessorMixin:
    own = image_processor or processor.image_processor
    own = resized(own, layout.image_size, image_grid_pinpoints=config.image_grid_pinpoints)
    own.size = type(own.size)(shortest_edge=layout.image_size[0])
    return type(processor)(own, **layout.processor_settings, **shared)


def swap_vision_tower(
    llava_model: PreTrainedModel,
    tower: PreTrainedModel,
    processor: ProcessorMixin | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    fit: str | None = None,
    vision_feature_layer: int | list[int] | None = None,
) -> ProcessorMixin | None:
    """Puts another vision tower into a LLaVA model, in place, and returns the processor that matches.

    The projector is kept where the widths agree. For an S2 tower around a model as wide as the old tower it is
    widened: it reads the first scale as before, and the others with weights of zero, so that nothing changes until
        it is trained. Otherwise it is new, with a warning.

    Args:
        llava_model: a `LlavaForConditionalGeneration`, or a `LlavaNextForConditionalGeneration` where the tower's
            tokens are a square grid.
        tower: an S2VisionWrapper, FlexiViTModel, QuadtreeViTModel, SparseFormerModel or another vision model without
            a head. Its config says how many tokens it gives (`patch_size`, `num_tokens`, ...).
            `S2VisionWrapper.from_vision_model(llava_model.model.vision_tower, scales=[1, 2, 3])` is S2 around the
            model's own tower.
        processor: the model's processor; without it, none is returned.
        image_processor: of the tower; made from the tower's own, or for S2 from that of `processor`, when None.
        fit: of an S2 tower, how pictures become squares: "squash", "crop" or "pad"; as the processor did when None.
        vision_feature_layer: the layer or layers of the tower that are read; the model's own when the tower has it,
            else the last.

    Returns:
        A processor with the same tokenizer, which saves and reloads with `AutoProcessor`; None without `processor`.

    Raises:
        ValueError: for another kind of model, a tower with a head, tokens that cannot be counted, or a processor
            that does not belong to the model. The model is unchanged then.

    Example:

    ```python
    >>> tower = polyscale.S2VisionWrapper.from_vision_model(model.model.vision_tower, scales=[1, 2, 3])
    >>> processor = polyscale.swap_vision_tower(model, tower, processor)
    ```
    """
    llava = inner_llava(llava_model)
    config = llava_model.config
    _check_tower(tower)
    if processor is not None:
        check_processor(processor, config)
    old_config, old_layer = config.vision_config, config.vision_feature_layer
    if getattr(tower.config, "train_patch_sizes", None) is not None:
        raise ValueError(
            "`tower` draws its patch size in training (`train_patch_sizes`), so that its tokens cannot "
            "be counted: set `tower.config.train_patch_sizes` "
            "and `train_patch_size_probs` to None."
        )
    if tower.config.model_type == "flexivit" and tower.config.patch_size is None:
        tower.config.patch_size = tower.config.base_patch_size
    if has_tokens_per_picture(tower.config):
        tower = PackedTower.around(tower)
    layout = token_layout(tower.config)
    layer = _feature_layer(tower.config, vision_feature_layer, old_layer)
    if isinstance(llava_model, _LLAVA_NEXT):
        _check_next(layout, tower.config)

    new_config = type(config).from_dict(config.to_dict())
    new_config.vision_config = tower.config
    if isinstance(llava_model, _LLAVA_NEXT):
        old_size, new_size = to_pair_of(old_config.image_size)[0], layout.image_size[0]
        new_config.image_grid_pinpoints = _scaled_pinpoints(config.image_grid_pinpoints, old_size, new_size)
    new_processor = None
    if processor is not None:
        new_processor = matching_processor(processor, new_config, image_processor, fit)

    config.vision_config = tower.config
    config.vision_feature_layer = layer
    config.vision_feature_select_strategy = layout.select_strategy
    if layout.image_seq_length is not None:
        config.image_seq_length = layout.image_seq_length
    if isinstance(llava_model, _LLAVA_NEXT):
        config.image_grid_pinpoints = new_config.image_grid_pinpoints
    llava.config = config
    weight = llava.multi_modal_projector.linear_1.weight
    was_training = llava.vision_tower.training
    llava.vision_tower = tower.to(device=weight.device, dtype=weight.dtype).train(was_training)
    fit_projector(llava, old_config, num_feature_layers(layer), num_feature_layers(old_layer))
    return new_processor


__all__ = ["check_processor", "inner_llava", "matching_processor", "swap_vision_tower"]
