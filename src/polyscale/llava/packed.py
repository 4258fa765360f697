"""A vision tower with a token budget inside of a LLaVA model.

LLaVA takes images with different numbers of tokens in one way, that of Pixtral: the tower gives the tokens of all
images one after the other, and LLaVA splits them by `(image_sizes // tower.patch_size).prod(-1)`. So the processor
writes into `image_sizes` how many tokens an image has, and at which budget the tower has to run it. PaliGemma and
Gemma 3 pass no sizes, and take one tensor of tokens: there the budget stands above the pixels (`budget_pixels`), and
all images of a batch have the same number of tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from ..layers.pooled_only import layers_wanted
from ..layers.token_budget import TokenBudgetMixin
from ..layers.wrapping import OuterModelMixin, wrap_in_memory
from ..utils.transformers_internals import sub_config
from ..utils.validation import to_pair
from .budget_pixels import take_budgets


# A row of `image_sizes`: the number of tokens times UNIT, then UNIT plus each number of the budget code. LLaVA divides
# by UNIT and multiplies: the first entry counts, all others are 1.
UNIT = 2**20


def budget_row(num_tokens: int, code: Sequence[int]) -> list[int]:
    """The row of `image_sizes` for an image with that many tokens at the budget `code`."""
    return [num_tokens * UNIT, *(UNIT + number for number in code or (0,))]


def read_budget_row(row: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The inverse of `budget_row`.

    Raises:
        ValueError: for a row that `budget_row` did not make.
    """
    num_tokens, rest = divmod(row[0], UNIT)
    code = tuple(number - UNIT for number in row[1:])
    if num_tokens < 1 or rest or not code or not all(0 <= number < UNIT for number in code):
        raise ValueError(
            f"`image_sizes` holds {list(row)}, which is no token budget. Use the processor that `swap_vision_tower` "
            "or `set_token_budget` returned."
        )
    return num_tokens, code


@strict
class PackedTowerConfig(PreTrainedConfig):
    """Configuration of `PackedTower`.

    Args:
        vision_config (`PreTrainedConfig` or `dict`): of the tower inside, a model of this library.
        num_front_tokens (`int`, *optional*, defaults to 0): tokens of zeros in front of each image's, for hosts that
            drop as many.
        budget_in_pixels (`bool`, *optional*, defaults to `False`): whether the budget of a call stands above the
            pixels of its images, for hosts that pass nothing else; all images have the same number of tokens then.
        pooled_side (`int`, *optional*): the grid of tokens is averaged to a square of so many rows and columns.

    Raises:
        ValueError: for a tower without a token budget.
    """

    model_type = "polyscale_packed_tower"
    # Has to name a model that is there wherever this class is: it may travel without the families.
    sub_configs_defaults = {"vision_config": sub_config("clip_vision_model")}

    vision_config: dict | PreTrainedConfig | None = None
    num_front_tokens: int = 0
    budget_in_pixels: bool = False
    pooled_side: int | None = None

    def __post_init__(self, **kwargs):
        is_given = self.vision_config is not None  # transformers makes a default config to compare with
        super().__post_init__(**kwargs)
        if is_given and not isinstance(self.vision_config, TokenBudgetMixin):
            raise ValueError(
                f"`vision_config` must be that of a model with a token budget, got one of type "
                f"{self.vision_config.model_type!r}."
            )

    @property
    def tokens_vary(self) -> bool:
        """Whether images of one size have different numbers of tokens."""
        return self.vision_config.tokens_vary

    @property
    def hidden_size(self) -> int:
        return self.vision_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.vision_config.num_hidden_layers

    @property
    def image_size(self) -> int | Sequence[int]:
        """In pixels: int where it is a square, as hosts want it."""
        height, width = to_pair(self.vision_config.image_size, "image_size")
        return height if height == width else (height, width)

    @property
    def patch_size(self) -> int:
        """Pixels per token: hosts that lay tokens out as a grid divide `image_size` by it."""
        rows = self.pooled_side
        if rows is None:
            grid = None if self.tokens_vary else self.vision_config.token_grid_for()
            rows = None if grid is None else grid[0]
        return 1 if rows is None else to_pair(self.image_size, "image_size")[0] // rows


def inner_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a tower itself, without that of a `PackedTower` around it."""
    return config.vision_config if isinstance(config, PackedTowerConfig) else config


class PackedTower(OuterModelMixin, PreTrainedModel):
    """The tokens of a tower as a host wants them, without the tower's prefix tokens.

    With `image_sizes`: (1, tokens of all images, hidden), each image at its own budget. Without: (batch, tokens,
    hidden), all at the budget of the config, or with `config.budget_in_pixels` at the one above their pixels.
    """

    config: PackedTowerConfig
    base_model_prefix = "packed_tower"
    patch_size = UNIT  # what LLaVA divides `image_sizes` by

    def __init__(self, config: PackedTowerConfig, tower: PreTrainedModel | None = None):
        super().__init__(config)
        self.tower = AutoModel.from_config(config.vision_config) if tower is None else tower
        self.post_init()

    @classmethod
    def around(cls, tower: PreTrainedModel, **fields) -> "PackedTower":
        """A packed tower around one in memory, its weights shared; `fields` are those of its config."""
        return wrap_in_memory(cls, tower, lambda inner: PackedTowerConfig(vision_config=inner, **fields))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.tower.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        One forward of the tower inside, whatever the budgets in the batch; around an S2 without `dynamic`, and around
        a tower that merges tokens, one for each budget: there, under FSDP or ZeRO-3, where all processes must make the
        same number of them, give every process the same budgets.

        Args:
            pixel_values (`torch.Tensor`): what the tower takes.
            image_sizes (`torch.Tensor`, *optional*): (batch, numbers), as the processor gives them: the number of
                tokens and the budget of each image. They are read on the host: on an accelerator a synchronisation.
            output_hidden_states (`bool` or `int` or `list[int]`, *optional*): the layers that are wanted.
            kwargs: passed to the tower.

        Raises:
            ValueError: without `image_sizes` where the number of tokens depends on the image; for values that are no
                budget.
        """
        output_hidden_states = layers_wanted(output_hidden_states)
        config, is_one_by_one = self.config.vision_config, image_sizes is not None
        if is_one_by_one:
            budgets = [(*read_budget_row(row), None) for row in torch.as_tensor(image_sizes).tolist()]
        else:
            pixel_values, budgets = self._budgets_of_pixels(pixel_values)
        if budgets is None:
            return self._at_the_configured_budget(pixel_values, output_hidden_states=output_hidden_states, **kwargs)
        counts, codes, grids = zip(*budgets, strict=True)
        images: list = [None] * len(budgets)
        for places, arguments in config.budget_calls(codes, counts):
            own = pixel_values if len(places) == len(budgets) else pixel_values[places]
            outputs = self.tower(own, output_hidden_states=output_hidden_states, **arguments, **kwargs)
            for row, place in enumerate(places):
                images[place] = (outputs, row, counts[place])

        def packed(states: Sequence[torch.Tensor]) -> torch.Tensor:
            """One tensor (batch, tokens, hidden) for each image -> (1, tokens of all images, hidden)"""
            prefix = config.num_prefix_tokens
            rows = [state[row, prefix : prefix + count] for state, (_, row, count) in zip(states, images, strict=True)]
            for tokens, count in zip(rows, counts, strict=True):
                if len(tokens) != count:
                    raise ValueError(f"The budget says {count} tokens for an image that has {len(tokens)}.")
            if is_one_by_one:
                return torch.cat(rows)[None]
            return torch.cat([self._pooled(tokens[None], grid) for tokens, grid in zip(rows, grids, strict=True)])

        hidden_states = None
        if images[0][0].hidden_states is not None:
            per_layer = zip(*(outputs.hidden_states for outputs, _, _ in images), strict=True)
            hidden_states = tuple(None if states[0] is None else packed(states) for states in per_layer)
        return BaseModelOutputWithPooling(
            last_hidden_state=packed([outputs.last_hidden_state for outputs, _, _ in images]),
            pooler_output=torch.stack([outputs.pooler_output[row] for outputs, row, _ in images]),
            hidden_states=hidden_states,
        )

    def _budgets_of_pixels(
        self, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[int, tuple[int, ...], tuple[int, int] | None]] | None]:
        """The images, and of each its number of tokens, its budget code and its grid; `None` where they carry none.

        Raises:
            ValueError: for budgets that give the images different numbers of tokens, where the host takes one tensor.
        """
        is_square = pixel_values.shape[-2] == pixel_values.shape[-1]
        if is_square or not self.config.budget_in_pixels:  # no look at the values, which an accelerator would wait for
            return pixel_values, None
        pixel_values, numbers = take_budgets(pixel_values)
        if numbers is None:
            return pixel_values, None
        counts = {count for count, *_ in numbers}
        if len(counts) > 1 and self.config.pooled_side is None:
            raise ValueError(
                "The images of a batch must have the same number of tokens in this host, which takes one tensor of "
                f"them; got {sorted(counts)}. Run them in batches of their own."
            )
        return pixel_values, [
            (count, tuple(code), (rows, count // rows) if rows else None) for count, rows, *code in numbers
        ]

    def _pooled(self, tokens: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, tokens that the host wants, hidden)"""
        side = self.config.pooled_side
        if side is None:
            return tokens
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        return F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2)

    def _at_the_configured_budget(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        if self.config.tokens_vary:
            raise ValueError(
                "`image_sizes` is required: this tower gives every image its own number of tokens. Use the processor "
                "that `swap_vision_tower` or `set_token_budget` returned."
            )
        outputs = self.tower(pixel_values, **kwargs)
        config = self.config.vision_config
        prefix, front = config.num_prefix_tokens, self.config.num_front_tokens
        grid = None if self.config.pooled_side is None else config.token_grid_for(tuple(pixel_values.shape[-2:]))

        def patches(state: torch.Tensor | None) -> torch.Tensor | None:
            if state is None:
                return None
            tokens = self._pooled(state[:, prefix:], grid)
            return (
                torch.cat([tokens.new_zeros(len(tokens), front, tokens.shape[2]), tokens], dim=1) if front else tokens
            )

        states = outputs.hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=patches(outputs.last_hidden_state),
            pooler_output=outputs.pooler_output,
            hidden_states=None if states is None else tuple(patches(state) for state in states),
            attentions=outputs.get("attentions"),
        )


AutoConfig.register(PackedTowerConfig.model_type, PackedTowerConfig, exist_ok=True)
AutoModel.register(PackedTowerConfig, PackedTower, exist_ok=True)

__all__ = ["PackedTower", "PackedTowerConfig", "budget_row", "inner_config", "read_budget_row"]
