"""The devices of a machine, by the names that users give them."""

import torch

from .validation import shown


def pick_device(device: str | int | torch.device | None = None) -> torch.device:
    """A device that is there; the machine's accelerator, else the CPU, when `None`.

    Raises:
        ValueError: for a name of no device, or a device that is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return accelerator or torch.device("cpu")
    there = ["cpu"]
    if accelerator is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        chosen = torch.device(None if isinstance(device, bool) else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be one of {', '.join(there)}, got {shown(device)}.") from error
    name = chosen.type if chosen.index is None else f"{chosen.type}:{chosen.index}"
    if name not in {*there, *(entry.partition(":")[0] for entry in there)}:
        raise ValueError(f"`device` {str(device)!r} is not on this machine, which has {', '.join(there)}.")
    return chosen


__all__ = ["pick_device"]
