"""The one timer: a call, and several calls side by side."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch


Result = TypeVar("Result")


def device_wait(device: torch.device) -> Callable[[], object]:
    """A function that waits until a device has done what it was given; on a CPU there is nothing to wait for."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def timed(
    call: Callable[[], Result],
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Result, float]:
    """What a call returns, and the seconds it took.

    Args:
        call (`Callable`): without arguments.
        synchronize (`Callable`, *optional*): waits for the device to finish; called before and after.
        clock (`Callable`, *optional*, defaults to `time.perf_counter`): the time in seconds.
    """
    wait = synchronize or (lambda: None)
    wait()
    start = clock()
    result = call()
    wait()
    return result, clock() - start


def time_alternating(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    synchronize: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times functions side by side, so that a machine whose speed changes does not favour one of them.

    Each is called once untimed; then each once per round, the order of a round being the reverse of the one before.

    Args:
        calls (`Mapping[str, Callable]`): the functions, by name.
        rounds (`int`, *optional*, defaults to 10): timed calls of each.
        synchronize, clock: as in `timed`.

    Returns:
        `dict[str, list[float]]`: the seconds of each call, by name.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds):
        for name in names:
            seconds[name].append(timed(calls[name], synchronize, clock)[1])
        names.reverse()
    return seconds


__all__ = ["device_wait", "time_alternating", "timed"]
