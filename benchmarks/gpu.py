"""All families on a GPU in bfloat16: eager, compiled, a frozen budget, hidden synchronisations, packed attention.

    python benchmarks/gpu.py [--device cuda] [--batch 64] [--rounds 20] [--minutes 7.5] [--eager] [--tiny]

Each line is printed as soon as it is measured. What has not begun when the minutes are over is left out, and named.
`--tiny --device cpu` runs every line on tiny models: a check of this script, not of a machine.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    S2VisionConfig,
    S2VisionForImageClassification,
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerForVideoClassification,
    SparseFormerVideoConfig,
)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def families(tiny: bool) -> dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], dict]]:
    """Name -> (what makes the model, shape of one input, budget of the call)."""
    encoder = SMALL if tiny else {}
    clip = CLIPVisionConfig(**(SMALL | {"intermediate_size": 128, "image_size": 64, "patch_size": 32} if tiny else {}))
    sparse = "sparseformer_v1_tiny"
    video = {"num_frames": 4} if tiny else {}
    side = 64 if tiny else 224
    return {
        "FlexiViT-B, patch 16": (
            lambda: FlexiViTForImageClassification(FlexiViTConfig(**encoder)),
            (3, 240, 240),
            {"patch_size": 16},
        ),
        "FlexiViT-B, patch 30": (
            lambda: FlexiViTForImageClassification(FlexiViTConfig(**encoder)),
            (3, 240, 240),
            {"patch_size": 30},
        ),
        "Quadtree ViT-B, 100 tokens": (
            lambda: QuadtreeViTForImageClassification(QuadtreeViTConfig(**encoder)),
            (3, 256, 256),
            {"num_tokens": 100},
        ),
        "SparseFormer v1 tiny": (
            lambda: SparseFormerForImageClassification(SparseFormerConfig.preset(sparse)),
            (3, side, side),
            {},
        ),
        "SparseFormer video": (
            lambda: SparseFormerForVideoClassification(SparseFormerVideoConfig(**video)),
            (4 if tiny else 8, 3, side, side),
            {},
        ),
        "S2 around CLIP-B/32": (
            lambda: S2VisionForImageClassification(S2VisionConfig(vision_config=clip, scales=[1, 2])),
            (3, 2 * side, 2 * side),
            {},
        ),
    }


class Clock:
    """Times calls on a device, and knows when the minutes are over."""

    def __init__(self, device: str, rounds: int, minutes: float):
        self.device, self.rounds = device, rounds
        self.end = time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        times = []
        for _ in range(self.rounds):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return 1000 * median(times)


def synchronisations(call: Callable[[], object], device: str) -> str:
    """Whether a warm call waits for the GPU."""
    if device == "cpu":
        return "no GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return f"waits for the GPU: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never waits for the GPU"


def measure(
    name: str, make: Callable, shape: tuple, budget: dict, batch: int, clock: Clock, compiles: bool = True
) -> None:
    torch.manual_seed(0)
    model = make().eval().to(clock.device, torch.bfloat16)
    inputs = torch.randn(batch, *shape, device=clock.device, dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        return model(inputs, **budget).logits

    if clock.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    eager = clock.milliseconds(call)
    memory = 0 if clock.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    print(f"{name:<28} eager    {eager:9.2f} ms {1000 * batch / eager:9.0f} images/s {memory:8.0f} MiB", flush=True)
    print(f"{'':<28} {synchronisations(call, clock.device)}", flush=True)
    if hasattr(model, "freeze_budget"):
        model.freeze_budget(image_size=shape[-2:], **budget)
        frozen = clock.milliseconds(call)
        print(f"{'':<28} frozen   {frozen:9.2f} ms {1000 * batch / frozen:9.0f} images/s", flush=True)
        model.unfreeze_budget()
    if not compiles or clock.is_over:
        print(f"{'':<28} compiled: left out")
        return
    compiled_model = torch.compile(model, fullgraph=True)
    start = time.monotonic()
    compiled = clock.milliseconds(lambda: compiled_model(inputs, **budget).logits)
    seconds = time.monotonic() - start
    rate = f"{1000 * batch / compiled:9.0f} images/s"
    print(f"{'':<28} compiled {compiled:9.2f} ms {rate} ({seconds:.0f} s to compile and time)", flush=True)
    torch.compiler.reset()


def packed_attention(clock: Clock, batch: int) -> None:
    """Attention of sequences of unequal length: padded with a mask, against torch's flash attention on packed ones."""
    from torch.nn.attention.varlen import varlen_attn

    longest, place = 256, {"device": clock.device, "dtype": torch.bfloat16}
    for shortest in (16, 200):
        lengths = torch.randint(shortest, longest + 1, (batch,), generator=torch.Generator().manual_seed(0))
        total = int(lengths.sum())
        padded = [torch.randn(batch, 12, longest, 64, **place) for _ in range(3)]
        mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(clock.device)
        attend = partial(F.scaled_dot_product_attention, *padded, attn_mask=mask)
        padded_ms = clock.milliseconds(attend)
        title = f"attention, {shortest} to {longest} tokens ({total / (batch * longest):.0%} real)"
        print(f"{title}: padded {padded_ms:.3f} ms", end="", flush=True)
        if clock.device == "cpu":
            print("   packed: no GPU")
            continue
        packed = [torch.randn(total, 12, 64, **place) for _ in range(3)]
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(clock.device, torch.int32)
        packed_ms = clock.milliseconds(partial(varlen_attn, *packed, starts, starts, longest, longest))
        print(f"   packed {packed_ms:.3f} ms   ratio {padded_ms / packed_ms:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each case")
    parser.add_argument("--minutes", type=float, default=7.5, help="after these no further case begins")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a check of this script")
    arguments = parser.parse_args()
    clock = Clock(arguments.device, arguments.rounds, arguments.minutes)
    where = "CPU" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, bfloat16\n")
    with torch.inference_mode():
        packed_attention(clock, arguments.batch)
        for batch in dict.fromkeys((1, arguments.batch)):
            print(f"\nbatch {batch}")
            for name, (make, shape, budget) in families(arguments.tiny).items():
                if clock.is_over:
                    print(f"{name:<28} left out, no time")
                    continue
                count = max(batch // 8, 1) if len(shape) == 4 else batch  # videos are as large as several images
                measure(name, make, shape, budget, count, clock, not arguments.eager)


if __name__ == "__main__":
    main()
