"""What an evaluation is asked for beside its budgets, in one place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..utils.validation import check_flag, check_function, check_int, check_number


@dataclass(frozen=True)
class EvaluationOptions:
    """The arguments of `evaluate_budgets` that hold for every model, under the same names and with the same defaults.

    Raises:
        ValueError: for a value that no model could take, where it shows by itself.
    """

    image_sizes: Sequence | None = None
    merge_to: Sequence[int] | None = None
    shrink_to: Sequence | None = None
    crop_pct: float | None = None
    mean: str | Sequence[float] | None = None
    std: str | Sequence[float] | None = None
    interpolation: str | None = None
    batch_size: int = 64
    label_map: Mapping[str, str | int] | None = None
    per_class: bool = False
    progress: Callable[[int, int], object] | None = None

    def __post_init__(self):
        if self.crop_pct is not None:
            check_number("crop_pct", self.crop_pct)
        check_int("batch_size", self.batch_size, minimum=1)
        check_flag("per_class", self.per_class)
        check_function("progress", self.progress)

    def asking(self) -> list[str]:
        """The names of those that ask for rows, where they are given: some model must have one for each."""
        return [name for name in ("image_sizes", "merge_to", "shrink_to") if getattr(self, name) is not None]


__all__ = ["EvaluationOptions"]
