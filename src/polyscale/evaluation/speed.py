"""How fast a model is at each token budget: the function behind `polyscale benchmark`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from transformers import PreTrainedModel

from ..layers.token_budget import budget_kwargs, count_tokens, default_budgets_of
from ..utils.validation import to_pair


@dataclass(frozen=True)
class SpeedResult:
    """Speed at one budget.

    Attributes:
        budget: patch size or token count; None where the model has none to choose.
        tokens: tokens a picture, prefix tokens not counted.
        milliseconds: median time of a forward pass over the batch.
        images_per_second: pictures a second at that time.
        speedup: how many times as fast as the first budget.
    """

    budget: int | Sequence[int] | None
    tokens: int
    milliseconds: float
    images_per_second: float
    speedup: float


def time_alternating(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times functions side by side, so that a machine whose speed changes does not favour one of them.

    Each is called once untimed; then each once a round, the order of a round being the reverse of the one before.

    Args:
        calls: the functions, by name.
        rounds: timed calls of each.
        synchronize: waits for the device to finish; called before and after each timed call.
        clock: the time in seconds.

    Returns:
        The seconds of each call, by name.
    """
    wait = synchronize or (lambda: None)
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds):
        for name in names:
            wait()
            start = clock()
            calls[name]()
            wait()
            seconds[name].append(clock() - start)
        names.reverse()
    return seconds


@torch.inference_mode()
def benchmark_budgets(
    model: PreTrainedModel,
    budgets: Sequence | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 8,
    rounds: int = 10,
) -> list[SpeedResult]:
    """Times a model on random pictures at each budget, alternating between the budgets.

    Args:
        model: a model of any family, on the device and in the dtype it is to run in.
        budgets: values of the model's budget argument; those of the config when None.
        image_size: (height, width) or int, in pixels; `config.image_size` when None.
        batch_size: pictures a forward pass.
        rounds: timed forward passes a budget; the median counts.

    Raises:
        ValueError: for budgets on a model that has none to choose, or a budget, size or number that is not allowed.
    """
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    budgets = default_budgets_of(model.config) if budgets is None else list(budgets)
    if not budgets:
        raise ValueError("`budgets` is empty: give at least one, or None for the model's own.")
    if image_size is None:
        image_size = getattr(model.config, "image_size", None)
        if image_size is None:
            raise ValueError("`image_size` is needed: the model's config does not name one.")
    shape = (batch_size, getattr(model.config, "num_channels", 3), *to_pair(image_size, "image_size"))
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pixel_values = pixel_values.to(device=model.device, dtype=model.dtype)

    arguments = [budget_kwargs(model.config, budget) for budget in budgets]
    size = tuple(pixel_values.shape[-2:])
    tokens = [
        count_tokens(model.base_model(pixel_values[:1], **chosen), model.config, size, **chosen)[0]
        for chosen in arguments
    ]
    calls = {str(index): partial(model, pixel_values, **chosen) for index, chosen in enumerate(arguments)}
    on_cpu = model.device.type == "cpu"
    seconds = time_alternating(calls, rounds, None if on_cpu else torch.accelerator.synchronize)
    medians = [median(seconds[name]) for name in calls]
    return [
        SpeedResult(
            budget=budget,
            tokens=count,
            milliseconds=1000 * duration,
            images_per_second=batch_size / duration,
            speedup=medians[0] / duration,
        )
        for budget, count, duration in zip(budgets, tokens, medians, strict=True)
    ]


__all__ = ["SpeedResult", "benchmark_budgets", "time_alternating"]
