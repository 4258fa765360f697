"""Which tokens keep a ViT's answer at a smaller budget, without training: writes a CSV and a plot.

    python benchmarks/better_tokens.py flexivit-cifar10 IMAGES --min-patch-size 4 --output docs/results/better_tokens
    python benchmarks/better_tokens.py CLIP_VISION_FOLDER IMAGES --image-size 256 --limit 300 --output OUT

Each variant is compared with the same weights at all tokens: the share of images with the same top-1 (of the
classifier, or without one the nearest other image by the full embedding), the cosine of the pooled embeddings, and
milliseconds per image. Intervals are 95 % of a paired bootstrap over the images, of the difference to the published
quadtree.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel

from polyscale.checkpoints import resolve_checkpoint
from polyscale.figures import make_grid
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.models.quadtree_vit.convert_quadtree_vit import load_quadtree_vit
from polyscale.utils.images import find_images, open_image


PUBLISHED = {"reduction": "bilinear", "patch_scorer": "pixel_blur", "area_attention": 0.0, "area_pooling": False}
QUADTREES = {
    "published": {},
    "antialias": {"reduction": "antialias"},
    "entropy": {"reduction": "antialias", "patch_scorer": "entropy"},
    "embedding": {"reduction": "antialias", "patch_scorer": "embedding"},
    "embedding + area attention": {"reduction": "antialias", "patch_scorer": "embedding", "area_attention": 1.0},
    "embedding + area pooling": {"reduction": "antialias", "patch_scorer": "embedding", "area_pooling": True},
    "embedding + both areas": {
        "reduction": "antialias",
        "patch_scorer": "embedding",
        "area_attention": 1.0,
        "area_pooling": True,
    },
    "merged after layer 2": {"merge_layer": 2},
    "merged after layer 2 + both areas": {"merge_layer": 2, "area_attention": 1.0, "area_pooling": True},
}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled checkpoint or folder of a ViT, DeiT, DINOv2, CLIP vision or FlexiViT")
    parser.add_argument("images", type=Path, help="folder of images, or a .npy of (images, height, width, 3) uint8")
    parser.add_argument("--output", type=Path, required=True, help="folder for better_tokens.csv and .png")
    parser.add_argument("--image-size", type=int, help="side in pixels; the model's own by default")
    parser.add_argument("--min-patch-size", type=int, help="the model's own by default")
    parser.add_argument("--max-patch-size", type=int, help="twice the smallest by default")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.5, 0.65, 0.8], help="of all tokens")
    parser.add_argument("--limit", type=int, default=1000, help="number of images, drawn with seed 0")
    parser.add_argument("--batch-size", type=int, default=50)
    return parser.parse_args()


def read_images(path: Path, limit: int, side: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """(images, 3, side, side), normalised: the middle square of each image, resized."""
    rng = np.random.default_rng(0)
    if path.suffix == ".npy":
        stored = np.load(path, mmap_mode="r")
        chosen = sorted(rng.permutation(len(stored))[:limit])
        tensors = [torch.from_numpy(stored[index].copy()).permute(2, 0, 1) for index in chosen]
    else:
        files = find_images(path)
        chosen = sorted(rng.permutation(len(files))[:limit])
        tensors = [torch.from_numpy(np.array(open_image(files[index]))).permute(2, 0, 1) for index in chosen]
    images = []
    for tensor in tensors:
        height, width = tensor.shape[-2:]
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        square = tensor[None, :, top : top + edge, left : left + edge].float() / 255
        images.append(F.interpolate(square, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)[0])
    pixels = torch.stack(images)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class Answers:
    """What a model says of all images: pooled embeddings, logits where it has a classifier, and its time."""

    def __init__(self, run: Callable, batches: Iterator[torch.Tensor]):
        embeddings, logits, seconds, count = [], [], 0.0, 0
        for batch in batches:
            start = time.perf_counter()
            pooled, scores = run(batch)
            seconds += time.perf_counter() - start
            count += len(batch)
            embeddings.append(pooled)
            logits.append(scores)
        self.embeddings = F.normalize(torch.cat(embeddings), dim=-1)
        self.logits = None if logits[0] is None else torch.cat(logits)
        self.milliseconds = 1000 * seconds / count

    def agreement(self, full: "Answers") -> np.ndarray:
        """For each image, whether the answer is the one at all tokens."""
        if self.logits is not None:
            return (self.logits.argmax(dim=1) == full.logits.argmax(dim=1)).numpy()
        nearest = [
            (embeddings @ full.embeddings.T).fill_diagonal_(-2).argmax(dim=1)
            for embeddings in (self.embeddings, full.embeddings)
        ]
        return (nearest[0] == nearest[1]).numpy()


def runner(model, **call) -> Callable:
    """A function of pixels: (pooled embedding, logits or None)."""
    has_head = hasattr(model, "head")

    def run(pixels: torch.Tensor):
        pooled = model.base_model(pixels, **call).pooler_output
        return pooled, model.head.classifier(pooled) if has_head else None

    return run


def nearest_budget(share: float, coarsest: int, finest: int) -> int:
    """The legal number of tokens nearest to a share of all."""
    return coarsest + 3 * round((share * finest - coarsest) / 3)


def interval(agreement: np.ndarray, published: np.ndarray) -> tuple[float, float]:
    """95 % of the difference in agreement, by a paired bootstrap."""
    rng = np.random.default_rng(0)
    difference = agreement.astype(float) - published.astype(float)
    drawn = difference[rng.integers(0, len(difference), (2000, len(difference)))].mean(axis=1)
    return tuple(np.percentile(drawn, [2.5, 97.5]))


@torch.inference_mode()
def main() -> None:
    arguments = read_arguments()
    source = resolve_checkpoint(arguments.model)
    try:
        flexivit = flexivit_from_source(load_flexivit_source(source))
    except ValueError:
        source = AutoModel.from_pretrained(source)
        flexivit = flexivit_from_source(load_flexivit_source(source))
    side = arguments.image_size or flexivit.config.image_size
    smallest = arguments.min_patch_size or flexivit.config.base_patch_size
    largest = arguments.max_patch_size or 2 * smallest
    sizes = {"image_size": side, "min_patch_size": smallest, "max_patch_size": largest}
    sizes["position_grid"] = flexivit.config.position_grid
    quadtree, processor = load_quadtree_vit(source, **sizes, **PUBLISHED)
    images = read_images(arguments.images, arguments.limit, side, processor.image_mean, processor.image_std)
    all_tokens = (side // smallest) ** 2

    def answers(run: Callable, pixels: torch.Tensor = images) -> Answers:
        run(pixels[: arguments.batch_size])  # warm-up
        return Answers(run, pixels.split(arguments.batch_size))

    full = answers(runner(quadtree, num_tokens=all_tokens))
    rows = []

    def add(name: str, tokens: int, result: Answers, published: np.ndarray | None) -> np.ndarray:
        agreement = result.agreement(full)
        low, high = interval(agreement, agreement if published is None else published)
        cosine = (result.embeddings * full.embeddings).sum(dim=1).mean()
        rows.append(
            {
                "variant": name,
                "tokens": tokens,
                "agreement": round(float(agreement.mean()), 4),
                "against_published_low": round(float(low), 4),
                "against_published_high": round(float(high), 4),
                "cosine": round(float(cosine), 4),
                "milliseconds": round(result.milliseconds, 3),
                "images": len(agreement),
            }
        )
        print(rows[-1], flush=True)
        return agreement

    add("all tokens", all_tokens, full, None)
    for share in arguments.shares:
        tokens = nearest_budget(share, (side // largest) ** 2, all_tokens)
        published = None
        for name, options in QUADTREES.items():
            model, _ = load_quadtree_vit(source, **sizes, **{**PUBLISHED, **options})
            result = add(name, tokens, answers(runner(model, num_tokens=tokens)), published)
            published = result if published is None else published
        merged = answers(runner(quadtree, num_tokens=all_tokens, merge_tokens_to=tokens))
        add("token merging", tokens, merged, published)
        smaller = round(side * share**0.5 / smallest) * smallest
        pixels = F.interpolate(images, size=(smaller, smaller), mode="bicubic", antialias=True)
        add(
            "smaller image",
            (smaller // smallest) ** 2,
            answers(runner(flexivit, patch_size=smallest), pixels),
            published,
        )
        patch_size = round(smallest / share**0.5)
        count = flexivit.config.num_tokens_for(side, patch_size)
        add("larger patch (PI-resize)", count, answers(runner(flexivit, patch_size=patch_size)), published)
    write(rows, arguments.output)


def write(rows: list[dict], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "better_tokens.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = make_grid(1, 2, cell=(6.0, 4.5))
    for axis, field, label in zip(
        axes[0], ("tokens", "milliseconds"), ("tokens per image", "ms per image"), strict=True
    ):
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = sorted((row[field], 100 * row["agreement"]) for row in rows if row["variant"] == name)
            axis.plot(*zip(*own, strict=True), marker="o", label=name)
        axis.set_xlabel(label)
        axis.set_ylabel("same answer as at all tokens, %")
        axis.tick_params(labelbottom=True, labelleft=True)
        axis.set_xticks(np.unique([row["tokens"] for row in rows]) if field == "tokens" else axis.get_xticks())
        axis.grid(alpha=0.3)
    axes[0][1].legend(fontsize=7)
    figure.savefig(output / "better_tokens.png")


if __name__ == "__main__":
    main()
