"""Another vision tower for a CLIP-like model in memory."""

import warnings

import torch
from torch import nn
from transformers import (
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Model,
    SiglipModel,
    VisionTextDualEncoderModel,
)

from ..layers.config_checks import CheckedConfigMixin
from ..layers.token_budget import TokenBudgetMixin
from ..layers.wrapping import attention_kept, check_has_no_head, keep_weights
from ..utils.vision_configs import base_output_shape
from .modeling_dual_encoder import (
    BudgetCLIPModel,
    BudgetSiglipModel,
    DualEncoderPreTrainedModel,
    check_takes,
    pooled_width,
)


CLIP_KINDS = (CLIPModel, VisionTextDualEncoderModel, BudgetCLIPModel)
SIGLIP_KINDS = (SiglipModel, BudgetSiglipModel)


def is_dual_encoder(model: object) -> bool:
    """Whether `swap_dual_encoder_tower` is the function for a model."""
    return isinstance(model, (*CLIP_KINDS, *SIGLIP_KINDS, Siglip2Model))


def swap_dual_encoder_tower(model: PreTrainedModel, tower: PreTrainedModel) -> DualEncoderPreTrainedModel:
    """A CLIP-like model with another vision tower. `model` stays as it is; the weights are shared with the result.

    The configs of CLIP and SigLIP fix the class of their vision part, so the result is a model of this library, known
    to `AutoModel` and `AutoModelForZeroShotImageClassification`. A tower converted from the model's own vision part
    gives the same embeddings at the patch size of its weights.

    Args:
        model (`PreTrainedModel`): a `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel`, or what this function
            returned. A SigLIP2 of fixed resolution is a `SiglipModel`.
        tower (`PreTrainedModel`): a model without a head whose `pooler_output` the embeddings are made of: a FlexiViT
            or Quadtree ViT converted from `model.vision_model`, an S2 around it, or another one.

    Returns:
        `BudgetCLIPModel` or `BudgetSiglipModel`. Where the tower's `pooler_output` has another width than the old one,
        the image projection is widened for an S2 tower (it reads the first scale as before, the others with weights of
        zero), and otherwise new, with a warning.

    Raises:
        ValueError: for another kind of model, a ConvNet, a tower whose config does not fit together, or a tower for a
            SigLIP whose width is not that of its text embeddings; from the call of the result, for a tower without
            `pooler_output`.
    """
    if isinstance(model, Siglip2Model):
        raise ValueError(
            "`model` is a Siglip2Model, which takes packed patches of one size, not images: no tower can stand in. "
            "The SigLIP2 checkpoints of fixed resolution load as SiglipModel, which can be given here."
        )
    if not is_dual_encoder(model):
        raise ValueError(
            f"`model` must be a CLIPModel, a SiglipModel or a VisionTextDualEncoderModel, got {type(model).__name__}."
        )
    if not isinstance(tower, PreTrainedModel):
        raise ValueError(f"`tower` must be a vision model without a head, got {type(tower).__name__}.")
    check_takes("pixel_values", tower, "tower")
    check_has_no_head(tower, "tower")
    _check_config(tower.config)
    return _swapped_clip(model, tower) if isinstance(model, CLIP_KINDS) else _swapped_siglip(model, tower)


def _check_config(config: PreTrainedConfig) -> None:
    """Refuses a tower that would fail when it is called.

    Raises:
        ValueError: for a ConvNet, fields that do not fit together, or a budget that the layers cannot reach.
    """
    if base_output_shape(config) == "bchw":
        raise ValueError(
            f"`tower` of type {config.model_type!r} is a ConvNet, whose `pooler_output` is a map: embeddings need a "
            "vector. Give a model with tokens, or S2 around it."
        )
    if isinstance(config, CheckedConfigMixin):  # it may have been changed since it was made
        config.check_fit()
    if isinstance(config, TokenBudgetMixin):
        config.max_num_tokens_for()


def _around(
    model_class: type[DualEncoderPreTrainedModel], model: PreTrainedModel, tower: PreTrainedModel, **fields
) -> DualEncoderPreTrainedModel:
    """The result around both encoders; their weights stay as they are."""
    parts = (tower, model.text_model)
    for part in parts:
        keep_weights(part)
    with attention_kept(*parts):
        config = model_class.config_class(text_config=model.text_model.config, vision_config=tower.config, **fields)
        swapped = model_class(config, vision_model=tower, text_model=model.text_model)
    swapped.logit_scale = model.logit_scale
    parameter = next(model.parameters())
    tower.config.dtype = parameter.dtype
    return swapped.to(device=parameter.device, dtype=parameter.dtype).train(model.training)


def _swapped_clip(model: PreTrainedModel, tower: PreTrainedModel) -> BudgetCLIPModel:
    swapped = _around(
        BudgetCLIPModel,
        model,
        tower,
        projection_dim=model.config.projection_dim,
        logit_scale_init_value=model.config.logit_scale_init_value,
    )
    swapped.text_projection = model.text_projection
    _fit_projection(swapped, model.visual_projection)
    return swapped


def _fit_projection(swapped: BudgetCLIPModel, old: nn.Linear) -> None:
    """Makes the image projection read the new tower: kept, widened, or new with a warning."""
    width = pooled_width(swapped.config.vision_config)
    scales = getattr(swapped.config.vision_config, "num_scales", 1)
    if width == old.in_features:
        swapped.visual_projection = old
    elif width == scales * old.in_features:
        new = swapped.visual_projection
        with torch.no_grad():
            new.weight.zero_()
            new.weight[:, : old.in_features] = old.weight  # channels: scale by scale
    else:
        warnings.warn(
            f"The image projection reads {old.in_features} channels and the new tower gives {width}: it is replaced "
            "by a new one, which has to be trained.",
            stacklevel=4,
        )


def _swapped_siglip(model: PreTrainedModel, tower: PreTrainedModel) -> BudgetSiglipModel:
    text_config = model.config.text_config
    text_width = getattr(text_config, "projection_size", None) or text_config.hidden_size
    width = pooled_width(tower.config)
    if width != text_width:
        raise ValueError(
            f"`tower` gives image embeddings of {width} channels, and this SigLIP compares them with text embeddings "
            f"of {text_width}: it has no projection between them. Use a tower converted from its own vision part."
        )
    swapped = _around(BudgetSiglipModel, model, tower)
    swapped.logit_bias = model.logit_bias
    return swapped


__all__ = ["is_dual_encoder", "swap_dual_encoder_tower"]
