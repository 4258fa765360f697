"""When Do We Not Need Larger Vision Models? (S2, arXiv 2403.13043).

Faithful to bfshi/scaling_on_scales; its use in LLaVA to haotian-liu/LLaVA, `CLIPVisionTowerS2`; Dynamic-S2 (NVILA,
arXiv 2412.04468) to NVlabs/VILA, `merge_features_for_dynamic_s2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...layers.call_checks import CheckedModelMixin, check_words, classification_loss
from ...utils.validation import check_pixel_values
from ...utils.vision_configs import base_stage_widths
from .configuration_s2_vision import S2VisionConfig
from .multiscale_s2_vision import TilePlan, as_tokens, run_tiles, token_grid
from .tile_outputs_s2_vision import TileOutputs


@dataclass
class S2VisionOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state: (batch, num_prefix_tokens + num_tokens, scales * width); from a ConvNet (batch, scales *
            width, rows, columns).
        pooler_output: (batch, scales * pooled width).
        hidden_states: a tuple of tensors like `last_hidden_state`; None at layers that were not asked for.
        attentions: one tensor a layer of the wrapped model, (batch, tiles of all scales, heads, tokens, tokens).
        token_mask: (batch, num_tokens), True at real tokens; only where pictures have different numbers of them.
        num_tokens: (batch,) tokens of each picture, prefix tokens not counted; only with `dynamic`.
        block_sizes: (batch, 2) rows and columns of tiles in the last scale of each picture; only with `dynamic`.
    """

    token_mask: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    block_sizes: torch.Tensor | None = None


class S2VisionPreTrainedModel(CheckedModelMixin, PreTrainedModel):
    config: S2VisionConfig
    base_model_prefix = "s2_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_vision_model(cls, vision_model: PreTrainedModel, **kwargs) -> "S2VisionPreTrainedModel":
        """Wraps a model in memory; its weights are shared, not copied.

        Args:
            vision_model: a model without a head, of a class that `AutoModel` gives for its config.
            kwargs: fields of `S2VisionConfig`, `scales` or `img_sizes` among them.

        Raises:
            ValueError: for a model with a head.
        """
        expected = MODEL_MAPPING.get(type(vision_model.config), None)
        expected = expected if isinstance(expected, tuple) else (expected,)
        if type(vision_model) not in expected:
            names = (
                " or ".join(option.__name__ for option in expected if option is not None)
                or "a model that AutoModel knows"
            )
            raise ValueError(
                f"`vision_model` must be {names}, a model without a head, got "
                f"{type(vision_model).__name__}: a classifier's logits are no "
                "features. Give the model inside it."
            )
        for module in vision_model.modules():
            module._is_hf_initialized = True  # keeps `post_init` from drawing new weights
        attention = vision_model.config._attn_implementation  # a config around this one resets it
        config = S2VisionConfig(vision_config=vision_model.config, **kwargs)
        config.dtype = vision_model.dtype
        config._attn_implementation = attention
        model = cls(config, vision_model=vision_model)
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
            ValueError: if the checkpoint lacks weights of the model, its pooler aside.
        """
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        config = getattr(config, "vision_config", None) or config
        S2VisionConfig(
            vision_config=config, **kwargs
        )  # what is wrong with the arguments is said before anything is loaded
        vision_model, info = AutoModel.from_pretrained(
            pretrained_model_name_or_path, config=config, output_loading_info=True, **(model_kwargs or {})
        )
        missing = [key for key in info["missing_keys"] if not key.startswith(("pooler.", "head."))]
        if missing:
            raise ValueError(
                f"`pretrained_model_name_or_path` {pretrained_model_name_or_path!r} does not fit "
                f"{type(vision_model).__name__}: it lacks "
                f"{len(missing)} weights, {sorted(missing)[0]!r} among them."
            )
        return cls.from_vision_model(vision_model, **kwargs)


class S2VisionWrapper(S2VisionPreTrainedModel):
    """Any vision model at several scales: the features of all scales concatenated, as many tokens as one scale has."""

    def __init__(self, config: S2VisionConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config) if vision_model is None else vision_model
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def freeze_base(self) -> None:
        """Takes the wrapped model out of training: its weights get no gradients."""
        self.vision_model.requires_grad_(False)

    def _chunk(self, batch: int) -> int | None:
        """How many tiles go through the wrapped model at a time; None for all."""
        if self.config.tiles_per_forward is None and self.config.split_forward:
            return batch
        return self.config.tiles_per_forward

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
        image_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> S2VisionOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), any height and width, best at the largest scale. With
                `image_sizes`: the tiles that `S2ImageProcessor(dynamic=True)` cuts, (batch, tiles, channels, tile,
                tile) padded to the same number of tiles, or (all tiles, channels, tile, tile) one picture after the
                other.
            scales: in place of the configured scales, as many of them; what they mean is said at `S2VisionConfig`.
            img_sizes: in place of them, the sizes in pixels: int or (height, width).
            image_sizes: only with `config.dynamic`: (batch, 2), height and width in pixels of the last scale of each
                picture.
            output_hidden_states: True for all layers of the wrapped model, or the index or indices of those that are
                wanted; only those are put together.
            kwargs: passed to the wrapped model (`patch_size=` of a FlexiViT, `interpolate_pos_encoding=` of a CLIP).

        Returns:
            `S2VisionOutput`.

        Raises:
            ValueError: for a wrong shape of `pixel_values`, another number of scales than configured, features that
                are no grid, or `image_sizes` that do not fit the tiles.
        """
        check_words(self, kwargs, self.vision_model)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output_attentions = bool(
            getattr(self.config, "output_attentions", False) if output_attentions is None else output_attentions
        )
        kwargs.pop("num_items_in_batch", None)
        collector = TileOutputs(self.vision_model, self.config, output_hidden_states, output_attentions, kwargs)
        if image_sizes is not None:
            return self._forward_cut(pixel_values, image_sizes, collector)

        check_pixel_values(pixel_values, self.config.num_channels)
        size = tuple(side.__index__() for side in pixel_values.shape[-2:])
        plan = self.config.plan_for(size, scales, img_sizes)
        batch = pixel_values.shape[0]
        run_tiles(pixel_values, plan, collector.take, self._chunk(batch), antialias=self.config.dynamic)
        values = {
            name: value if isinstance(value, torch.Tensor) else self._joined(*value)
            for name, value in collector.merged(plan, batch).items()
        }
        counts = {}
        if self.config.dynamic:
            count = values["last_hidden_state"].shape[1] - self.config.num_prefix_tokens
            counts["num_tokens"] = torch.full((batch,), count, device=pixel_values.device)
            counts["block_sizes"] = torch.tensor([plan.tile_grid(-1)], device=pixel_values.device).expand(batch, 2)
        return self._output(values, collector, counts)

    def _joined(self, features: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        """Maps as tokens where the wrapped model has tokens."""
        return as_tokens(features, prefix) if features.ndim == 4 and self.config.output_shape == "bnc" else features

    def _padded(self, name: object, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens of each picture, (tokens, width), with zeros after them: (batch, most tokens, width)"""
        if name == "pooler_output":
            return torch.stack(tuple(pictures))
        return nn.utils.rnn.pad_sequence(list(pictures), batch_first=True)

    def _output(self, values: dict, collector: TileOutputs, more: dict) -> S2VisionOutput:
        num_attentions = sum(isinstance(name, tuple) and name[0] == "attentions" for name in values)
        return S2VisionOutput(
            last_hidden_state=values["last_hidden_state"],
            pooler_output=values["pooler_output"],
            hidden_states=collector.layers(values, "hidden_states", collector.num_hidden_states),
            attentions=collector.layers(values, "attentions", num_attentions),
            **more,
        )

    def _block_sizes(self, image_sizes: torch.Tensor) -> list[tuple[int, int]]:
        """(rows, columns) of tiles in the last scale of each picture."""
        if not self.config.dynamic:
            raise ValueError("`image_sizes` belongs to `config.dynamic=True`: without it, pictures are given whole.")
        tile = self.config.tile_size[0]
        sizes = torch.as_tensor(image_sizes).tolist()
        for size in sizes:
            if len(size) != 2 or any(side < tile or side % tile for side in size):
                raise ValueError(
                    "`image_sizes` must hold (height, width) in pixels of the last scale of each "
                    f"picture, multiples of the tile of {tile}, "
                    f"got {size}."
                )
        return [(height // tile, width // tile) for height, width in sizes]

    def _forward_cut(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, collector: TileOutputs
    ) -> S2VisionOutput:
        """Dynamic-S2 on tiles that an image processor has cut."""
        blocks = self._block_sizes(image_sizes)
        tile = self.config.tile_size
        multiples = [round(multiple) for multiple in self.config.scale_multiples[:-1]]
        squares = [(tile[0] * multiple, tile[1] * multiple) for multiple in multiples]
        plans = [TilePlan((*squares, (tile[0] * rows, tile[1] * columns)), tile, "resize") for rows, columns in blocks]
        counts = [sum(plan.num_tiles(scale) for scale in range(len(plan.sizes))) for plan in plans]
        tiles = self._only_real_tiles(pixel_values, counts)
        for chunk in tiles.split(self._chunk(len(blocks)) or len(tiles)):
            collector.take(chunk)

        streams = {name: torch.cat(tensors).split(counts) for name, tensors in collector.streams.items()}
        pictures: dict[object, list[torch.Tensor]] = {}
        for index, plan in enumerate(plans):
            merged = collector.merged(plan, 1, {name: [parts[index]] for name, parts in streams.items()})
            for name, value in merged.items():
                value = value if isinstance(value, torch.Tensor) else self._joined(*value)
                pictures.setdefault(name, []).append(value[0])

        num_tokens = [len(tokens) - self.config.num_prefix_tokens for tokens in pictures["last_hidden_state"]]
        values = {name: self._padded(name, parts) for name, parts in pictures.items() if name[0] != "attentions"}
        more = {
            "num_tokens": torch.tensor(num_tokens, device=tiles.device),
            "block_sizes": torch.tensor(blocks, device=tiles.device),
        }
        more["token_mask"] = torch.arange(max(num_tokens), device=tiles.device) < more["num_tokens"][:, None]
        return self._output(values, collector, more)

    def _only_real_tiles(self, pixel_values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """(batch, tiles, channels, tile, tile) or (all tiles, channels, tile, tile) -> (all real tiles, channels,
        tile, tile)
        """
        shape = tuple(pixel_values.shape)
        if pixel_values.ndim == 5 and shape[0] == len(counts) and shape[1] >= max(counts):
            pixel_values = torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])
        elif pixel_values.ndim != 4 or shape[0] != sum(counts):
            raise ValueError(
                f"`pixel_values` of shape {shape} does not fit `image_sizes`, which say {list(counts)} "
                f"tiles for {len(counts)} pictures: expected "
                "(pictures, tiles, channels, tile, tile) or (all tiles, channels, tile, tile)."
            )
        check_pixel_values(pixel_values, self.config.num_channels)
        if tuple(pixel_values.shape[-2:]) != self.config.tile_size:
            raise ValueError(f"`pixel_values` must hold tiles of {self.config.tile_size} pixels, got {shape}.")
        return pixel_values


class S2VisionForImageClassification(S2VisionPreTrainedModel):
    """S2 with a linear classifier on the features of all scales."""

    def __init__(self, config: S2VisionConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.s2_vision = S2VisionWrapper(config, vision_model)
        width = config.pooled_size if config.pooling == "pooler" else config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        scales: Sequence[float] | None = None,
        img_sizes: Sequence[int | Sequence[int]] | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values, scales, img_sizes, image_sizes: as in `S2VisionWrapper.forward`.
            labels: (batch,) class indices, or (batch, num_labels) for multi-label problems; gives `loss`.

        Returns:
            `logits` (batch, num_labels), and `loss` when `labels` are given.
        """
        check_words(self, kwargs, self.s2_vision, self.s2_vision.vision_model)
        outputs = self.s2_vision(pixel_values, scales=scales, img_sizes=img_sizes, image_sizes=image_sizes, **kwargs)
        logits = self.classifier(self._pool(outputs))
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
        return patches.sum(dim=1) / outputs.num_tokens[:, None].to(patches.dtype)  # padding is zero


class S2VisionBackbone(BackboneMixin, S2VisionPreTrainedModel):
    """S2 as a backbone: feature maps (batch, scales * width, rows, columns) of the layers in `config.out_features`."""

    def __init__(self, config: S2VisionConfig, vision_model: PreTrainedModel | None = None):
        super().__init__(config)
        if config.dynamic:
            raise ValueError(
                "`dynamic=True` gives each picture a feature map of its own size: use `S2VisionWrapper`, "
                "not a backbone."
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
            `feature_maps`: one (batch, scales * width, rows, columns) a stage; with
            `config.reshape_hidden_states=False` (batch, tokens, scales * width), prefix tokens included.
        """
        check_words(self, kwargs, self.s2_vision, self.s2_vision.vision_model)
        outputs = self.s2_vision(pixel_values, scales=scales, img_sizes=img_sizes, **kwargs)
        feature_maps = ()
        for stage, hidden_states in zip(self.stage_names, outputs.hidden_states, strict=True):
            if stage not in self.out_features:
                continue
            if hidden_states.ndim == 3 and self.config.reshape_hidden_states:
                patches = hidden_states[:, self.config.num_prefix_tokens :]
                grid = self._grid(patches.shape[1], pixel_values, scales, img_sizes)
                hidden_states = patches.transpose(1, 2).unflatten(2, grid)
            feature_maps += (hidden_states,)
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
