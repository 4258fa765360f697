"""FlexiViT against timm: one image in half precision first, then every patch size, and what a new size costs.

    python benchmarks/flexivit.py [--rounds 5] [--threads 2] [--device cuda] [--processor-time] [--quick]
        [--only small-batches linear-layers compiled int8 resizing attention training patch-sizes first-calls
        memory]
        [--dtypes bfloat16 float32]

The plain ViTs of timm have the same width, depth and heads, and the patch size built in. Both sides run in one
process, in turn; a ratio is the median of those within a round.
"""

import argparse
import copy
from functools import partial
from statistics import median

import timm
import torch
from timing import compare, parse_arguments, peak_memory, report, run_fresh
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, pi_resize_patch_embed, resize_abs_pos_embed
from polyscale.evaluation.speed import time_alternating
from polyscale.layers.attention import (
    attention_for,
    plain_attention_forward,
    plain_attention_limit,
    set_plain_attention_limit,
)


IMAGE_SIZE = 240
BATCH_SIZE = 8
PATCH_SIZES = (8, 10, 12, 15, 20, 24, 30, 40, 48)
LABELS = 1000
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SECTIONS = (
    *("small-batches", "linear-layers", "compiled", "int8"),
    *("resizing", "attention", "training", "patch-sizes", "first-calls", "memory"),
)


def plain_vit(patch_size: int) -> torch.nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=patch_size, embed_dim=768, depth=12, num_heads=12, num_classes=LABELS
    )


def small_batches(arguments: argparse.Namespace, settings: dict) -> None:
    """Batch 1 and 8, bfloat16 and float32, a frozen budget too."""
    goals = {(1, torch.bfloat16): 1.10, (1, torch.float32): 1.05, (8, torch.bfloat16): 1.10, (8, torch.float32): 1.0}
    for size in ("small", "base"):
        ours = FlexiViTForImageClassification(FlexiViTConfig.preset(f"flexivit_{size}", num_labels=LABELS)).eval()
        theirs = timm.create_model(f"flexivit_{size}", num_classes=LABELS).eval()
        for (batch, dtype), goal in goals.items():
            if dtype not in arguments.dtypes:
                continue
            place = {"device": arguments.device, "dtype": dtype}
            for model in (ours, theirs):
                model.to(**place)
            pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE).to(**place)
            title = f"FlexiViT-{size[0].upper()}, batch {batch}, {str(dtype).removeprefix('torch.')}"
            run = partial(ours, pixels, patch_size=16)
            compare(title, run, partial(theirs, pixels), goal=goal, **settings)
            ours.freeze_budget(IMAGE_SIZE, 16)
            compare(f"{title}, frozen", run, partial(theirs, pixels), goal=goal, **settings)
            ours.unfreeze_budget()


def linear_layers(arguments: argparse.Namespace, settings: dict) -> None:
    """How many times the time of its linear layers alone a forward pass of FlexiViT-B takes, batch 8."""
    config = FlexiViTConfig.preset("flexivit_base", num_labels=LABELS)
    model = FlexiViTForImageClassification(config).eval().to(arguments.device)
    for dtype in arguments.dtypes:
        model.to(dtype)
        pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE).to(arguments.device, dtype)
        tokens = torch.randn(BATCH_SIZE, config.max_num_tokens_for(IMAGE_SIZE, patch_size=16), config.hidden_size)
        wide = torch.randn(*tokens.shape[:2], config.intermediate_size).to(arguments.device, dtype)
        tokens = tokens.to(arguments.device, dtype)
        layers = [module for module in model.flexivit.layers.modules() if isinstance(module, torch.nn.Linear)]

        def products(layers=layers, tokens=tokens, wide=wide):
            for layer in layers:
                layer(tokens if layer.in_features == tokens.shape[-1] else wide)

        title = f"products / model, FlexiViT-B, {str(dtype).removeprefix('torch.')}"
        compare(title, partial(model, pixels, patch_size=16), products, goal=1 / 1.65, **settings)


def compiled(arguments: argparse.Namespace, settings: dict) -> None:
    """FlexiViT-B at batch 8, both sides under `torch.compile`."""
    ours = FlexiViTForImageClassification(FlexiViTConfig.preset("flexivit_base", num_labels=LABELS)).eval()
    theirs = timm.create_model("flexivit_base", num_classes=LABELS).eval()
    for dtype in arguments.dtypes:
        place = {"device": arguments.device, "dtype": dtype}
        pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE).to(**place)
        sides = [torch.compile(model.to(**place)) for model in (ours, theirs)]
        title = f"FlexiViT-B compiled, {str(dtype).removeprefix('torch.')}"
        compare(title, partial(sides[0], pixels, patch_size=16), partial(sides[1], pixels), goal=1.15, **settings)


def int8(arguments: argparse.Namespace, settings: dict) -> None:
    """One image through FlexiViT-B in int8 by torchao, against bfloat16 and float32."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = FlexiViTConfig.preset("flexivit_base", num_labels=LABELS)
    plain = FlexiViTForImageClassification(config).eval().to(arguments.device)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE).to(arguments.device)
    ways = {"weights": Int8WeightOnlyConfig(), "weights and activations": Int8DynamicActivationInt8WeightConfig()}
    for way, quantization in ways.items():
        quantized = copy.deepcopy(plain)
        quantize_(quantized, quantization)
        for dtype in arguments.dtypes:
            other = copy.deepcopy(plain).to(dtype)
            title = f"int8 {way} against {str(dtype).removeprefix('torch.')}"
            calls = (partial(quantized, pixels, patch_size=16), partial(other, pixels.to(dtype), patch_size=16))
            compare(title, *calls, goal=1.0, **settings)


def resizing(arguments: argparse.Namespace, settings: dict) -> None:
    """Kernel 32 -> 16 and positions 7 x 7 -> 15 x 15 of FlexiViT-B, apart from the model."""
    synchronize = None if arguments.device == "cpu" else torch.cuda.synchronize
    for dtype in arguments.dtypes:
        kernel = torch.randn(768, 3, 32, 32).to(arguments.device, dtype)
        positions = torch.randn(1, 49, 768).to(arguments.device, dtype)
        calls = {
            "kernel": partial(pi_resize_patch_embed, kernel, 16, "bilinear", False),
            "positions": partial(resize_abs_pos_embed, positions, 15, 7, 0, "bilinear"),
        }
        with torch.inference_mode():
            seconds = time_alternating(calls, 10 * arguments.rounds, synchronize, arguments.clock)
        parts = {name: 1000 * median(values) for name, values in seconds.items()}
        print(", ".join(f"{name} {value:.3f} ms" for name, value in parts.items()), end="; ")
        report(f"resizing in {str(dtype).removeprefix('torch.')}, ms", sum(parts.values()), at_most=0.9)


@torch.inference_mode()
def attention(arguments: argparse.Namespace, settings: dict) -> None:
    """The kernel that a call takes on this CPU against the faster one of the two, 12 heads 64 wide."""
    module = torch.nn.Identity().eval()
    module.is_causal = False
    for dtype in arguments.dtypes:
        for batch in (1, 64):
            for tokens in (4, 9, 16, 25, 36, 49, 64, *((225,) if batch == 1 else ())):
                heads = [torch.randn(batch, tokens, 768).to(dtype).unflatten(-1, (12, 64)).transpose(1, 2)] * 3
                kernels = {"fused": ALL_ATTENTION_FUNCTIONS["sdpa"], "formula": plain_attention_forward}
                taken = attention_for("sdpa", *heads[:2], needs_fused=False)
                calls = {
                    name: partial(kernel, module, *heads, None, scaling=0.125) for name, kernel in kernels.items()
                }
                seconds = time_alternating(calls, 5 * arguments.rounds, None, arguments.clock)
                spent = {name: median(values) for name, values in seconds.items()}
                name = next(name for name, kernel in kernels.items() if kernel is taken)
                times = ", ".join(f"{kernel} {1e6 * value:.0f} us" for kernel, value in spent.items())
                title = (
                    f"{str(dtype).removeprefix('torch.')}, batch {batch}, {tokens} tokens: {times}; takes the {name},"
                )
                report(f"{title} against the faster", spent[name] / min(spent.values()), at_most=1.03)


def training(arguments: argparse.Namespace, settings: dict) -> None:
    """A training step of FlexiViT-S in bfloat16 autocast, batch 32: the default kernel against torch's fused one."""
    model = FlexiViTForImageClassification(FlexiViTConfig.preset("flexivit_small", num_labels=LABELS))
    model.to(arguments.device).train()
    pixels = torch.randn(32, 3, IMAGE_SIZE, IMAGE_SIZE).to(arguments.device)
    default = plain_attention_limit(torch.bfloat16)

    def step(limit: int, patch_size: int) -> None:
        set_plain_attention_limit(limit, torch.bfloat16)
        with torch.inference_mode(False), torch.autocast(arguments.device, torch.bfloat16):
            model(pixels, patch_size=patch_size).logits.square().mean().backward()
            model.zero_grad()

    for patch_size in (60, 30, 20):
        title = f"FlexiViT-S, {(IMAGE_SIZE // patch_size) ** 2} tokens, training step"
        compare(title, partial(step, default, patch_size), partial(step, 0, patch_size), goal=1.0, **settings)
    set_plain_attention_limit(default, torch.bfloat16)


def patch_sizes(arguments: argparse.Namespace, settings: dict) -> None:
    """FlexiViT-B at batch 8, every patch size."""
    ours = FlexiViTForImageClassification(FlexiViTConfig.preset("flexivit_base", num_labels=LABELS)).eval()
    for dtype in arguments.dtypes:
        place, half = {"device": arguments.device, "dtype": dtype}, dtype == torch.bfloat16
        name = str(dtype).removeprefix("torch.")
        pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE).to(**place)
        ours.to(**place)
        theirs = timm.create_model("flexivit_base", num_classes=LABELS).eval().to(**place)
        calls = partial(ours, pixels, patch_size=16), partial(theirs, pixels)
        compare(f"patch 16, timm flexivit_base, {name}", *calls, goal=1.1 if half else 1.0, **settings)
        for patch_size in PATCH_SIZES[::-1][:6] if arguments.quick else PATCH_SIZES[::-1]:
            theirs = plain_vit(patch_size).eval().to(**place)
            calls = partial(ours, pixels, patch_size=patch_size), partial(theirs, pixels)
            title = f"patch {patch_size}, plain ViT of timm, {name}"
            compare(title, *calls, goal=1.1 if half else 0.97, **settings)


def first_calls(arguments: argparse.Namespace, settings: dict) -> None:
    """What the first call at a patch size costs more than the next."""
    extra = run_fresh(_FIRST_CALLS.format(sizes=PATCH_SIZES, **globals()), arguments.threads)
    print("\nembedding one image, first call at a new patch size less the next (ms):")
    print("  " + ", ".join(f"{size}: {value:.1f}" for size, value in zip(PATCH_SIZES, extra, strict=True)))
    report("the largest of them", max(extra), at_most=50)


def memory(arguments: argparse.Namespace, settings: dict) -> None:
    """Peak memory beside a plain ViT."""
    print(f"\npeak memory of a forward pass, batch {BATCH_SIZE}, float32, CPU, fresh processes (MiB):")
    for patch_size in (16, 32):
        mine, other = (
            peak_memory(_IMPORTS, code.format(patch_size=patch_size, **globals()), arguments.threads)
            for code in (_OUR_PASS, _THEIR_PASS)
        )
        report(f"patch {patch_size:<3} ours {mine:7.0f}   plain ViT {other:7.0f}   ratio", mine / other, at_most=1.05)


def main() -> None:
    options = {
        "--only": {"nargs": "+", "choices": SECTIONS, "default": SECTIONS},
        "--dtypes": {"nargs": "+", "choices": DTYPES, "default": list(DTYPES)},
    }
    arguments = parse_arguments("FlexiViT at 240 px against timm", rounds=5, options=options)
    arguments.dtypes = [DTYPES[name] for name in arguments.dtypes]
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    for section in arguments.only:
        print(f"\n{section}")
        globals()[section.replace("-", "_")](arguments, settings)


_IMPORTS = """
import torch, timm
from polyscale import FlexiViTConfig, FlexiViTForImageClassification
"""

_FIRST_CALLS = (
    _IMPORTS
    + """
import time
from statistics import median
model = FlexiViTForImageClassification(FlexiViTConfig.preset("flexivit_base")).eval()
embeddings = model.base_model.embeddings
pixels = torch.randn(1, 3, {IMAGE_SIZE}, {IMAGE_SIZE})
def call(size):
    start = time.perf_counter()
    embeddings(pixels, size)
    return 1000 * (time.perf_counter() - start)
extra = []
with torch.inference_mode():
    call(32)
    for size in {sizes}:
        first = call(size)
        extra.append(first - median(call(size) for _ in range(5)))
print(*extra)
"""
)

_OUR_PASS = """
model = FlexiViTForImageClassification(FlexiViTConfig.preset("flexivit_base", num_labels={LABELS})).eval()
with torch.inference_mode():
    model(torch.randn({BATCH_SIZE}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), patch_size={patch_size})
"""

_THEIR_PASS = """
model = timm.models.vision_transformer.VisionTransformer(
    img_size={IMAGE_SIZE}, patch_size={patch_size}, embed_dim=768, depth=12, num_heads=12, num_classes={LABELS}
).eval()
with torch.inference_mode():
    model(torch.randn({BATCH_SIZE}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}))
"""


if __name__ == "__main__":
    main()
