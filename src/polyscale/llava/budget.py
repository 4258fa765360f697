"""The token budget of a LLaVA model with a tower of this library, changed later."""

from transformers import PreTrainedModel, ProcessorMixin

from ..layers.token_budget import TokenBudgetMixin
from .layout import token_layout
from .packed import PackedTower, PackedTowerConfig
from .swap import check_processor, inner_llava, matching_processor


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
    if not isinstance(old, TokenBudgetMixin):
        raise ValueError(
            f"The vision tower is a {old.model_type!r}, which has no token budget: put a tower of this library in its "
            "place with `swap_vision_tower`."
        )
    new = old.with_budget(**knobs)
    per_picture = new.tokens_vary
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

    for name in (*knobs, *old.changeable_fields):
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
