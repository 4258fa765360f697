"""Which tokens keep a ViT's answer at a smaller budget, without training: a table and a drawing of agreement and time.

    python benchmarks/better_tokens/better_tokens.py flexivit-cifar10 IMAGES --min-patch-size 4 --output OUT
    python benchmarks/better_tokens/better_tokens.py CLIP IMAGES --image-size 256 --probe PROBE --output OUT

Each variant is compared with the same weights at all tokens: the share of images with the same top-1 (of the model's
classifier, or of a probe on its embedding; without either, the nearest other image), the cosine of the embeddings, and
the time of an image. Intervals are 95 % of a bootstrap over the images, paired for the difference to the published
quadtree. Images are measured a chunk at a time, all variants on each, and answers are kept under OUT: a run that was
stopped goes on, and the table always compares variants on the same images.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measured import Answers, ask, draw_table, read_images, remembered, table_row, write_table
from safetensors.torch import load_file

from polyscale.checkpoints import resolve_checkpoint
from polyscale.layers.token_merging import merge_schedule
from polyscale.models.flexivit.convert_flexivit import flexivit_from_source, load_flexivit_source
from polyscale.models.quadtree_vit.convert_quadtree_vit import load_quadtree_vit
from polyscale.utils.validation import to_pair


_BEST = {"reduction": "antialias", "patch_scorer": "embedding"}
PUBLISHED = {
    "reduction": "bilinear",
    "patch_scorer": "pixel_blur",
    "area_attention": 0.0,
    "area_pooling": False,
    "merge_layer": 0,
}
QUADTREES = {
    "published quadtree": {},
    "antialias, embedding": _BEST,
    "antialias": {"reduction": "antialias"},
    "embedding": {"patch_scorer": "embedding"},
    "antialias, entropy": {"reduction": "antialias", "patch_scorer": "entropy"},
    "merge_layer=2": {**_BEST, "merge_layer": 2},
}
TOKEN_POOLED = {"antialias, embedding, area attention 0.5": {**_BEST, "area_attention": 0.5}}
# A mean over the tokens can be weighted too.
MEAN_POOLED = {
    "antialias, embedding, area attention": {**_BEST, "area_attention": 1.0},
    "antialias, embedding, area pooling": {**_BEST, "area_pooling": True},
    "antialias, embedding, both areas": {**_BEST, "area_attention": 1.0, "area_pooling": True},
    "merge_layer=2, both areas": {**_BEST, "merge_layer": 2, "area_attention": 1.0, "area_pooling": True},
}


class Variant(NamedTuple):
    """One way to spend a budget: `run` gives (embedding, logits or None) of a batch of pixels."""

    name: str
    share: float
    tokens: int
    mean_tokens: float
    run: Callable

    @property
    def file(self) -> str:
        return f"{self.name} {self.tokens}"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled checkpoint or folder of a ViT, DeiT, DINOv2, CLIP vision or FlexiViT")
    parser.add_argument("images", type=Path, help="folder of images, or a .npy of (images, height, width, 3) uint8")
    parser.add_argument("--output", type=Path, required=True, help="folder for better_tokens.csv, .png and answers")
    parser.add_argument("--name", help="of the model in the table; its folder's by default")
    parser.add_argument("--probe", type=Path, help="`probe.pt` of clip_teacher.py: a classifier of the embedding")
    parser.add_argument("--image-size", type=int, help="side in pixels; the model's own by default")
    parser.add_argument("--min-patch-size", type=int, help="the model's own by default")
    parser.add_argument("--max-patch-size", type=int, help="twice the smallest by default")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.5, 0.65, 0.8], help="of all tokens")
    parser.add_argument("--variants", nargs="+", help="names of some, beside the published quadtree; all by default")
    parser.add_argument("--limit", type=int, default=1000, help="number of images, drawn with seed 0")
    parser.add_argument("--chunk", type=int, default=100, help="images that all variants run on before the next ones")
    parser.add_argument("--batch-size", type=int, default=10)
    return parser.parse_args()


class Variants:
    """All ways to spend a budget on one model, with one copy of its weights.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.source = resolve_checkpoint(arguments.model)
        self.flexivit = flexivit_from_source(load_flexivit_source(self.source))
        config = self.flexivit.config
        self.side = arguments.image_size or to_pair(config.image_size)[0]
        self.smallest = arguments.min_patch_size or to_pair(config.base_patch_size)[0]
        self.largest = arguments.max_patch_size or 2 * self.smallest
        self.num_layers = config.num_hidden_layers
        self.projection = _projection(self.source)
        self.sizes = {"image_size": self.side, "min_patch_size": self.smallest, "max_patch_size": self.largest}
        self.sizes["position_grid"] = config.position_grid
        self.published, self.processor = load_quadtree_vit(self.source, **self.sizes, **PUBLISHED)
        self.all_tokens = (self.side // self.smallest) ** 2
        self.pooling = config.pooling
        self.chosen = arguments.variants

    def full(self) -> Variant:
        run = self.runner(self.published, num_tokens=self.all_tokens)
        return Variant("all tokens", 1.0, self.all_tokens, self.all_tokens, run)

    def at_share(self, share: float) -> Iterator[Variant]:
        """The published quadtree first."""
        coarsest = (self.side // self.largest) ** 2
        tokens = coarsest + 3 * round((share * self.all_tokens - coarsest) / 3)
        named = {**QUADTREES, **(MEAN_POOLED if self.pooling == "mean" else TOKEN_POOLED)}
        if self.chosen is not None:
            named = {name: options for name, options in named.items() if name in ("published quadtree", *self.chosen)}
        for name, options in named.items():
            model = self.quadtree(**options)
            run = self.runner(model, num_tokens=tokens)
            yield Variant(name, share, tokens, self.mean_tokens(tokens, options.get("merge_layer", 0)), run)
            if name == "published quadtree":
                same = min(range(1, tokens), key=lambda count: abs(self.mean_of_merging(count) - tokens))
                others = (
                    self.smaller_image(share),
                    self.larger_patch(share, tokens),
                    self.token_merging("token merging", share, tokens),
                    self.token_merging("token merging, mean of the layers", share, same),
                )
                yield from (other for other in others if self.chosen is None or other.name in self.chosen)

    def quadtree(self, **options):
        model, _ = load_quadtree_vit(self.source, **self.sizes, **{**PUBLISHED, **options})
        model.load_state_dict(self.published.state_dict(), assign=True)
        return model

    def smaller_image(self, share: float) -> Variant:
        side = round(self.side * share**0.5 / self.smallest) * self.smallest
        run = self.runner(self.flexivit, patch_size=self.smallest)
        tokens = (side // self.smallest) ** 2

        def resized(pixels: torch.Tensor):
            return run(F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True))

        return Variant("smaller image", share, tokens, tokens, resized)

    def larger_patch(self, share: float, tokens: int) -> Variant:
        patch_size = self.flexivit.config.patch_size_for(self.side, tokens)
        tokens = self.flexivit.config.num_tokens_for(self.side, patch_size)
        run = self.runner(self.flexivit, patch_size=patch_size)
        return Variant("larger patch (PI-resize)", share, tokens, tokens, run)

    def token_merging(self, name: str, share: float, tokens: int) -> Variant:
        run = self.runner(self.published, num_tokens=self.all_tokens, merge_tokens_to=tokens)
        return Variant(name, share, tokens, self.mean_of_merging(tokens), run)

    def mean_tokens(self, tokens: int, merge_layer: int) -> float:
        """Mean of the layers of the tokens that each has."""
        return round((merge_layer * self.all_tokens + (self.num_layers - merge_layer) * tokens) / self.num_layers, 1)

    def mean_of_merging(self, tokens: int) -> float:
        """The same for merging: a third of a layer's products come before the merge, two thirds after."""
        try:
            schedule = merge_schedule(self.all_tokens, tokens, self.num_layers)
        except ValueError:
            return float("inf")
        total, left = 0.0, self.all_tokens
        for merged in schedule:
            total += left - merged * 2 / 3
            left -= merged
        return round(total / self.num_layers, 1)

    def runner(self, model, **call) -> Callable:
        has_head = hasattr(model, "head")

        def run(pixels: torch.Tensor):
            pooled = model.base_model(pixels, **call).pooler_output
            logits = model.head.classifier(pooled) if has_head else None
            return pooled if self.projection is None else F.linear(pooled, self.projection), logits

        return run


def _projection(folder: Path) -> torch.Tensor | None:
    """The weight that takes CLIP's pooled features to its embedding; None for other models."""
    file = Path(folder) / "model.safetensors"
    return load_file(file).get("visual_projection.weight") if file.exists() else None


def main() -> None:
    arguments = read_arguments()
    variants = Variants(arguments)
    name = arguments.name or Path(arguments.model).name
    table = arguments.output / "better_tokens.csv"
    full = variants.full()
    plans = [(None, full)]
    for share in arguments.shares:
        own = list(variants.at_share(share))
        known = {variant.file for _, variant in plans}  # two shares may come to the same patch or image size
        cheaper = [variant for variant in own if variant.tokens < full.tokens and variant.file not in known]
        plans += [(own[0], variant) for variant in cheaper]
    images = read_images(arguments.images, arguments.limit, variants.side)
    mean, std = (
        torch.tensor(getattr(variants.processor, f"image_{which}"))[:, None, None] for which in ("mean", "std")
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts: dict[str, list[Answers]] = {variant.file: [] for _, variant in plans}
    for start in range(0, len(images), arguments.chunk):
        chunk = order[start : start + arguments.chunk]
        kept = arguments.output / "answers" / f"{name} {arguments.chunk} {start}"
        pixels = ((images[chunk] - mean) / std).split(arguments.batch_size)
        for _, variant in plans:
            answers = remembered(kept, variant.file, lambda run=variant.run, pixels=pixels: ask(run, pixels))
            parts[variant.file].append(answers)
        probe = torch.load(arguments.probe) if arguments.probe and arguments.probe.exists() else None
        together = {file: Answers.joined(own, probe) for file, own in parts.items()}
        rows = []
        for reference, variant in plans:
            place = {"model": name, **{field: getattr(variant, field) for field in ("share", "tokens", "mean_tokens")}}
            place["variant"] = variant.name
            published = None if reference is None else together[reference.file]
            rows.append(table_row(place, together[variant.file], together[full.file], published))
        write_table(table, rows)
        draw_table(table, arguments.output / "better_tokens.png")
        print(f"{start + len(chunk)} images", flush=True)


if __name__ == "__main__":
    main()
