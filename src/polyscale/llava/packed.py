"""A vision tower whose pictures have different numbers of tokens, inside of a LLaVA model, and the processor that
counts them.

The only door that `LlavaModel` has for this is `image_sizes`: the tower gives the tokens of all pictures one after
the other, and LLaVA splits them by `(image_sizes // tower.patch_size).prod(-1)`.
"""

from collections.abc import Sequence

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoProcessor, LlavaProcessor, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import MultiModalData
from transformers.utils.generic import can_return_tuple

from ..models.quadtree_vit import PixelBlurPatchScorer
from ..models.quadtree_vit.selection_quadtree_vit import quadtree_tokens


@strict
class PackedTowerConfig(PreTrainedConfig):
    """Configuration of `PackedTower`: that of the tower inside, an S2 model with `dynamic` or a Quadtree ViT with
    `split_threshold`.

    Raises:
        ValueError: for a tower whose pictures all have the same number of tokens.
    """

    model_type = "polyscale_packed_tower"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="quadtree_vit", init_kwargs={"split_threshold": 1.0}
        )
    }

    vision_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not has_tokens_per_picture(self.vision_config):
            raise ValueError(
                "`vision_config` must be that of an S2 model with `dynamic=True` or of a Quadtree ViT "
                "with `split_threshold`, got "
                f"{self.vision_config.model_type!r}, which gives every picture as many tokens."
            )
        if self.vision_config.model_type == "s2_vision" and self.vision_config.resize_output_to_idx not in (
            -1,
            self.vision_config.num_scales - 1,
        ):
            raise ValueError(
                "`resize_output_to_idx` must be -1 (the last scale, whose tiles fit the picture) for a "
                "tower with `dynamic=True`, got "
                f"{self.vision_config.resize_output_to_idx}."
            )

    @property
    def hidden_size(self) -> int:
        return self.vision_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.vision_config.num_hidden_layers

    @property
    def image_size(self) -> int | Sequence[int]:
        return self.vision_config.image_size

    @property
    def patch_size(self) -> int:
        """Pixels of `image_sizes` a token along one axis; a quadtree's `image_sizes` are (tokens, 1)."""
        return self.vision_config.patch_size if self.vision_config.model_type == "s2_vision" else 1


def has_tokens_per_picture(config: PreTrainedConfig) -> bool:
    """Whether a tower with this config gives pictures different numbers of tokens."""
    return getattr(config, "tokens_vary", False)


class PackedTower(PreTrainedModel):
    """Tokens of all pictures one after the other, without prefix tokens: (1, tokens of all pictures, hidden)."""

    config: PackedTowerConfig
    base_model_prefix = "packed_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PackedTowerConfig, tower: PreTrainedModel | None = None):
        super().__init__(config)
        self.tower = AutoModel.from_config(config.vision_config) if tower is None else tower
        self.post_init()

    @classmethod
    def around(cls, tower: PreTrainedModel) -> "PackedTower":
        """A packed tower around one in memory, its weights shared."""
        attention = tower.config._attn_implementation  # a config around this one resets it
        for module in tower.modules():
            module._is_hf_initialized = True  # keeps `post_init` from drawing new weights
        config = PackedTowerConfig(vision_config=tower.config)
        config._attn_implementation = attention
        return cls(config, tower)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.tower.get_input_embeddings()

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    def _pictures(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs) -> list:
        """The tower's output for each picture, (outputs, place in their batch, number of tokens)."""
        if self.config.vision_config.model_type == "s2_vision":
            outputs = self.tower(pixel_values, image_sizes=image_sizes, **kwargs)
            return [(outputs, index, count) for index, count in enumerate(outputs.num_tokens.tolist())]
        # The count decides, not the threshold: the scores of a half-precision tower may differ from the processor's.
        counts = torch.as_tensor(image_sizes).prod(dim=-1).tolist()
        pictures: list = [None] * len(counts)
        for count in sorted(set(counts)):
            places = [index for index, other in enumerate(counts) if other == count]
            outputs = self.tower(pixel_values[places], num_tokens=count, **kwargs)
            for row, index in enumerate(places):
                pictures[index] = (outputs, row, count)
        return pictures

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: what the tower takes.
            image_sizes: (batch, 2), as `PerPictureLlavaProcessor` gives them.

        Raises:
            ValueError: without `image_sizes`: the processor does not match.
        """
        if image_sizes is None:
            raise ValueError(
                "`image_sizes` is required: this tower gives every picture its own number of tokens. Use "
                "the processor that `swap_vision_tower` or "
                "`set_token_budget` returned."
            )
        pictures = self._pictures(pixel_values, image_sizes, output_hidden_states=output_hidden_states, **kwargs)
        num_prefix_tokens = self.config.vision_config.num_prefix_tokens

        def packed(states: Sequence[torch.Tensor]) -> torch.Tensor:
            """One tensor (batch, tokens, hidden) a picture -> (1, tokens of all pictures, hidden)"""
            tokens = [
                state[row, num_prefix_tokens : num_prefix_tokens + count]
                for state, (_, row, count) in zip(states, pictures, strict=True)
            ]
            return torch.cat(tokens)[None]

        hidden_states = None
        if pictures[0][0].hidden_states is not None:
            per_layer = zip(*(outputs.hidden_states for outputs, _, _ in pictures), strict=True)
            hidden_states = tuple(None if states[0] is None else packed(states) for states in per_layer)
        return BaseModelOutputWithPooling(
            last_hidden_state=packed([outputs.last_hidden_state for outputs, _, _ in pictures]),
            pooler_output=torch.stack([outputs.pooler_output[row] for outputs, row, _ in pictures]),
            hidden_states=hidden_states,
        )


class PerPictureLlavaProcessor(LlavaProcessor):
    """A `LlavaProcessor` for towers that give each picture its own number of tokens: it counts them, and says so in
    `image_sizes`.

    Args:
        image_processor: the tower's; of Dynamic-S2 it says how many tiles a picture has.
        tokenizer: the model's.
        patch_size: pixels of `image_sizes` a token: `PackedTower.patch_size`.
        quadtree: of a Quadtree ViT: `min_patch_size`, `max_patch_size`, `split_threshold` and `num_tokens` (the
            maximum, or None).
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy="full",
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        quadtree: dict | None = None,
        **kwargs,
    ):
        self.quadtree = quadtree
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def count_tokens(self, pixel_values: torch.Tensor) -> list[int]:
        """Tokens of each picture (batch, channels, height, width) under the quadtree's threshold."""
        scorer = PixelBlurPatchScorer(self.quadtree["min_patch_size"], self.quadtree["max_patch_size"])
        scores = scorer.score(pixel_values.float())
        selected = quadtree_tokens(scores, self.quadtree.get("num_tokens"), self.quadtree["split_threshold"])
        return selected.mask.sum(dim=1).tolist()

    def _process_images(self, images, **kwargs):
        processed = self.image_processor(images, **kwargs)
        if self.quadtree is not None:
            pixel_values = torch.stack([torch.as_tensor(picture) for picture in processed["pixel_values"]])
            processed["image_sizes"] = torch.tensor([[count, 1] for count in self.count_tokens(pixel_values)])
        num_images = len(processed["image_sizes"])
        return processed, [self.replace_image_token(processed, index) for index in range(num_images)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        return self.image_token * ((height // self.patch_size) * (width // self.patch_size))

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs
    ) -> MultiModalData:
        """Tokens of pictures of (height, width) pixels; with a quadtree they depend on what the pictures show.

        Raises:
            ValueError: with a quadtree.
        """
        if image_sizes is None:
            return MultiModalData()
        if self.quadtree is not None:
            raise ValueError(
                "With `split_threshold` the tokens of a picture depend on what it shows, not only on its size."
            )
        per_tile = self.image_processor.tile_size // self.patch_size
        counts = [
            rows * columns * per_tile**2 for rows, columns in map(self.image_processor.tile_grid_for, image_sizes)
        ]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))


AutoConfig.register(PackedTowerConfig.model_type, PackedTowerConfig, exist_ok=True)
AutoModel.register(PackedTowerConfig, PackedTower, exist_ok=True)
AutoProcessor.register(PackedTowerConfig, PerPictureLlavaProcessor, exist_ok=True)

__all__ = ["PackedTower", "PackedTowerConfig", "PerPictureLlavaProcessor", "has_tokens_per_picture"]
