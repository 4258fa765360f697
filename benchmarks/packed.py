"""Packed against padded batches, side by side: images with token counts of their own in one batch.

    python benchmarks/packed.py [--rounds 9] [--threads 1] [--processor-time] [--quick] [--csv FILE]

An encoder of 6 layers of 384 channels, 16 images; the share of real tokens is that of the batch padded to the longest.
"packed" and "padded" are `pack_tokens=True` and `False`, "auto" is the default.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from timing import parse_arguments, write_rows

from polyscale import QuadtreeViTConfig, QuadtreeViTModel, sample_photographs
from polyscale.evaluation.speed import time_alternating
from polyscale.layers.encoder import make_encoder_layers
from polyscale.layers.encoder_config import EncoderConfig
from polyscale.layers.encoding import run_layers
from polyscale.layers.packing import Padding
from polyscale.utils.images import open_image


SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
BATCH, LONGEST = 16, 257
MODES = {"padded": False, "packed": True, "auto": "auto"}
SHARES = (0.3, 0.45, 0.6, 0.75, 0.9, 0.95, 0.98, 1.0)


def lengths_of_share(share: float) -> list[int]:
    """Lengths of a batch, the longest among them, whose real tokens are about that share of the padded ones."""
    if share == 1:
        return [LONGEST] * BATCH
    rest = round((share * BATCH - 1) * LONGEST)  # tokens of all but the longest image
    mean = rest / (BATCH - 1)
    spread = min(mean - 1, LONGEST - mean)
    steps = [2 * place / (BATCH - 2) - 1 for place in range(BATCH - 1)]  # from -1 to 1
    return [LONGEST, *(round(mean + spread * step) for step in steps)]


def times_of(
    config: EncoderConfig, run: Callable[[], torch.Tensor], arguments: argparse.Namespace
) -> dict[str, float]:
    """Median milliseconds of `run` in each mode; the modes take turns."""

    def in_mode(mode: bool | str) -> torch.Tensor:
        config.pack_tokens = mode
        return run()

    sides = {name: partial(in_mode, mode) for name, mode in MODES.items()}
    seconds = time_alternating(sides, arguments.rounds, None, arguments.clock)
    return {name: 1000 * median(values) for name, values in seconds.items()}


def difference(config: EncoderConfig, run: Callable[[], torch.Tensor]) -> float:
    """The largest difference between packed and padded."""
    results = []
    for mode in (True, False):
        config.pack_tokens = mode
        results.append(run())
    return (results[0] - results[1]).abs().max().item()


def encoder_case(share: float) -> tuple[EncoderConfig, Callable[[], torch.Tensor], float]:
    """Layers on random tokens: the config, a run that gives the real tokens, and the exact share of them."""
    config = EncoderConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    layers = make_encoder_layers(config).eval()
    lengths = lengths_of_share(share)
    padding = Padding(torch.arange(LONGEST) < torch.tensor(lengths)[:, None], lengths)
    tokens = torch.randn(BATCH, LONGEST, config.hidden_size)
    run = partial(run_layers, layers, tokens, config, padding=padding)
    return config, lambda: run()[padding.mask], sum(lengths) / (BATCH * LONGEST)


def quadtree_case(quantile: float) -> tuple[EncoderConfig, Callable[[], torch.Tensor], float]:
    """A whole Quadtree ViT on crops of the sample photographs, at a threshold that splits a share of the patches."""
    config = QuadtreeViTConfig(**SHAPE, image_size=256, min_patch_size=16, max_patch_size=64, reduction="antialias")
    model = QuadtreeViTModel(config).eval()
    images = photographs()
    scores = torch.cat([score.flatten() for score in model(images, output_split_scores=True).split_scores])
    threshold = scores.quantile(1 - quantile).item()
    mask = model(images, split_threshold=threshold).token_mask
    run = partial(model, images, split_threshold=threshold)
    share = (mask.sum() + BATCH) / (BATCH * (mask.shape[1] + 1))
    return config, lambda: run().pooler_output, share.item()


def photographs() -> torch.Tensor:
    """Crops of the sample photographs, each at its own zoom: (16, 3, 256, 256)"""
    generator = torch.Generator().manual_seed(0)
    files, crops = sample_photographs(), []
    for index in range(BATCH):
        image = open_image(files[index % len(files)])
        side = int(min(image.size) * (0.2 + 0.8 * torch.rand((), generator=generator).item()))
        left, top = (int((extent - side) * torch.rand((), generator=generator).item()) for extent in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((256, 256))
        pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(256, 256, 3)
        crops.append(pixels.permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(crops)


def main() -> None:
    title = "Packed against padded batches of 16 images"
    arguments = parse_arguments(title, 9, {"--csv": {"metavar": "FILE"}}, on_gpus=False)
    torch.manual_seed(0)
    cases = [("encoder", partial(encoder_case, share)) for share in (SHARES[::3] if arguments.quick else SHARES)]
    cases += [("Quadtree ViT", partial(quadtree_case, quantile)) for quantile in (0.2, 0.5, 0.9)]
    rows = []
    with torch.inference_mode():
        for name, make in cases:
            config, run, share = make()
            times = times_of(config, run, arguments)
            row = {"what": name, "share": round(share, 3)}
            row |= {f"{mode}_ms": round(value, 1) for mode, value in times.items()}
            row |= {f"{mode}_ratio": round(times["padded"] / times[mode], 2) for mode in ("packed", "auto")}
            row["difference"] = f"{difference(config, run):.1e}"
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.csv:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
