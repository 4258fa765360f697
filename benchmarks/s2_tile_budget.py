"""S2 with a tile budget on photographs: how far its features are from those of all tiles, and how long it takes.

    python benchmarks/s2_tile_budget.py [--checkpoint flexivit-cifar10] [--images 48] [--rounds 15] [--threads 1]
        [--processor-time] [--quick] [--csv FILE]

Scales 1 and 3: one tile, and nine of them. The error is the mean squared one of the finest scale's features in the
output, relative to their variance: of the mean over all tokens, and of each token.
"""

import statistics
from functools import partial

import numpy as np
import torch
from PIL import Image
from timing import parse_arguments, write_rows
from transformers import AutoModelForImageClassification

import polyscale
from polyscale import S2VisionWrapper, bundled_checkpoint, sample_photographs
from polyscale.evaluation.speed import time_alternating
from polyscale.utils.images import open_image


SCALES = [1, 3]
OPTIONS = {
    "--checkpoint": {"default": "flexivit-cifar10"},
    "--patch-size": {"type": int, "default": 4},
    "--images": {"type": int, "default": 48},
    "--fit-images": {"type": int, "default": 192, "help": "other crops that the fill 'map' is fitted on"},
    "--batch-size": {"type": int, "default": 8},
    "--csv": {"metavar": "FILE"},
}


def load_crops(number: int, side: int, seed: int = 0) -> torch.Tensor:
    """Random crops of the bundled photographs, a third to the whole of their short side: (number, 3, side, side)."""
    generator = np.random.default_rng(seed)
    photographs = [open_image(path) for path in sample_photographs()]
    crops = []
    for index in range(number):
        image = photographs[index % len(photographs)]
        length = int(min(image.size) * generator.uniform(1 / 3, 1))
        left, top = (int(generator.integers(0, extent - length + 1)) for extent in image.size)
        crop = image.crop((left, top, left + length, top + length)).resize((side, side), Image.Resampling.BICUBIC)
        crops.append(np.asarray(crop, dtype=np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def main() -> None:
    arguments = parse_arguments("S2 at the scales 1 and 3 with a tile budget", 15, OPTIONS, on_gpus=False)
    if arguments.quick:
        arguments.images, arguments.fit_images = 8, 16
    checkpoint = bundled_checkpoint(arguments.checkpoint)
    base = AutoModelForImageClassification.from_pretrained(checkpoint).base_model.eval()
    base.config.patch_size = arguments.patch_size
    models = {
        fill: S2VisionWrapper.from_vision_model(base, scales=SCALES, tile_fill=fill, antialias=True).eval()
        for fill in ("coarse", "first_scale", "map")
    }
    side = models["coarse"].config.image_size
    images = load_crops(arguments.images, side)
    polyscale.fit_tile_map(models["map"], load_crops(arguments.fit_images, side, seed=1))
    width, prefix = base.config.hidden_size, models["coarse"].config.num_prefix_tokens
    scores = torch.rand(len(images), SCALES[-1] ** 2, generator=torch.Generator().manual_seed(0))

    def finest(model, tile_scores=None, **options) -> torch.Tensor:
        parts = []
        for start in range(0, len(images), arguments.batch_size):
            some = slice(start, start + arguments.batch_size)
            own = {"tile_scores": tile_scores[some]} if tile_scores is not None else {}
            parts.append(model(images[some], **own, **options))
        return torch.cat([part.last_hidden_state[:, prefix:, width:] for part in parts])

    def relative(features: torch.Tensor, exact: torch.Tensor) -> float:
        return float((features - exact).square().mean() / (exact - exact.mean(dim=(0, 1))).square().mean())

    rows = []
    with torch.no_grad():
        exact = finest(models["coarse"])
        batch = images[: arguments.batch_size]
        calls = {"all": partial(models["coarse"], batch)}
        for fill, model in models.items():
            for num_tiles in (0, 3, 5, 7, 9):
                row = {"fill": fill, "tiles": num_tiles}
                for name, choice in (("detail", None), ("random", scores)):
                    features = finest(model, num_tiles=num_tiles, tile_scores=choice)
                    row[f"{name}_mean"] = relative(features.mean(dim=1, keepdim=True), exact.mean(dim=1, keepdim=True))
                    row[f"{name}_token"] = relative(features, exact)
                rows.append(row)
                calls[f"{fill} {num_tiles}"] = partial(model, batch, num_tiles=num_tiles)
        seconds = time_alternating(calls, arguments.rounds, None, arguments.clock)
    names = ("detail_mean", "random_mean", "detail_token", "random_token", "time")
    print(f"{'fill':<12} {'tiles':>5} " + " ".join(f"{name:>12}" for name in names))
    for row in rows:
        own = seconds[f"{row['fill']} {row['tiles']}"]
        row["time"] = statistics.median(one / whole for one, whole in zip(own, seconds["all"], strict=True))
        print(f"{row['fill']:<12} {row['tiles']:>5} " + " ".join(f"{row[name]:>12.3f}" for name in names))
    if arguments.csv:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
