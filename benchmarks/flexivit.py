"""FlexiViT-B against timm: speed at every patch size, cost of a new patch size, peak memory.

    python benchmarks/flexivit.py [--rounds 5] [--threads 2] [--device cuda] [--processor-time] [--quick]

The plain ViTs of timm have the same width, depth and heads, and the patch size built in.
"""

import timm
import torch
from timing import compare, parse_arguments, peak_memory, report, run_fresh

from polyscale import FlexiViTConfig, FlexiViTForImageClassification


IMAGE_SIZE = 240
BATCH_SIZE = 8
PATCH_SIZES = (8, 10, 12, 15, 20, 24, 30, 40, 48)
LABELS = 1000


def plain_vit(patch_size: int) -> torch.nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=IMAGE_SIZE, patch_size=patch_size, embed_dim=768, depth=12, num_heads=12, num_classes=LABELS
    )


def main() -> None:
    arguments = parse_arguments("FlexiViT-B at 240 px, batch 8, against timm", rounds=5)
    place = {"device": arguments.device, "dtype": arguments.dtype}
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE).to(**place)
    ours = FlexiViTForImageClassification(FlexiViTConfig.preset("flexivit_base", num_labels=LABELS)).eval().to(**place)

    theirs = timm.create_model("flexivit_base", num_classes=LABELS).eval().to(**place)
    compare(
        "patch 16, timm flexivit_base",
        lambda: ours(pixels, patch_size=16),
        lambda: theirs(pixels),
        goal=1.0,
        **settings,
    )
    for patch_size in PATCH_SIZES[::-1][:6] if arguments.quick else PATCH_SIZES[::-1]:
        theirs = plain_vit(patch_size).eval().to(**place)
        compare(
            f"patch {patch_size}, plain ViT of timm",
            lambda size=patch_size: ours(pixels, patch_size=size),
            lambda model=theirs: model(pixels),
            goal=0.97,
            **settings,
        )

    extra = run_fresh(_FIRST_CALLS.format(sizes=PATCH_SIZES, **globals()), arguments.threads)
    print("\nembedding one picture, first call at a new patch size less the next (ms):")
    print("  " + ", ".join(f"{size}: {value:.1f}" for size, value in zip(PATCH_SIZES, extra, strict=True)))
    report("the largest of them", max(extra), at_most=50)

    print(f"\npeak memory of a forward pass, batch {BATCH_SIZE}, float32, CPU, fresh processes (MiB):")
    for patch_size in (16, 32):
        mine, other = (
            peak_memory(_IMPORTS, code.format(patch_size=patch_size, **globals()), arguments.threads)
            for code in (_OUR_PASS, _THEIR_PASS)
        )
        report(f"patch {patch_size:<3} ours {mine:7.0f}   plain ViT {other:7.0f}   ratio", mine / other, at_most=1.05)


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
