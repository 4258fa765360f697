"""Another vision tower for a LLaVA model in memory, and another token budget for the tower."""

import copy
import warnings
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from ..layers.attention import attention_name, set_attention_name
from ..layers.config_checks import CheckedConfigMixin
from ..layers.token_budget import TokenBudgetMixin
from ..layers.token_merging import merges_by_attention
from ..layers.wrapping import attention_kept, check_has_no_head
from ..utils.validation import check_flag, shown
from ..utils.vision_configs import base_output_shape
from .adapters import LlavaAdapter, tile_side
from .downsampled import DownsampledTowerConfig
from .hosts import adapter_of
from .layout import TokenLayout, token_layout
from .packed import PackedTower, PackedTowerConfig, inner_config
from .projector import fitted_projector, num_feature_layers, share_weights


def _check_tower(tower: PreTrainedModel) -> None:
    check_has_no_head(tower, "tower")
    config = tower.config
    if getattr(config, "output_shape", base_output_shape(config)) == "bchw":
        raise ValueError(f"`tower` of type {config.model_type!r} gives feature maps (a ConvNet); LLaVA needs tokens.")
    if isinstance(config, CheckedConfigMixin):  # it may have been changed since it was made
        config.check_fit()
    if merges_by_attention(config):
        raise ValueError(
            "`tower` merges tokens (`apply_token_merging`), which its config does not say, so that its host could not "
            "count them: take that back with `remove_token_merging`. A FlexiViT or Quadtree ViT merges by its config, "
            "`merge_tokens_to`."
        )


def _feature_layer(
    tower: PreTrainedConfig, wanted: int | list[int] | None, current: int | list[int]
) -> int | list[int]:
    """The layer or layers that LLaVA reads: those asked for, else the model's own if the tower has them, else the
    last.
    """
    inner = inner_config(tower)
    count = inner.num_hidden_layers + 1

    def is_usable(layer: int) -> bool:
        return inner.gives_tokens_at(layer) if isinstance(inner, TokenBudgetMixin) else -count <= layer < count

    chosen = current if wanted is None else wanted
    if all(is_usable(layer) for layer in ([chosen] if isinstance(chosen, int) else chosen)):
        return chosen
    if wanted is not None:
        raise ValueError(
            f"`vision_feature_layer` {wanted!r} does not exist in the tower, or has another width than its last "
            f"layer: it has {inner.num_hidden_layers} layers of {inner.model_type!r}."
        )
    return -1


def _checked_layers(layers: int | list[int] | None) -> int | list[int] | None:
    """What a user gives as `vision_feature_layer`; raises ValueError for anything but an int or several."""
    several = layers if isinstance(layers, list | tuple) else [0 if layers is None else layers]
    if not several or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in several):
        raise ValueError(f"`vision_feature_layer` must be an int, a list of ints or None, got {shown(layers)}.")
    return list(layers) if isinstance(layers, tuple) else layers


def check_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Raises ValueError for a processor that does not belong to a model with this config."""
    missing = [name for name in ("tokenizer", "image_processor") if getattr(processor, name, None) is None]
    if missing:
        raise ValueError(
            f"`processor` must be a processor with a tokenizer and an image processor, it has no {missing[0]}."
        )
    own = processor.image_token_ids[0]
    if own != config.image_token_id:
        raise ValueError(
            f"`processor` does not belong to this model: its image token has the id {own}, the model's is "
            f"{config.image_token_id}."
        )


def _hosted(
    config: PreTrainedConfig, adapter: LlavaAdapter, host: PreTrainedConfig, layer: int | list[int]
) -> tuple[PreTrainedConfig, list[str]]:
    """The config of a tower as the host sees it, and what changed in it.

    Args:
        config: of the tower.
        adapter: of the host.
        host: its config.
        layer: what it reads.
    """
    if not isinstance(config, TokenBudgetMixin):
        return config, []
    if getattr(config, "merge_tokens_to", None) is not None:
        config = copy.deepcopy(config)
        config.merge_layers = _merging_layers(config, layer)
    hosted, notes = config.hosted()
    return PackedTowerConfig(vision_config=hosted, **adapter.packed_fields(host)), notes


def _merging_layers(config: PreTrainedConfig, layer: int | list[int]) -> int:
    """How many layers of a tower may merge tokens, so that all is merged in those that are read.

    Raises:
        ValueError: where what goes into the first layer is read.
    """
    count = config.num_hidden_layers
    first = min(index % (count + 1) for index in ([layer] if isinstance(layer, int) else layer))
    if first == 0:
        raise ValueError(
            f"`vision_feature_layer` {layer} reads what goes into the first layer, where no token is merged yet; "
            f"`tower` has `merge_tokens_to={config.merge_tokens_to}`."
        )
    return first if config.merge_layers is None else min(first, config.merge_layers)


@dataclass
class _Plan:
    """All that changes in a model: made without touching it."""

    adapter: LlavaAdapter
    layout: TokenLayout
    config: PreTrainedConfig
    fields: dict[str, object]
    tower_fields: dict[str, object]


def _plan(
    adapter: LlavaAdapter, config: PreTrainedConfig, tower: PreTrainedConfig, layer: int | list[int], old_size: int
) -> _Plan:
    """The config of the host with another tower.

    Raises:
        ValueError: for a tower that does not fit.
    """
    layout = token_layout(tower)
    adapter.check_layout(config, tower, layout)
    tower_fields = adapter.tower_fields(config, tower)
    if tower_fields:
        tower = copy.deepcopy(tower)
        for name, value in tower_fields.items():
            setattr(tower, name, value)
    fields = adapter.host_fields(config, tower, layout, old_size)
    if adapter.reads_layers:
        fields["vision_feature_layer"] = layer
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return _Plan(adapter, layout, changed, fields, tower_fields)


def set_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Puts a changed config into a model in memory, and those of the models inside it."""
    replaced = {id(old): new}
    for name in old.sub_configs:
        if isinstance(getattr(old, name, None), PreTrainedConfig):
            replaced[id(getattr(old, name))] = getattr(new, name)
    attention = attention_name(old)
    for module in model.modules():
        config = getattr(module, "config", None)
        if id(config) in replaced:
            module.config = replaced[id(config)]
    set_attention_name(new, attention)


def _commit(llava: PreTrainedModel, config: PreTrainedConfig, plan: _Plan, tower: nn.Module) -> None:
    for name, value in plan.fields.items():
        setattr(config, name, value)
    for name, value in plan.tower_fields.items():
        setattr(tower.config, name, value)
    config.vision_config = tower.config
    llava.config = config
    llava.vision_tower = tower


def swap_vision_tower(
    llava_model: PreTrainedModel,
    tower: PreTrainedModel,
    processor: ProcessorMixin | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    fit: str | None = None,
    vision_feature_layer: int | list[int] | None = None,
    keep_projector: bool | None = None,
) -> ProcessorMixin | None:
    """Puts another vision tower into a LLaVA model, in place, and returns the processor that matches.

    The projector is kept where the tower was made of the model's own and is as wide. For an S2 tower around the
    model's own tower it is widened: it reads the first scale as before, and the others with weights of zero, so that
    nothing changes until it is trained. Otherwise it is new, with a warning.

    A tower of this library stands inside of a `PackedTower`, `model.model.vision_tower`, which gives the host its
    tokens without prefix tokens, at the budget that the processor wrote into `image_sizes`.

    Args:
        llava_model (`PreTrainedModel`): a LLaVA, LLaVA-NeXT, LLaVA-OneVision, VipLLaVA, PaliGemma or Gemma 3 model.
        tower (`PreTrainedModel`): an S2VisionWrapper, FlexiViTModel, QuadtreeViTModel, SparseFormerModel or another
            vision model without a head. Its config says how many tokens it gives (`patch_size`, `num_tokens`, ...). Of
            a `PackedTower` the tower inside is taken.
            `S2VisionWrapper.from_vision_model(llava_model.model.vision_tower, scales=[1, 2, 3])` is S2 around the
            model's own tower.
        processor (`ProcessorMixin`, *optional*): the model's processor; without it, none is returned.
        image_processor (`BaseImageProcessor`, *optional*): of the tower; made from the tower's own, or for S2 from
            that of `processor`, when `None`.
        fit (`str`, *optional*): of an S2 tower, how images become squares: "squash", "crop" or "pad"; as the
            processor did when `None`.
        vision_feature_layer (`int` or `list[int]`, *optional*): the layer or layers of the tower that are read; the
            model's own when the tower has it, else the last. None for PaliGemma and Gemma 3, which read the last.
        keep_projector (`bool`, *optional*): whether the projector is kept; where the tower holds the weights of the
            model's own tower (S2 around it, or a conversion of it) when `None`.

    Returns:
        `ProcessorMixin`: one with the same tokenizer, which saves and reloads with `AutoProcessor`, and takes the
            budget of the tower in its call; `None` without `processor`.

    Raises:
        ValueError: for another kind of model, a tower with a head, tokens that cannot be counted, or a processor
            that does not belong to the model. Nothing is changed then.

    Example:

    ```python
    >>> tower = polyscale.S2VisionWrapper.from_vision_model(model.model.vision_tower, scales=[1, 2, 3])
    >>> processor = polyscale.swap_vision_tower(model, tower, processor)
    ```
    """
    adapter = adapter_of(llava_model)
    llava = adapter.inner(llava_model)
    config = llava_model.config
    if isinstance(tower, PackedTower):  # of another model, or of this one
        tower = tower.tower
    _check_tower(tower)
    vision_feature_layer = _checked_layers(vision_feature_layer)
    if keep_projector is not None:
        check_flag("keep_projector", keep_projector)
    if image_processor is not None and not isinstance(image_processor, BaseImageProcessor):
        raise ValueError(f"`image_processor` must be an image processor or None, got {shown(image_processor)}.")
    if vision_feature_layer is not None and not adapter.reads_layers:
        raise ValueError(
            f"`vision_feature_layer` must be None for a {adapter.name} model, which reads what its tower gives last; "
            f"got {vision_feature_layer!r}."
        )
    if processor is not None:
        check_processor(processor, config)
    with attention_kept(tower):
        old_layer = adapter.feature_layer(config)
        layer = _feature_layer(tower.config, vision_feature_layer, old_layer)
        outer, notes = _hosted(tower.config, adapter, config, layer)
        plan = _plan(adapter, config, outer, layer, tile_side(config.vision_config))
        new_processor = None
        if processor is not None:
            own = adapter.image_processor(processor, plan.config, plan.layout, image_processor, fit)
            new_processor = adapter.make_processor(processor, plan.config, plan.layout, own)
        old = inner_config(config.vision_config)
        # A projector that was trained on tokens brought together has no use for others, and the other way round.
        is_alike = isinstance(old, DownsampledTowerConfig) == isinstance(tower.config, DownsampledTowerConfig)
        related = is_alike and share_weights(llava.vision_tower, tower)
        scales = 1 if hasattr(old, "num_scales") else getattr(tower.config, "num_scales", 1)
        reads = adapter.projector_input(llava.multi_modal_projector)
        layers = {"layers": num_feature_layers(layer), "old_layers": num_feature_layers(old_layer)}
        projector = fitted_projector(llava, plan.config, keep_projector, related, scales, **layers, reads=reads)

    for note in notes:
        warnings.warn(f"`tower` in its host: {note}", stacklevel=2)
    if isinstance(outer, PackedTowerConfig):
        set_config(tower, tower.config, outer.vision_config)
        tower = PackedTower.around(tower, **adapter.packed_fields(config))
    weight = reads.weight
    tower = tower.to(device=weight.device, dtype=weight.dtype).train(llava.vision_tower.training)
    tower.config.dtype = weight.dtype
    _commit(llava, config, plan, tower)
    if isinstance(projector, dict):
        for name, module in projector.items():
            setattr(llava.multi_modal_projector, name, module)
    else:
        llava.multi_modal_projector = projector
    adapter.fit_projector(llava.multi_modal_projector, config)
    return new_processor


def set_token_budget(llava_model: PreTrainedModel, processor: ProcessorMixin, **budget) -> ProcessorMixin:
    """Changes how many tokens an image costs in a LLaVA model, in the model (in place) and in its processor.

    For one call alone, give the budget to the processor: `processor(images, text, num_tokens=100)`.

    Args:
        llava_model (`PreTrainedModel`): a LLaVA model with a tower of this library: see `swap_vision_tower`.
        processor (`ProcessorMixin`): its processor; it is changed in place where it stays of the same kind.
        budget: of a FlexiViT `patch_size` or `num_tokens` (the nearest that a patch size gives), and `image_size`; of
            a Quadtree ViT `num_tokens` or `split_threshold`, and `image_size`; of S2 `scales` or `img_sizes` (as
            many as before), `num_tiles`, and `max_tiles`; of a SparseFormer `image_size`. In a Gemma 3 also
            `mm_tokens_per_image`, a square number: how many tokens the language model gets of those of the tower.

    Returns:
        `ProcessorMixin`: the one to use from now on: `processor` itself, unless it was none of `swap_vision_tower`.

    Raises:
        ValueError: for what cannot change without new weights (with the reason), or a value that the tower refuses.
            Nothing is changed then.

    Example:

    ```python
    >>> processor = polyscale.set_token_budget(model, processor, num_tokens=144)
    ```
    """
    adapter = adapter_of(llava_model)
    llava = adapter.inner(llava_model)
    config = llava_model.config
    check_processor(processor, config)
    old = inner_config(config.vision_config)
    if not isinstance(old, TokenBudgetMixin):
        raise ValueError(
            f"The vision tower is a {old.model_type!r}, which has no token budget: put a tower of this library in its "
            "place with `swap_vision_tower`."
        )
    host_budget = {name: budget.pop(name) for name in adapter.host_knobs if name in budget}
    wanted = adapter.with_knobs(config, host_budget)
    new = old if host_budget and not budget else old.with_budget(**budget)
    layer = adapter.feature_layer(config)
    outer, _ = _hosted(new, adapter, wanted, layer)
    plan = _plan(adapter, wanted, outer, layer, tile_side(config.vision_config))
    own = adapter.resized_image_processor(processor, plan.config, plan.layout)
    new_processor = adapter.make_processor(processor, plan.config, plan.layout, own)

    tower = llava.vision_tower
    inside = tower.tower if isinstance(tower, PackedTower) else tower
    set_config(inside, old, outer.vision_config)
    packed = PackedTower.around(inside, **adapter.packed_fields(wanted))
    _commit(llava, config, plan, packed.train(tower.training))
    adapter.fit_projector(llava.multi_modal_projector, config)
    if type(processor) is not type(new_processor):
        return new_processor
    processor.__dict__.update(new_processor.__dict__)
    return processor


__all__ = ["check_processor", "set_config", "set_token_budget", "swap_vision_tower"]
