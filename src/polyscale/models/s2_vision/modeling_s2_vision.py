"""When Do We Not Need Larger Vision Models? (S2, arXiv 2403.13043).

Faithful to bfshi/scaling_on_scales; its use in LLaVA to haotian-liu/LLaVA, `CLIPVisionTowerS2`; Dynamic-S2 (NVILA,
arXiv 2412.04468) to NVlabs/VILA, `merge_features_for_dynamic_s2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ...layers.backbone import feature_maps_of
from ...layers.call_checks import CheckedModelMixin, check_words, classification_loss
from ...layers.pooled_only import layers_wanted, pooled_only_suffices
from ...layers.wrapping import OuterModelMixin, check_has_no_head, wrap_in_memory
from ...utils.transformers_internals import filter_output_hidden_states
from ...utils.validation import check_pixel_values
from ...utils.vision_configs import base_stage_widths
from .configuration_s2_vision import S2VisionConfig
from .dynamic_tiling_s2_vision import block_sizes, only_real_tiles, padded, plans_for_blocks
from .multiscale_s2_vision import TileFeatures
from .running_s2_vision import TileRunner
from .tile_budget_s2_vision import run_best_tiles
from .tile_map_s2_vision import make_tile_map
from .tiling_s2_vision import TilePlan, run_tiles, token_grid


_OUTPUTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")


@dataclass
class S2VisionOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state: (batch, num_prefix_tokens + num_tokens, scales * width); from a ConvNet (batch, scales *
            width, rows, columns).
        pooler_output: (batch, scales * pooled width).
        hidden_states: a tuple of tensors like `last_hidden_state`; None at layers that were not asked for.
        attentions: one tensor for each layer of the wrapped model, (batch, tiles, heads, tokens, tokens): the tiles of
            all scales; with `num_tiles` those of the smallest scale, then those that ran, the best first.
        token_mask: (batch, num_tokens), True at real tokens; only where images have different numbers of them.
        num_tokens: (batch,) tokens of each image, prefix tokens not counted; only with `dynamic`.
        block_sizes: (batch, 2) rows and columns of tiles in the last scale of each image; only with `dynamic`.
        tile_mask: (batch, tiles of the higher scales), True at tiles that went through the wrapped model at its own
            budget; only with `num_tiles`.
    """

    token_mask: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    block_sizes: torch.Tensor | None = None
    tile_mask: torch.Tensor | None = None


class S2VisionPreTrainedModel(CheckedModelMixin, OuterModelMixin, PreTrainedModel):
    config: S2VisionConfig
    base_model_prefix = "s2_vision"
    old_names: ClassVar = {r"^classifier\.": "head."}

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs) -> None:
        """As in transformers, under the names of the model in memory, which a resumed `Trainer` asks for: older names
        of the wrapped model only with `save_original_format=True`.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_vision_model(cls, vision_model: PreTrainedModel, **kwargs) -> "S2VisionPreTrainedModel":
        """Wraps a model in memory; its weights are shared, not copied.

        Args:
            vision_model: a model without a head, of a class that `AutoModel` gives for its config.
            kwargs: fields of `S2VisionConfig`, `scales` or `img_sizes` among them.

        Raises:
            ValueError: for a model with a head.
        """
        check_has_no_head(vision_model, "vision_model")
        model = wrap_in_memory(cls, vision_model, lambda inner: S2VisionConfig(vision_config=inner, **kwargs))
        for module in model.children():
            if not isinstance(module, PreTrainedModel):  # a head; the model in memory stays where and as it is
                module.to(device=vision_model.device, dtype=vision_model.dtype)
        return model.train(vision_model.training)

    @classmethod
    def from_vision_pretrained(cls, pretrained_model_name_or_path: str, *, model_kwargs: dict | None = None, **kwargs):
        """Loads a plain checkpoint of the model to wrap.

        Args:
            pretrained_model_name_or_path: a folder or a name on the Hub; of a CLIP-like checkpoint with a text part,
                the vision part is read.
            model_kwargs: arguments of `from_pretrained` for the wrapped model (`dtype`, `device_map`,
                `attn_implementation`, ...).
            kwargs: fields of `S2VisionConfig`, `scales` or `img_sizes` among them.

        Raises:
            ValueError: if the checkpoint is an S2 model, or lacks weights of the model, its pooler aside.
        """
        # code that comes with a checkpoint runs only where `model_kwargs` says so
        options = {"trust_remote_code": False, **(model_kwargs or {})}
        config = AutoConfig.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=options["trust_remote_code"]
        )
        if isinstance(config, S2VisionConfig):
            raise ValueError(
                f"{pretrained_model_name_or_path} is an S2 model, which has several scales already: give the plain "
                "vision model that it was made of."
            )
        config = getattr(config, "vision_config", None) or config
        S2VisionConfig(vision_config=config, **kwargs)  # errors in arguments come before anything is loaded
        vision_model, info = AutoModel.from_pretrained(
            pretrained_model_name_or_path, config=config, output_loading_info=True, **options
        )
        missing = [key for key in info["missing_keys"] if not key.startswith(("pooler.", "head."))]
        if missing:
            raise ValueError(
                f"`pretrained_model_name_or_path` {str(pretrained_model_name_or_path)!r} does not fit "
                f"{type(vision_model).__name__}: it lacks {len(missing)} weights, {sorted(missing)[0]!r} among them."
            )
        return cls.from_vision_model(vision_model, **kwargs)


class S2VisionWrapper(S2VisionPreTrainedModel):
    """Any vision model at several scales: the features of all scales concatenated, as many tokens as one scale has."""

    def __init__(self, config: S2VisionConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config) if vision_model is None else vision_model
        self.tile_map = make_tile_map(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def freeze_base(self) -> None:
        """Takes the wrapped model out of training: its weights get no gradients."""
        self.vision_model.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
        image_sizes: torch.Tensor | None = None,
        num_tiles: int | None = None,
        tile_scores: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> S2VisionOutput:
        """
        Args:
            pixel_values (`torch.Tensor`): (batch, channels, height, width), any height and width, best at the largest
                scale. With `image_sizes`: the tiles that `S2ImageProcessor(dynamic=True)` cuts, (batch, tiles,
                channels, tile, tile) padded to the same number of tiles, or (all tiles, channels, tile, tile) one
                image after the other.
            scales (`list[float]`, *optional*): in place of the configured scales, as many of them; what they mean is
                said at `S2VisionConfig`.
            img_sizes (`list`, *optional*): in place of them, the sizes in pixels: int or (height, width).
            image_sizes (`torch.Tensor`, *optional*): only with `config.dynamic`: (batch, 2), height and width in
                pixels of the last scale of each image.
            num_tiles (`int`, *optional*, defaults to `config.num_tiles`): how many tiles of the higher scales go
                through the wrapped model, those with the highest scores; the others are filled as `config.tile_fill`
                says.
            tile_scores (`torch.Tensor`, *optional*): (batch, tiles of the higher scales), in the order of the scales
                and row by row; in place of the detail that a tile shows and the first scale does not.
            output_hidden_states (`bool` or `int` or `list[int]`, *optional*): `True` for all layers of the wrapped
                model, or the index or indices of those that are wanted; only those are put together.
            output_attentions (`bool`, *optional*, defaults to `config.output_attentions`): whether the output holds
                the attentions of the wrapped model.
            pooled_only (`bool`, *optional*, defaults to `False`): leaves out of a wrapped model of this library what
                `pooler_output` does not need; `last_hidden_state` is then `None`. Without effect around other models,
                with `dynamic` and with `num_tiles`.
            kwargs: passed to the wrapped model (`patch_size=` of a FlexiViT, `interpolate_pos_encoding=` of a CLIP).

        Returns:
            `S2VisionOutput`.

        Raises:
            ValueError: for a wrong shape of `pixel_values`, another number of scales than configured, features that
                are no grid, `image_sizes` that do not fit the tiles, or a tile budget out of range.
        """
        check_words(self, kwargs, self.vision_model)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output_attentions = bool(
            getattr(self.config, "output_attentions", False) if output_attentions is None else output_attentions
        )
        kwargs.pop("num_items_in_batch", None)
        num_tiles = self.config.num_tiles if num_tiles is None else num_tiles
        pooled_only = pooled_only and not self.config.dynamic and num_tiles is None
        layers = layers_wanted(output_hidden_states)
        runner = TileRunner(self.vision_model, self.config, layers, output_attentions, kwargs, pooled_only)
        if image_sizes is not None:
            return self._forward_cut(pixel_values, image_sizes, runner)

        check_pixel_values(pixel_values, self.config.num_channels)
        size = tuple(side.__index__() for side in pixel_values.shape[-2:])
        plan = self.config.plan_for(size, scales, img_sizes)
        features = self._features(plan, pixel_values.shape[0])
        more = {}
        if num_tiles is not None:
            more["tile_mask"] = run_best_tiles(runner, features, pixel_values, num_tiles, tile_scores, self.tile_map)
        else:
            if tile_scores is not None:
                raise ValueError("`tile_scores` needs `num_tiles`, the number of tiles that run.")
            run_tiles(
                pixel_values,
                plan,
                lambda tiles: features.add(runner.run(tiles)),
                runner.chunk_for(features.batch),
                runner.antialias,
            )
        if self.config.dynamic:
            count = features.merged("last_hidden_state").shape[1] - self.config.num_prefix_tokens
            more["num_tokens"] = torch.full((features.batch,), count, device=pixel_values.device)
            more["block_sizes"] = torch.tensor([plan.tile_grid(-1)], device=pixel_values.device).expand(
                features.batch, 2
            )
        return S2VisionOutput(**{name: features.merged(name) for name in _OUTPUTS}, **more)

    def _features(self, plan: TilePlan, batch: int) -> TileFeatures:
        config = self.config
        return TileFeatures(
            plan, batch, config.resize_output_to_idx, config.num_prefix_tokens, config.features_per_tile
        )

    def _forward_cut(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, runner: TileRunner
    ) -> S2VisionOutput:
        """Dynamic-S2 on tiles that an image processor has cut."""
        config = self.config
        if not config.dynamic:
            raise ValueError("`image_sizes` belongs to `config.dynamic=True`: without it, images are given whole.")
        blocks = block_sizes(image_sizes, config.tile_size[0])
        plans = plans_for_blocks(blocks, config.scale_multiples, config.tile_size)
        counts = [sum(plan.num_tiles(scale) for scale in range(len(plan.sizes))) for plan in plans]
        tiles = only_real_tiles(pixel_values, counts, config.tile_size)
        check_pixel_values(tiles, config.num_channels)
        parts = runner.run_in_chunks(tiles, len(blocks))
        by_image = {part: None if tensor is None else tensor.split(counts) for part, tensor in parts.items()}
        images = []
        for place, plan in enumerate(plans):
            features = self._features(plan, 1)
            features.add({part: None if split is None else split[place] for part, split in by_image.items()})
            images.append({name: features.merged(name) for name in _OUTPUTS})
        num_tokens = torch.tensor(
            [image["last_hidden_state"].shape[1] - config.num_prefix_tokens for image in images], device=tiles.device
        )
        return S2VisionOutput(
            **{name: padded([image[name] for image in images]) for name in _OUTPUTS},
            num_tokens=num_tokens,
            block_sizes=torch.tensor(blocks, device=tiles.device),
            token_mask=torch.arange(int(num_tokens.max()), device=tiles.device) < num_tokens[:, None],
        )


class S2VisionForImageClassification(S2VisionPreTrainedModel):
    """S2 with a linear classifier on the features of all scales."""

    def __init__(self, config: S2VisionConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.s2_vision = S2VisionWrapper(config, vision_model)
        width = config.pooled_size if config.pooling == "pooler" else config.hidden_size
        self.head = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
        image_sizes: torch.Tensor | None = None,
        num_tiles: int | None = None,
        tile_scores: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values, scales, img_sizes, image_sizes, num_tiles, tile_scores: as in `S2VisionWrapper.forward`.
            labels: (batch,) class indices, or (batch, num_labels) for multi-label problems; gives `loss`.

        Returns:
            `logits` (batch, num_labels), and `loss` when `labels` are given.
        """
        check_words(self, kwargs, self.s2_vision, self.s2_vision.vision_model)
        outputs = self.s2_vision(
            pixel_values,
            scales=scales,
            img_sizes=img_sizes,
            image_sizes=image_sizes,
            num_tiles=num_tiles,
            tile_scores=tile_scores,
            pooled_only=self.config.pooling == "pooler" and pooled_only_suffices(self, kwargs),
            **kwargs,
        )
        logits = self.head(self._pool(outputs))
        loss = classification_loss(self, labels, logits, self.config, kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _pool(self, outputs: S2VisionOutput) -> torch.Tensor:
        if self.config.pooling == "pooler":
            return outputs.pooler_output
        features = outputs.last_hidden_state
        if features.ndim == 4:
            return features.mean(dim=(2, 3))
        patches = features[:, self.config.num_prefix_tokens :]
        if outputs.token_mask is None:
            return patches.mean(dim=1)
        share = outputs.num_tokens[:, None] / patches.shape[1]
        return (patches.mean(dim=1) / share).to(patches.dtype)  # padding is zero; a sum is more than float16 holds


class S2VisionBackbone(BackboneMixin, S2VisionPreTrainedModel):
    """S2 as a backbone: feature maps (batch, scales * width, rows, columns) of the layers in `config.out_features`."""

    def __init__(self, config: S2VisionConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        if config.dynamic:
            raise ValueError(
                "`dynamic=True` gives each image a feature map of its own size: use `S2VisionWrapper`, not a backbone."
            )
        widths = base_stage_widths(config.vision_config)
        self.num_features = [config.num_scales * width for width in widths]
        self.s2_vision = S2VisionWrapper(config, vision_model)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """
        Args:
            pixel_values, scales, img_sizes: as in `S2VisionWrapper.forward`.

        Returns:
            `feature_maps`: one (batch, scales * width, rows, columns) per stage; with
            `config.reshape_hidden_states=False` (batch, tokens, scales * width), prefix tokens included.
        """
        check_words(self, kwargs, self.s2_vision, self.s2_vision.vision_model)
        outputs = self.s2_vision(pixel_values, scales=scales, img_sizes=img_sizes, **kwargs)

        def to_map(hidden_states: torch.Tensor) -> torch.Tensor:
            if hidden_states.ndim == 4:
                return hidden_states
            patches = hidden_states[:, self.config.num_prefix_tokens :]
            return patches.transpose(1, 2).unflatten(2, self._grid(patches.shape[1], pixel_values, scales, img_sizes))

        feature_maps = feature_maps_of(self, outputs.hidden_states, to_map)
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _grid(self, num_tokens: int, pixel_values: torch.Tensor, scales, img_sizes) -> tuple[int, int]:
        """(rows, columns) of the output's tokens."""
        plan = self.config.plan_for(tuple(side.__index__() for side in pixel_values.shape[-2:]), scales, img_sizes)
        target = self.config.resize_output_to_idx % self.config.num_scales
        if self.config.features_per_tile is not None:
            return plan.feature_grid(target, self.config.features_per_tile)
        return token_grid(num_tokens, plan.sizes[target])


__all__ = [
    "S2VisionBackbone",
    "S2VisionForImageClassification",
    "S2VisionOutput",
    "S2VisionPreTrainedModel",
    "S2VisionWrapper",
]
