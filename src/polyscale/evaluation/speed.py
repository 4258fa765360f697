"""How fast a model is at each token budget: the function behind `polyscale benchmark`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import PreTrainedModel

from ..layers.budget_choice import checked_budgets
from ..layers.token_budget import default_budgets_of
from ..utils.timing import device_wait, time_alternating
from ..utils.validation import check_int, to_pair
from .settings import Setting


@dataclass(frozen=True)
class SpeedResult:
    """Speed at one budget.

    Attributes:
        budget: value of the budget argument; `None` where the model has none to choose.
        tokens (`int` or `float`): tokens per image, prefix tokens and padding not counted; the mean where they differ.
        milliseconds (`float`): median time of a forward pass over the batch.
        images_per_second (`float`): images per second at that time.
        speedup (`float`): how many times as fast as the first budget.
        gflops (`float`): billions of floating-point operations per image in products, a multiplication and an
            addition counted as two.
    """

    budget: int | Sequence[int] | None
    tokens: int | float
    milliseconds: float
    images_per_second: float
    speedup: float
    gflops: float


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# The table of PyTorch leaves out the attention kernel that it takes on a CPU itself.
_FLOPS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _OperationCounter(TorchDispatchMode):
    """PyTorch's `FlopCounterMode` without its record per module, whose hooks need gradients."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = _FLOPS.get(func._overloadpacket)
        if count is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        return result


def count_gflops(call: Callable[[], object]) -> float:
    """Billions of floating-point operations that a call does in products (linear layers, convolutions, attention), a
    multiplication and an addition counted as two.
    """
    with _OperationCounter() as counter:
        call()
    return counter.operations / 1e9


def benchmark_budgets(
    model: PreTrainedModel,
    budgets: Sequence | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 8,
    rounds: int = 10,
) -> list[SpeedResult]:
    """Times a model on random images at each budget, alternating between the budgets.

    Args:
        model: a model of any family, on the device and in the dtype it is to run in.
        budgets: values of the model's budget argument; those of the config when None.
        image_size: (height, width) or int, in pixels; `config.image_size` when None.
        batch_size: images per forward pass.
        rounds: timed forward passes per budget; the median counts.

    Raises:
        ValueError: for budgets on a model that has none to choose, a budget that comes twice, or a budget, size or
            number that is not allowed.
    """
    check_int("batch_size", batch_size, minimum=1)
    check_int("rounds", rounds, minimum=1)
    budgets = default_budgets_of(model.config) if budgets is None else checked_budgets(budgets, model.config)
    settings = [Setting(budget) for budget in budgets]
    return time_settings(model, settings, image_size=image_size, batch_size=batch_size, rounds=rounds)


@torch.inference_mode()
def time_settings(
    model: PreTrainedModel,
    settings: Sequence[Setting],
    *,
    image_size: int | Sequence[int] | None,
    batch_size: int,
    rounds: int,
    images: torch.Tensor | None = None,
) -> list[SpeedResult]:
    """`benchmark_budgets` for any way to call a model, on `images` (batch_size, channels, height, width) if given."""
    pixel_values = _random_images(model, image_size, batch_size) if images is None else images
    pixel_values = pixel_values.to(device=model.device, dtype=model.dtype)

    tokens = []
    for setting in settings:
        with setting.named():
            tokens.append(_mean_tokens(model, pixel_values, setting))
    arguments = [setting.call(model.config) for setting in settings]
    calls = {str(index): partial(model, pixel_values, **chosen) for index, chosen in enumerate(arguments)}
    gflops = [count_gflops(call) / batch_size for call in calls.values()]
    seconds = time_alternating(calls, rounds, device_wait(model.device))
    medians = [median(seconds[name]) for name in calls]
    return [
        SpeedResult(
            budget=setting.budget,
            tokens=count,
            milliseconds=1000 * duration,
            images_per_second=batch_size / duration,
            speedup=medians[0] / duration,
            gflops=operations,
        )
        for setting, count, duration, operations in zip(settings, tokens, medians, gflops, strict=True)
    ]


def _random_images(model: PreTrainedModel, image_size: int | Sequence[int] | None, batch_size: int) -> torch.Tensor:
    if image_size is None:
        image_size = getattr(model.config, "image_size", None)
        if image_size is None:
            raise ValueError("`image_size` is needed: the model's config does not name one.")
    shape = (batch_size, getattr(model.config, "num_channels", 3), *to_pair(image_size, "image_size"))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _mean_tokens(model: PreTrainedModel, pixel_values: torch.Tensor, setting: Setting) -> int | float:
    outputs = model(pixel_values, **setting.call(model.config))
    counts = setting.tokens(model, {"pixel_values": pixel_values}, outputs)
    mean = sum(counts) / len(counts)
    return int(mean) if mean == int(mean) else round(mean, 1)


__all__ = ["SpeedResult", "benchmark_budgets", "count_gflops", "time_alternating", "time_settings"]
