"""Token merging in the Vision Transformers of transformers, without new weights: `apply_token_merging`.

The layers of a model merge tokens after they have run (`polyscale.layers.token_merging`), on the keys of their own
attention, and attention counts each token by its size. The model keeps its class, its weights and their names.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers.attention import attention_name, eager_attention_forward
from .layers.token_budget import TokenBudgetMixin
from .layers.token_merging import MERGING_ATTENTION, MERGING_WORD, merge_schedule, merge_tokens, size_bias
from .utils.vision_configs import base_num_prefix_tokens


_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass
class _Merging:
    """How far a forward pass has come: shared by the layers of one model, reset by the first of them."""

    num_tokens: int
    num_layers: int
    num_prefix_tokens: int
    schedule: list[int] = field(default_factory=list)
    sizes: torch.Tensor | None = None
    keys: torch.Tensor | None = None  # of the layer that ran last, averaged over the heads


def _recording_keys(attention: Callable) -> Callable:
    """An attention function of transformers that remembers its keys where its module merges tokens."""

    def attend(module, query, key, *args, **kwargs):
        module.merging.keys = key.mean(dim=1)  # (batch, tokens, head width)
        return attention(module, query, key, *args, **kwargs)

    return attend


def _register() -> None:
    """Makes the attention functions known to transformers, by its own interfaces for that."""
    for name in _IMPLEMENTATIONS:
        attention = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(MERGING_ATTENTION + name, _recording_keys(attention))
        AttentionMaskInterface.register(MERGING_ATTENTION + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


class _MergingLayer:
    """Goes before the class of a layer: merges what the layer gives, outside of gradient checkpointing."""

    merging: _Merging
    place: int

    def __reduce__(self):
        return _new_layer, (_plain_class(self),), self.__dict__

    def __call__(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        merging = self.merging
        if self.place == 0:
            num_patches = hidden_states.shape[1] - merging.num_prefix_tokens
            merging.schedule = merge_schedule(num_patches, merging.num_tokens, merging.num_layers)
            merging.sizes = None
        if merging.sizes is not None:
            bias = size_bias(merging.sizes, hidden_states.dtype)
            attention_mask = bias if attention_mask is None else attention_mask + bias
        hidden_states = super().__call__(hidden_states, attention_mask, **kwargs)
        count = merging.schedule[self.place]
        if count:
            hidden_states, merging.sizes = merge_tokens(
                hidden_states, merging.keys, count, merging.sizes, merging.num_prefix_tokens
            )
        merging.keys = None
        return hidden_states


def _merging_class(layer_class: type) -> type:
    return type(layer_class.__name__, (_MergingLayer, layer_class), {})


def _plain_class(layer: _MergingLayer) -> type:
    """The class that the layer had before."""
    return type(layer).__mro__[2]


def _new_layer(layer_class: type) -> nn.Module:
    """A layer without its state, for copies and pickles: these look classes up by name, where no merging class is."""
    merging_class = _merging_class(layer_class)
    return merging_class.__new__(merging_class)


def _attention_of(layer: nn.Module) -> nn.Module | None:
    return next((part for part in layer.children() if hasattr(part, "q_proj") and hasattr(part, "k_proj")), None)


def _is_encoder(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(layer, GradientCheckpointingLayer) and _attention_of(layer) is not None for layer in module)
    )


def _encoder_layers(model: nn.Module) -> nn.ModuleList:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` must be a vision model of transformers, got {type(model).__name__}.")
    encoders = [module for module in model.modules() if _is_encoder(module)]
    if len(encoders) != 1:
        raise ValueError(
            f"`model` must be a Vision Transformer with one encoder, such as ViT, DeiT, DINOv2 or the vision part of "
            f"CLIP or SigLIP; {type(model).__name__} has {len(encoders)}. Of a model with text too, give its "
            "`vision_model`."
        )
    return encoders[0]


def _check_mergeable(model: PreTrainedModel, layer: nn.Module) -> None:
    """Refuses models whose layers would read something of each patch that a merged token has not.

    Raises:
        ValueError: naming it.
    """
    arguments = inspect.signature(type(layer).forward).parameters
    problem = None
    if model.main_input_name != "pixel_values":
        problem = f"it takes `{model.main_input_name}`, not images"
    elif "position_embeddings" in arguments:
        problem = "its layers rotate queries and keys by the positions of the patches"
    elif any("relative_position" in name for name, _ in model.named_parameters()):
        problem = "its layers add a bias for the relative positions of the patches"
    elif "attention_mask" not in arguments:
        problem = "its layers take no mask, by which tokens count more or less"
    if problem is not None:
        raise ValueError(
            f"`model` must be a Vision Transformer that adds positions to its first tokens alone, such as ViT, DeiT, "
            f"DINOv2 or the vision part of CLIP or SigLIP; of {type(model).__name__} no tokens can be merged: "
            f"{problem}."
        )


def _merges_by_config(model: PreTrainedModel) -> bool:
    """Whether a model is one of this library that merges tokens by a field of its config.

    Raises:
        ValueError: for a model that lays its tokens out as maps, where merged ones have no place.
    """
    config = model.config
    is_ours = isinstance(config, TokenBudgetMixin)
    if isinstance(model, BackboneMixin) or (is_ours and not hasattr(config, MERGING_WORD)):
        raise ValueError(
            f"`model` must give tokens: {type(model).__name__} lays them out as feature maps, where merged ones have "
            "no place."
        )
    return is_ours


def apply_token_merging(model: PreTrainedModel, *, num_tokens: int) -> PreTrainedModel:
    """Lets a Vision Transformer merge similar tokens between its layers, down to an exact number. No training needed.

    Works on ViT, DeiT, DINOv2 (with registers or not) and the vision parts of CLIP and SigLIP, with or without a head.
    The model is changed in place: its layers get a subclass of their own class, and its attention implementation a
    variant that counts tokens by their sizes. Weights, their names and what `save_pretrained` writes stay the same.
    Hidden states that are asked for hold fewer tokens from layer to layer. Calls of one model must not run at the same
    time in several threads.

    A FlexiViT or Quadtree ViT merges tokens itself: of these `config.merge_tokens_to` is set, and saved with them.

    Args:
        model (`PreTrainedModel`): the model. Its attention implementation must be "sdpa" or "eager".
        num_tokens (`int`): patch tokens that the last layer gives; prefix tokens are not counted. As many as the image
            has, or more: nothing is merged. Called again, it changes the number.

    Returns:
        `PreTrainedModel`: the model itself.

    Raises:
        ValueError: for a model that is no such transformer (DINOv3 and others with positions in their layers are
            none), a backbone or an S2, another attention implementation, or a number below 1; from the call of the
            model, for a number that its layers cannot reach (each can merge half of its tokens).

    Example:

    ```python
    >>> import polyscale
    >>> model = polyscale.apply_token_merging(model, num_tokens=49)
    >>> polyscale.remove_token_merging(model)
    ```
    """
    layers = _encoder_layers(model)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"`num_tokens` must be an int of at least 1, got {num_tokens!r}.")
    if _merges_by_config(model):
        setattr(model.config, MERGING_WORD, num_tokens)
        return model
    if isinstance(layers[0], _MergingLayer):
        layers[0].merging.num_tokens = num_tokens
        return model
    _check_mergeable(model, layers[0])
    implementation = attention_name(model.config)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"`model` must use one of the attention implementations {', '.join(_IMPLEMENTATIONS)}, got "
            f"{implementation!r}: change it with `model.set_attn_implementation('sdpa')`."
        )
    model.set_attn_implementation(MERGING_ATTENTION + implementation)
    merging = _Merging(num_tokens, len(layers), base_num_prefix_tokens(model.config))
    for place, layer in enumerate(layers):
        layer.__class__ = _merging_class(type(layer))
        layer.merging = _attention_of(layer).merging = merging
        layer.place = place
    return model


def remove_token_merging(model: PreTrainedModel) -> PreTrainedModel:
    """Takes back what `apply_token_merging` did, in place.

    Args:
        model (`PreTrainedModel`): a model with or without token merging.

    Returns:
        `PreTrainedModel`: the model itself.
    """
    layers = _encoder_layers(model)
    if hasattr(model.config, MERGING_WORD):
        setattr(model.config, MERGING_WORD, None)
    if isinstance(layers[0], _MergingLayer):
        model.set_attn_implementation(attention_name(model.config).removeprefix(MERGING_ATTENTION))
        for layer in layers:
            layer.__class__ = _plain_class(layer)
            del layer.merging, layer.place, _attention_of(layer).merging
    return model


_register()

__all__ = ["apply_token_merging", "remove_token_merging"]
