"""CLIP-like models with a vision tower of this library: Learning Transferable Visual Models From Natural Language
Supervision (arXiv 2103.00020) and Sigmoid Loss for Language Image Pre-Training (arXiv 2303.15343).

Faithful to transformers' `CLIPModel`, `SiglipModel` and `VisionTextDualEncoderModel`, whose weights they take over.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from ..utils.validation import check_tensor
from .configuration_dual_encoder import BudgetCLIPConfig, BudgetSiglipConfig, DualEncoderConfig


@dataclass
class DualEncoderOutput(ModelOutput):
    """What a dual encoder gives; the fields are those of transformers' `CLIPOutput`.

    Attributes:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): contrastive loss, with `return_loss=True`.
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`): scaled similarities.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`): the same, transposed.
        text_embeds (`torch.FloatTensor` of shape `(texts, projection_dim)`): of length 1.
        image_embeds (`torch.FloatTensor` of shape `(images, projection_dim)`): of length 1.
        text_model_output, vision_model_output: what the two models gave, `pooler_output` after the projection.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


def pooled_width(config: PreTrainedConfig) -> int:
    """Width of a vision tower's `pooler_output`."""
    return getattr(config, "pooled_size", config.hidden_size)


def check_takes(kind: str, model: PreTrainedModel, name: str) -> None:
    """Refuses a model of images in the place of one of texts, and the other way round; `name` is of the argument."""
    if model.main_input_name != kind:
        raise ValueError(
            f"`{name}` must be of a model that takes `{kind}`, got {type(model).__name__}, which takes "
            f"`{model.main_input_name}`."
        )


def _check_texts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocabulary: int) -> None:
    """Refuses anything but the tokens of texts, and a mask that does not fit them.

    Raises:
        ValueError: for another type or shape, or, on a CPU, tokens that the vocabulary does not have.
    """
    check_tensor("input_ids", input_ids, ("texts", "tokens"), floating=False)
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`input_ids` must be a tensor of ints, got {input_ids.dtype}.")
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, ("texts", "tokens"), floating=False)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would wait
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"`input_ids` must be from 0 to {vocabulary - 1}, got {low if low < 0 else high}.")


class DualEncoderPreTrainedModel(PreTrainedModel):
    """What both models share: two encoders, embeddings of length 1, their similarities."""

    config: DualEncoderConfig
    base_model_prefix = "dual_encoder"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: DualEncoderConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config) if vision_model is None else vision_model
        self.text_model = self.make_text_model(config.text_config) if text_model is None else text_model
        check_takes("pixel_values", self.vision_model, "vision_config")
        check_takes("input_ids", self.text_model, "text_config")

    def make_text_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModel.from_config(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def project_image(self, pooled: torch.Tensor) -> torch.Tensor:
        """(images, width) -> (images, projection_dim)"""
        return pooled

    def project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """(texts, width) -> (texts, projection_dim)"""
        return pooled

    def logits(self, similarities: torch.Tensor) -> torch.Tensor:
        """Cosines (texts, images) -> logits."""
        raise NotImplementedError

    def contrastive_loss(self, logits_per_text: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _split(self, kwargs: dict) -> tuple[dict, dict]:
        """Keyword arguments for the vision tower and for the text model: its own words go to the tower alone."""
        words = set(inspect.signature(self.vision_model.forward).parameters) - {"kwargs"}
        text_words = set(inspect.signature(self.text_model.forward).parameters) - {"kwargs"}
        vision = {name: value for name, value in kwargs.items() if name in words or name not in text_words}
        text = {name: value for name, value in kwargs.items() if name in text_words or name not in words}
        return vision, text

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor`): (batch, channels, height, width).
            kwargs: the budget of the vision tower (`patch_size`, `num_tokens`, `scales`, ...), and what else it takes.

        Returns:
            What the tower gives; `pooler_output` (batch, projection_dim) is the embedding, not yet of length 1.

        Raises:
            ValueError: where the tower has no pooler.
        """
        outputs = self.vision_model(pixel_values, **kwargs)
        if outputs.pooler_output is None:
            raise ValueError(
                f"`vision_model`, a {type(self.vision_model).__name__}, gives no `pooler_output`, of which embeddings "
                "are made: give one with its pooler, or another model."
            )
        outputs.pooler_output = self.project_image(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.Tensor`): (batch, tokens), from the tokenizer.
            attention_mask (`torch.Tensor`, *optional*): (batch, tokens).
            position_ids (`torch.Tensor`, *optional*): (batch, tokens).
            kwargs: what else the text model takes.

        Returns:
            What the text model gives; `pooler_output` (batch, projection_dim) is the embedding, not yet of length 1.
        """
        _check_texts(input_ids, attention_mask, self.config.text_config.vocab_size)
        outputs = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        outputs.pooler_output = self.project_text(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DualEncoderOutput:
        """
        Args:
            input_ids (`torch.Tensor`): (texts, tokens).
            pixel_values (`torch.Tensor`): (images, channels, height, width).
            attention_mask (`torch.Tensor`, *optional*): (texts, tokens).
            position_ids (`torch.Tensor`, *optional*): (texts, tokens).
            return_loss (`bool`, *optional*): whether to compute the contrastive loss of pairs.
            kwargs: the budget of the vision tower, and what else either model takes.

        Raises:
            ValueError: without texts or images, for something else in their place, and for a loss of unequal numbers
                of them.
        """
        for name, value in (("input_ids", input_ids), ("pixel_values", pixel_values)):
            if value is None:
                raise ValueError(
                    f"`{name}` is required. For one side alone: `get_text_features`, `get_image_features`."
                )
        vision_kwargs, text_kwargs = self._split(kwargs)
        vision_outputs = self.get_image_features(pixel_values, **vision_kwargs)
        text_outputs = self.get_text_features(input_ids, attention_mask, position_ids, **text_kwargs)
        image_embeds = F.normalize(vision_outputs.pooler_output, dim=-1)
        text_embeds = F.normalize(text_outputs.pooler_output, dim=-1)
        logits_per_text = self.logits(text_embeds @ image_embeds.t().to(text_embeds.device))  # (texts, images)
        if return_loss and len(text_embeds) != len(image_embeds):
            raise ValueError(
                f"`return_loss` needs pairs: as many texts as images, got {len(text_embeds)} texts and "
                f"{len(image_embeds)} images."
            )
        return DualEncoderOutput(
            loss=self.contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


class BudgetCLIPModel(DualEncoderPreTrainedModel):
    """A CLIP whose vision tower has a token budget: `polyscale.swap_vision_tower(clip, tower)` makes one.

    The budget is an argument of each call (`patch_size=32`), or a field of `config.vision_config` for callers that
    pass none, such as a pipeline.
    """

    config: BudgetCLIPConfig

    def __init__(self, config: BudgetCLIPConfig, **models: PreTrainedModel | None):
        super().__init__(config, **models)
        self.visual_projection = nn.Linear(pooled_width(config.vision_config), config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def project_image(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.visual_projection(pooled)

    def project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.text_projection(pooled)

    def logits(self, similarities: torch.Tensor) -> torch.Tensor:
        return similarities * self.logit_scale.exp().to(similarities.device)

    def contrastive_loss(self, logits_per_text: torch.Tensor) -> torch.Tensor:
        """The mean of the cross entropies of texts among images and of images among texts."""
        pairs = torch.arange(len(logits_per_text), device=logits_per_text.device)
        return (F.cross_entropy(logits_per_text, pairs) + F.cross_entropy(logits_per_text.t(), pairs)) / 2


class BudgetSiglipModel(DualEncoderPreTrainedModel):
    """A SigLIP whose vision tower has a token budget: `polyscale.swap_vision_tower(siglip, tower)` makes one."""

    config: BudgetSiglipConfig

    def __init__(self, config: BudgetSiglipConfig, **models: PreTrainedModel | None):
        super().__init__(config, **models)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.post_init()

    def make_text_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        from transformers import SiglipTextModel  # no Auto class knows it

        return SiglipTextModel._from_config(config)

    def logits(self, similarities: torch.Tensor) -> torch.Tensor:
        scale, bias = self.logit_scale.to(similarities.device), self.logit_bias.to(similarities.device)
        return similarities * scale.exp() + bias

    def contrastive_loss(self, logits_per_text: torch.Tensor) -> torch.Tensor:
        """Each pair of a text and an image is a yes or no of its own."""
        signs = 2 * torch.eye(len(logits_per_text), device=logits_per_text.device) - 1
        return -F.logsigmoid(signs * logits_per_text).sum(dim=-1).mean()


__all__ = ["BudgetCLIPModel", "BudgetSiglipModel", "DualEncoderOutput", "DualEncoderPreTrainedModel", "pooled_width"]
