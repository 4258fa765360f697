"""How a token budget is asked of a model, whatever its family: a mixin of the configs, and functions on any config."""

import copy
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..utils.vision_configs import base_feature_grid, base_num_prefix_tokens


# Every word in which some family is asked for a budget; `register_family` adds those of each.
_BUDGET_WORDS: set[str] = set()


class TokenBudgetMixin:
    """What the config of a family says about its token budget. Goes in front of `PreTrainedConfig`.

    Attributes:
        budget_argument (`str` or `None`): name of the keyword argument of `forward`, and of the config field, that
            sets the budget of a call; `None` where the weights fix it.
        changeable_fields (`tuple[str, ...]`): what `with_budget` can change without new weights.
        fixed_fields (`dict[str, str]`): budget words that need new weights, each with the reason.
        tokens_vary (`bool`): whether the number of tokens differs from image to image of one size.
    """

    budget_argument = None
    changeable_fields = ()
    fixed_fields = {}
    tokens_vary = False

    def default_budgets(self) -> list:
        """Values of the budget argument to try when a user names none; `[None]` where there is no such argument."""
        return [None if self.budget_argument is None else getattr(self, self.budget_argument)]

    def budget_ladder(self, image_size: int | Sequence[int] | None = None) -> list:
        """Values of the budget argument from few tokens to many, for a user who looks around: the default ones that an
        image of this size allows. A family overrides it where other budgets need no training of their own.
        """
        budgets, costs = self.default_budgets(), []
        for budget in budgets if self.budget_argument else ():
            with suppress(ValueError):
                costs.append((self.max_num_tokens_for(image_size, **{self.budget_argument: budget}), budget))
        return [budget for _, budget in sorted(costs, key=lambda cost: cost[0])] or budgets

    def budget_for_share(self, image_size: int | Sequence[int] | None, share: float) -> Any:
        """The budget whose tokens are nearest to a share of the full budget, which costs the most that makes sense.

        Args:
            image_size (`int` or `(height, width)`): in pixels; the config's own when `None`.
            share (`float`): above 0, at most 1.

        Returns:
            A value of the budget argument; the default one where there is nothing to choose.
        """
        return self.default_budgets()[0]

    def parse_budget(self, text: str) -> Any:
        """The value of the budget argument that a user types: "16" -> 16. Families with other values override it.

        Raises:
            ValueError: for any other text.
        """
        try:
            return int(text)
        except ValueError:
            raise ValueError(
                f"`budgets` of a model of type {self.model_type!r} must be a `{self.budget_argument}` such as 16, got "
                f"{text!r}."
            ) from None

    def format_budget(self, budget: Any) -> str:
        """The text that `parse_budget` reads as `budget`."""
        return str(budget)

    def num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int | None:
        """How many tokens an image costs, prefix tokens not counted; `None` where that depends on what it shows.

        Args:
            image_size (`int` or `(height, width)`, *optional*): in pixels; the config's own when `None`.
            budget: the budget argument of `forward`, if any; as the config says when left out.
        """
        grid = self.token_grid_for(image_size, **budget)
        return None if grid is None else grid[0] * grid[1]

    def max_num_tokens_for(self, image_size: int | Sequence[int] | None = None, **budget) -> int:
        """The most tokens that an image of this size can cost: `num_tokens_for`, where that is known."""
        return self.num_tokens_for(image_size, **budget)

    def token_grid_for(self, image_size: int | Sequence[int] | None = None, **budget) -> tuple[int, int] | None:
        """(rows, columns) of the tokens; `None` where they are no grid. Arguments: `num_tokens_for`."""
        return None

    def feature_grid_for(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int] | None:
        """(rows, columns) of the dense feature maps made from the tokens; `None` where tokens have no place."""
        return self.token_grid_for(image_size)

    def resolve_budget(self, **changes) -> dict[str, Any]:
        """Config fields for the words in which a user asks for a budget; a family adds words that are no fields."""
        return dict(changes)

    def with_budget(self, **changes) -> "TokenBudgetMixin":
        """A checked copy of this config at another budget.

        Args:
            changes: names of `changeable_fields` and their values.

        Raises:
            ValueError: for what cannot change without new weights (with the reason), or a value that is not legal.
        """
        if not changes:
            raise ValueError(f"Give at least one of {', '.join(f'`{name}`' for name in self.changeable_fields)}.")
        for name in changes:
            if name not in self.changeable_fields:
                reason = f": {self.fixed_fields[name]}" if name in self.fixed_fields else ""
                raise ValueError(
                    f"`{name}` cannot change in a model of type {self.model_type!r}{reason}. What can: "
                    f"{', '.join(self.changeable_fields) or 'nothing'}."
                )
        changed = copy.deepcopy(self)
        try:
            for name, value in self.resolve_budget(**changes).items():
                setattr(changed, name, value)
            type(self).from_dict(changed.to_dict())  # runs the config's own checks
        except StrictDataclassError as error:
            raise ValueError(f"{changes} is no budget of a model of type {self.model_type!r}: {error}") from error
        return changed

    def gives_tokens_at(self, layer: int) -> bool:
        """Whether `hidden_states[layer]` exists, and has the width and the prefix tokens of the last layer."""
        count = self.num_hidden_layers + 1
        return -count <= layer < count

    def hosted(self) -> tuple["TokenBudgetMixin", list[str]]:
        """The config of this model as the tower of a host that counts tokens beforehand and passes no budget.

        Returns:
            A copy, and what changed in it that the user should know, in sentences.
        """
        return copy.deepcopy(self), []

    def image_processor_fields(self) -> dict[str, Any]:
        """Fields of the image processor that follow from this config, its size aside."""
        return {}

    def budget_code(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The budget at which this config runs images of (height, width), as ints below 2 ** 20.

        A host carries them from the processor to the model. There are always as many of them, whatever the budget.
        Here: the bits of the budget argument, where that is a number.
        """
        value = None if self.budget_argument is None else getattr(self, self.budget_argument)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ()
        return struct.unpack("<4H", struct.pack("<d", value))

    def budget_from_code(self, code: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """Arguments of `forward` for a `budget_code` and the number of tokens that was counted for the image."""
        if self.budget_argument is None or len(code) != 4:
            return {}
        (value,) = struct.unpack("<d", struct.pack("<4H", *code))
        is_int = isinstance(getattr(self, self.budget_argument), int)
        return {self.budget_argument: int(value) if is_int else value}

    def count_images(
        self, pixel_values: Sequence[torch.Tensor], image_sizes: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[int, tuple[int, ...]]]:
        """The number of tokens and the `budget_code` of each image.

        Args:
            pixel_values (`Sequence[torch.Tensor]`): what the image processor made of each image.
            image_sizes (`Sequence`, *optional*): what it said about their sizes.
        """
        sizes = [tuple(image.shape[-2:]) for image in pixel_values]
        return [(self.num_tokens_for(size), self.budget_code(size)) for size in sizes]

    def budget_calls(
        self, codes: Sequence[tuple[int, ...]], counts: Sequence[int]
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """Which images of a batch go through the model together, and with which arguments: one forward per budget.

        Args:
            codes, counts: of each image, as `count_images` gives them.
        """
        places: dict[tuple, list[int]] = {}
        for place, budget in enumerate(zip(codes, counts, strict=True)):
            places.setdefault(budget, []).append(place)
        return [(group, self.budget_from_code(*budget)) for budget, group in places.items()]


def add_budget_words(config_class: type[PreTrainedConfig]) -> None:
    """Notes the budget words of a family: what its budget argument, changeable and fixed fields are called."""
    words = {*getattr(config_class, "changeable_fields", ()), *getattr(config_class, "fixed_fields", {})}
    argument = getattr(config_class, "budget_argument", None)
    words |= {argument} if isinstance(argument, str) else set()
    _BUDGET_WORDS.update(words - {"image_size"})


def registered_budget_words() -> frozenset[str]:
    """The budget words of all registered families."""
    return frozenset(_BUDGET_WORDS)


def budget_argument_of(config: PreTrainedConfig) -> str | None:
    """The name of the budget argument of a model's `forward`; `None` for any model without one."""
    return getattr(config, "budget_argument", None)


def default_budgets_of(config: PreTrainedConfig) -> list:
    """The budgets to try on a model when none are given; `[None]` for a model without any."""
    return config.default_budgets() if isinstance(config, TokenBudgetMixin) else [None]


def budget_ladder_of(config: PreTrainedConfig, image_size: int | Sequence[int] | None = None) -> list:
    """The budgets of a model from few tokens to many; `[None]` for a model without any."""
    return config.budget_ladder(image_size) if isinstance(config, TokenBudgetMixin) else [None]


def budget_kwargs(config: PreTrainedConfig, budget: Any) -> dict[str, Any]:
    """`budget` as keyword arguments of `forward`; none for `None`.

    Raises:
        ValueError: for a budget of a model that has none to choose.
    """
    if budget is None:
        return {}
    argument = budget_argument_of(config)
    if argument is None:
        raise ValueError(
            f"`budgets` must be None for a model of type {config.model_type!r}, which has no budget to choose; got "
            f"{budget!r}."
        )
    return {argument: budget}


@contextmanager
def token_budget(config: PreTrainedConfig, budget: Any) -> Iterator[None]:
    """Lets a model run at another budget by way of its config, for callers that pass no arguments to it.

    Args:
        config (`PreTrainedConfig`): of a model of any family. It is changed until the end of the `with` block: do not
            share it between threads.
        budget: a value of its budget argument; `None` leaves the model as it is.

    Raises:
        ValueError: for a budget on a model that has none to choose, or an illegal value.
    """
    fields = budget_kwargs(config, budget)
    before = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
    except StrictDataclassError as error:
        raise ValueError(f"`budgets` holds {budget!r}, no {name} of {config.model_type!r}: {error}") from error
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def count_tokens(
    outputs: ModelOutput, config: PreTrainedConfig, image_size: tuple[int, int], **budget
) -> list[int] | None:
    """How many real tokens each image of a batch cost: prefix tokens and padding are not counted.

    Args:
        outputs (`ModelOutput`): of the model, with or without a head.
        config (`PreTrainedConfig`): of the model.
        image_size (`(height, width)`): of `pixel_values`, in pixels.
        budget: what the call named, if anything.

    Returns:
        `list[int]`: one count per image where they differ, else a list of one; `None` where neither output nor config
        says.
    """
    mask, counts = getattr(outputs, "token_mask", None), getattr(outputs, "num_tokens", None)
    if mask is not None:
        return mask.sum(dim=1).tolist()
    if isinstance(counts, torch.Tensor):
        return counts.tolist()
    is_ours = isinstance(config, TokenBudgetMixin)
    if is_ours and not config.tokens_vary:
        count = config.num_tokens_for(image_size, **budget)
        if count is not None:
            return [count]
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        return None
    if hidden.ndim == 4:  # a convolutional network: (batch, hidden, rows, columns)
        return [hidden.shape[2] * hidden.shape[3]]
    grid = None if is_ours else base_feature_grid(config, image_size)
    if grid is not None and grid[0] * grid[1] <= hidden.shape[1]:
        return [grid[0] * grid[1]]
    return [hidden.shape[1] - base_num_prefix_tokens(config)]


def tokens_per_image(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], outputs: ModelOutput, **budget
) -> list[int]:
    """`count_tokens` for any model, with a head or without: where its outputs do not say, the model in it is asked.

    Args:
        model (`PreTrainedModel`): that gave `outputs`.
        inputs (`Mapping[str, torch.Tensor]`): what it was called with, `pixel_values` among it.
        outputs (`ModelOutput`): of the call.
        budget: what the call named, if anything.

    Returns:
        `list[int]`: one count for each image of the batch.
    """
    pixel_values = inputs["pixel_values"]
    size = tuple(pixel_values.shape[-2:])
    counts = count_tokens(outputs, model.config, size, **budget)
    if counts is None:
        with torch.no_grad():
            counts = count_tokens(model.base_model(**inputs, **budget), model.config, size, **budget)
    return counts * len(pixel_values) if len(counts) == 1 else counts


def parse_budget(config: PreTrainedConfig, text: str) -> Any:
    """The budget that a user types, for a model with this config.

    Raises:
        ValueError: for any other text, or a model that has no budget to choose.
    """
    budget_kwargs(config, text)
    return config.parse_budget(text)


def choose_budgets(config: PreTrainedConfig, words: Mapping[str, Sequence[str] | None]) -> list | None:
    """The budgets that a user typed, for a model with this config.

    Args:
        config (`PreTrainedConfig`): of the model.
        words (`Mapping[str, Sequence[str] or None]`): by option: "budgets", which fits every model that has any, and
            names of budget arguments ("patch_sizes", "num_tokens"), which fit the models that have this one.

    Returns:
        `list` or `None`: values of its budget argument; `None` where none was typed.

    Raises:
        ValueError: for two options, an option of another argument, or a text that is no budget.
    """
    given = {name: texts for name, texts in words.items() if texts is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"Give one of {', '.join(f'`{name}`' for name in given)}, not all: each names the budgets.")
    ((name, texts),) = given.items()
    if not texts:
        raise ValueError(f"`{name}` is empty: give at least one.")
    argument = next(iter(budget_kwargs(config, texts[0])))
    if name != "budgets" and name.removesuffix("s") != argument.removesuffix("s"):
        raise ValueError(
            f"`{name}` does not fit a model of type {config.model_type!r}, whose budget is its `{argument}`: give "
            "`budgets`."
        )
    return [parse_budget(config, text) for text in texts]


def format_budget(budget: Any, config: PreTrainedConfig | None = None) -> str:
    """A budget as a user types it for a model with this config; without one, 8 -> "8" and (4, 8) -> "4x8"."""
    if budget is None:
        return ""
    if isinstance(config, TokenBudgetMixin):
        return config.format_budget(budget)
    return "x".join(map(str, budget)) if isinstance(budget, list | tuple) else str(budget)


def plain_size(size: int | Sequence[int]) -> int | list[int]:
    """A size as JSON writes it: an int where both sides are equal."""
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else [height, width]


__all__ = [
    "TokenBudgetMixin",
    "add_budget_words",
    "budget_argument_of",
    "budget_kwargs",
    "budget_ladder_of",
    "choose_budgets",
    "count_tokens",
    "default_budgets_of",
    "format_budget",
    "parse_budget",
    "plain_size",
    "registered_budget_words",
    "token_budget",
    "tokens_per_image",
]
