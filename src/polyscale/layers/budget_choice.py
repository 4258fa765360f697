"""The budgets that a caller gives for a model: a list of them, each once; and which of them an error is about."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from ..utils.arrays import plain_values
from ..utils.validation import check_distinct, check_list
from .token_budget import budget_kwargs


def _key(budget: Any) -> Hashable:
    """The same for budgets that are the same: (8, 8), [8, 8] and 8 are."""
    if isinstance(budget, list | tuple):
        parts = tuple(map(_key, budget))
        return parts[0] if len(parts) == 2 and parts[0] == parts[1] else parts
    return budget if isinstance(budget, Hashable) else repr(budget)


def distinct_budgets(budgets: object, name: str = "budgets") -> list:
    """The budgets that a caller gives by the argument `name`, as a list.

    Raises:
        ValueError: for no list, an empty one, or a budget that comes twice.
    """
    entries = check_list(name, budgets, what="budgets")
    entries = plain_values(entries)
    check_distinct(name, entries, map(_key, entries))
    return entries


def checked_budgets(budgets: object, config: PreTrainedConfig, name: str = "budgets") -> list:
    """`distinct_budgets` for a model with this config.

    Raises:
        ValueError: as there, and for any budget on a model that has none to choose.
    """
    entries = distinct_budgets(budgets, name)
    for entry in entries:
        budget_kwargs(config, entry)
    return entries


@contextmanager
def at_budget(budget: Any, name: str = "budgets") -> Iterator[None]:
    """Says in a model's `ValueError` at which budget it was raised.

    Args:
        budget: the budget; `None`, the model's own, is nobody's choice and not said.
        name (`str`, *optional*, defaults to `"budgets"`): of the argument that gave it.
    """
    try:
        yield
    except ValueError as error:
        if budget is None:
            raise
        raise ValueError(f"`{name}` {budget!r}: {error}") from error


__all__ = ["at_budget", "checked_budgets", "distinct_budgets"]
