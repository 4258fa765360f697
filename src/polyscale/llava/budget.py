"""The token budget of a LLaVA model with a tower of this library, changed later."""

import copy

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .layout import token_layout
from .packed import PackedTower, PackedTowerConfig, has_tokens_per_picture
from .swap import check_processor, inner_llava, matching_processor


_KNOBS = {
    "flexivit": ("patch_size", "num_tokens", "image_size"),
    "quadtree_vit": ("num_tokens", "split_threshold", "image_size"),
    "s2_vision": ("scales", "img_sizes", "max_tiles"),
    "sparseformer": ("image_size",),
}
_WHY_NOT = {
    "sparseformer": "its tokens are weights (one latent token each), so another number of them needs new weights",
    "s2_vision": "its tokens are those of the wrapped model at one scale, whatever the other scales are",
}


def _check_knobs(config: PreTrainedConfig, knobs: dict) -> None:
    legal = _KNOBS.get(config.model_type)
    if legal is None:
        raise ValueError(
            f"The vision tower is a {config.model_type!r}, which has no token budget: put a tower of "
            "this library in its place with "
            "`swap_vision_tower`."
        )
    if not knobs:
        raise ValueError(f"Give at least one of {', '.join(f'`{name}`' for name in legal)}.")
    for name in knobs:
        if name not in legal:
            reason = (
                f": {_WHY_NOT[config.model_type]}" if name == "num_tokens" and config.model_type in _WHY_NOT else ""
            )
            raise ValueError(
                f"`{name}` cannot change in a tower of type {config.model_type!r}{reason}. What can: "
                f"{', '.join(legal)}."
            )


def _changed(config: PreTrainedConfig, knobs: dict) -> PreTrainedConfig:
    """A checked copy of a tower's config with other knobs.

    Raises:
        ValueError: for values that the config refuses.
    """
    fields = dict(knobs)
    if config.model_type == "flexivit" and "num_tokens" in fields:
        if "patch_size" in fields:
            raise ValueError("Give either `patch_size` or `num_tokens`, not both: each gives the other.")
        image_size = fields.get("image_size", config.image_size)
        fields["patch_size"] = config.patch_size_for(image_size, fields.pop("num_tokens"))
    if config.model_type == "s2_vision":
        _check_s2(config, fields)
    if config.model_type == "quadtree_vit" and "num_tokens" in fields and "split_threshold" not in fields:
        fields["split_threshold"] = None
    if config.model_type == "quadtree_vit" and "image_size" in fields:
        config.num_tokens_range(fields["image_size"])  # a size that no quadtree has is refused
    new = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(new, name, value)
    type(config).from_dict(new.to_dict())  # runs the config's own checks
    return new


def _check_s2(config: PreTrainedConfig, fields: dict) -> None:
    if "scales" in fields and "img_sizes" in fields:
        raise ValueError("Give either `scales` or `img_sizes`, not both.")
    for name, other in (("scales", "img_sizes"), ("img_sizes", "scales")):
        if name not in fields:
            continue
        if len(fields[name]) != config.num_scales:
            raise ValueError(
                f"`{name}` must name {config.num_scales} scales, as many as the projector's weights were "
                f"made for, got {len(fields[name])}: "
                "another number of scales needs new weights."
            )
        fields[name] = list(fields[name])
        fields[other] = None
        return


def set_token_budget(llava_model: PreTrainedModel, processor: ProcessorMixin, **knobs) -> ProcessorMixin:
    """Changes how many tokens a picture costs in a LLaVA model, in the model (in place) and in its processor.

    Args:
        llava_model: a LLaVA model with a tower of this library: see `swap_vision_tower`.
        processor: its processor; it is changed in place where it stays of the same kind.
        knobs: of a FlexiViT `patch_size` or `num_tokens` (the nearest that a patch size gives), and `image_size`; of
            a Quadtree ViT `num_tokens` or `split_threshold`, and `image_size`; of S2 `scales` or `img_sizes` (as
            many as before), and `max_tiles`; of a SparseFormer `image_size`.

    Returns:
        The processor to use from now on: `processor` itself, unless the tower changed between a fixed number of
            tokens and one a picture.

    Raises:
        ValueError: for what cannot change without new weights (with the reason), or a value that the tower refuses.
            Nothing is changed then.

    Example:

    ```python
    >>> processor = polyscale.set_token_budget(model, processor, num_tokens=144)
    ```
    """
    llava = inner_llava(llava_model)
    config = llava_model.config
    check_processor(processor, config)
    packed = isinstance(config.vision_config, PackedTowerConfig)
    old = config.vision_config.vision_config if packed else config.vision_config
    _check_knobs(old, knobs)
    new = _changed(old, knobs)
    per_picture = has_tokens_per_picture(new)
    if config.model_type == "llava_next" and (per_picture or "image_size" in knobs):
        raise ValueError("A LLaVA-NeXT model needs a fixed grid of tokens and a fixed picture size.")

    trial = type(config).from_dict(config.to_dict())
    trial.vision_config = PackedTowerConfig(vision_config=new) if per_picture else new
    layout = token_layout(trial.vision_config)
    new_processor = matching_processor(
        processor,
        trial,
        fit=getattr(processor.image_processor, "fit", None) if new.model_type == "s2_vision" else None,
    )

    for name in (*knobs, *_KNOBS[old.model_type]):
        if hasattr(new, name) and name in old.__dict__:
            setattr(old, name, new.__dict__[name])
    tower = llava.vision_tower.tower if isinstance(llava.vision_tower, PackedTower) else llava.vision_tower
    llava.vision_tower = PackedTower.around(tower) if per_picture else tower
    config.vision_config = llava.vision_tower.config
    config.vision_feature_select_strategy = layout.select_strategy
    if layout.image_seq_length is not None:
        config.image_seq_length = layout.image_seq_length
    if type(processor) is not type(new_processor):
        return new_processor
    processor.__dict__.update(new_processor.__dict__)
    return processor


__all__ = ["set_token_budget"]
