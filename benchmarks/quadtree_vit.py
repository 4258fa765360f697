"""Time of Quadtree ViT: selection, tokenization, growth with pixels, and the encoder's gain from a smaller budget.

    python benchmarks/quadtree_vit.py [--official PATH] [--only selection tokenization pixels encoder] [--rounds 9]
        [--threads 2] [--device cuda] [--processor-time]

Rivals run side by side: each round times every one, in turn; ratios are those of the medians. `--official`
is a checkout of TomerRonen34/mixed-resolution-vit; without it, a plain re-creation of its loop stands in for it.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from timing import parse_arguments

from polyscale import PixelBlurPatchScorer, QuadtreeTokenizer, QuadtreeViTConfig, QuadtreeViTModel, quadtree_tokens
from polyscale.evaluation.speed import time_alternating
from polyscale.models.quadtree_vit.selection_quadtree_vit import decode_nodes


SECTIONS = ("selection", "tokenization", "pixels", "encoder")


def median_times(
    runs: dict[str, Callable[[], object]], arguments: argparse.Namespace, calls: int = 1
) -> dict[str, float]:
    """Median milliseconds of a call; every round takes `calls` of each in turn, after a round that does not count."""
    repeated = {name: lambda run=run: [run() for _ in range(calls)] for name, run in runs.items()}
    synchronize = None if arguments.device == "cpu" else torch.cuda.synchronize
    seconds = time_alternating(repeated, arguments.rounds, synchronize, arguments.clock)
    return {name: median(values) * 1e3 / calls for name, values in seconds.items()}


def smooth_images(batch: int, size: int, device: str) -> torch.Tensor:
    """Images with busy and quiet parts: noise of several scales."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(batch, 3, size, size)
    for cells in (4, 16, 64):
        noise = torch.randn(batch, 3, cells, cells, generator=generator)
        images += F.interpolate(noise, size=(size, size), mode="bilinear") * (4 / cells) ** 0.5
    return images.to(device)


def loop_selection(scores: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """One patch at a time, with a batched argmin: (batch, nodes), True for the patches that are left in the end."""
    rows, columns = scores[0].shape[1:]
    grids = [(rows << level, columns << level) for level in range(len(scores) + 1)]
    starts = [sum(r * c for r, c in grids[:level]) for level in range(len(grids) + 1)]
    children = torch.zeros(starts[-2], 4, dtype=torch.long)
    for level, (r, c) in enumerate(grids[:-1]):
        row, column = torch.arange(r)[:, None], torch.arange(c)
        corner = starts[level + 1] + 2 * row * 2 * c + 2 * column
        offsets = torch.tensor([0, 1, 2 * c, 2 * c + 1])
        children[starts[level] : starts[level + 1]] = (corner[..., None] + offsets).flatten(0, 1)
    device = scores[0].device
    children = children.to(device)
    costs = F.pad(
        -torch.cat([score.flatten(1) for score in scores], dim=1), (0, grids[-1][0] * grids[-1][1]), value=1e6
    )
    live = torch.zeros(costs.shape, dtype=torch.bool, device=device)
    live[:, : starts[1]] = True
    frontier = torch.where(live, costs, torch.inf)
    for _ in range((num_tokens - starts[1]) // 3):
        split = frontier.argmin(dim=1, keepdim=True)
        new = children[split[:, 0]]
        frontier.scatter_(1, split, torch.inf).scatter_(1, new, costs.gather(1, new))
        live.scatter_(1, split, False).scatter_(1, new, True)
    return live


def published_tokenization(official: str | None, tokenizer: QuadtreeTokenizer, size: int) -> Callable:
    """The fastest published tokenization (z-curve where the size is a power of two)."""
    config = tokenizer.config
    if official is not None:
        sys.path.insert(0, official)
        from mixed_res.patch_scorers.pixel_blur_patch_scorer import PixelBlurPatchScorer as PublishedScorer
        from mixed_res.quadtree_impl.quadtree_tensor_lookup import TensorLookupQuadtreeRunner
        from mixed_res.quadtree_impl.quadtree_z_curve import ZCurveQuadtreeRunner
        from mixed_res.tokenization.patch_embed import FlatPatchEmbed
        from mixed_res.tokenization.tokenizers import QuadtreeTokenizer as PublishedTokenizer

        runner_class = TensorLookupQuadtreeRunner if size & (size - 1) else ZCurveQuadtreeRunner
        runner = runner_class(config.num_tokens, config.min_patch_size, config.max_patch_size)
        embed = FlatPatchEmbed(size, config.min_patch_size, embed_dim=config.hidden_size)
        embed = embed.to(tokenizer.patch_embeddings.projection.weight.device)
        cls_token = torch.zeros(config.hidden_size, device=tokenizer.patch_embeddings.projection.weight.device)
        return PublishedTokenizer(embed, cls_token, runner, PublishedScorer()).tokenize

    def recreated(images: torch.Tensor) -> torch.Tensor:
        live = loop_selection(tokenizer.patch_scorer(images), config.num_tokens)
        nodes = 1 + live.nonzero()[:, 1].view(images.shape[0], -1)
        nodes = F.pad(nodes, (config.num_prefix_tokens, 0))
        tokens = decode_nodes(nodes, *config.patch_grid_for(images.shape[-2:]), config.num_levels)
        patches = tokenizer.patches_of(images, tokens, config.num_levels)
        centers = torch.rand(*nodes.shape, 2, device=images.device)
        steps = torch.arange(config.hidden_size // 4, device=images.device)
        angles = centers[..., None] * torch.exp(steps * -0.05)
        positions = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
        return tokenizer.assemble(patches, positions)

    return recreated


def report(title: str, times: dict[str, float]) -> None:
    ours, rival = times.values()
    names = ", ".join(f"{name} {value:.2f} ms" for name, value in times.items())
    print(f"{title}: {names}, ratio {rival / ours:.1f}")


def benchmark_selection(arguments: argparse.Namespace) -> None:
    for size, num_tokens in ((256, 196), (512, 784), (1024, 3136)):
        generator = torch.Generator().manual_seed(0)
        scores = [torch.rand(16, size // p, size // p, generator=generator).to(arguments.device) for p in (64, 32)]
        runs = {
            "polyscale": lambda scores=scores, n=num_tokens: quadtree_tokens(scores, n),
            "loop": lambda scores=scores, n=num_tokens: loop_selection(scores, n),
        }
        report(f"selection, 16 images, {size} px, {num_tokens} tokens", median_times(runs, arguments, calls=5))


def benchmark_tokenization(arguments: argparse.Namespace) -> None:
    rival = "published" if arguments.official else "re-creation"
    for size, num_tokens in ((256, 100), (256, 196), (512, 784)):
        tokenizer = QuadtreeTokenizer(QuadtreeViTConfig(num_tokens=num_tokens)).to(arguments.device)
        images = smooth_images(16, size, arguments.device)
        published = published_tokenization(arguments.official, tokenizer, size)
        runs = {
            "polyscale": lambda tokenizer=tokenizer, images=images: tokenizer(images),
            rival: lambda published=published, images=images: published(images),
        }
        report(f"tokenization, 16 images, {size} px, {num_tokens} tokens", median_times(runs, arguments))


def benchmark_pixels(arguments: argparse.Namespace) -> None:
    scorer = PixelBlurPatchScorer()
    for size in (256, 512, 1024, 2048):
        num_tokens = 196 * (size // 256) ** 2
        tokenizer = QuadtreeTokenizer(QuadtreeViTConfig(image_size=size, num_tokens=num_tokens)).to(arguments.device)
        images = smooth_images(1, size, arguments.device)
        runs = {
            "scores": lambda images=images: scorer(images),
            "tokenization": lambda tokenizer=tokenizer, images=images: tokenizer(images),
        }
        times = median_times(runs, arguments)
        megapixels = size * size / 2**20
        print(f"1 image of {size} px: " + ", ".join(f"{n} {t / megapixels:.1f} ms/Mpixel" for n, t in times.items()))


def benchmark_encoder(arguments: argparse.Namespace) -> None:
    model = QuadtreeViTModel(QuadtreeViTConfig.preset("quadtree_vit_base")).eval().to(arguments.device)
    images = smooth_images(4, 256, arguments.device)
    runs = {
        "100 tokens": lambda: model(images, num_tokens=100),
        "256 tokens": lambda: model(images, num_tokens=256),
    }
    times = median_times(runs, arguments)
    report("ViT-B end to end, 4 images, 256 px", times)
    share = median_times({"tokenization": lambda: model.embeddings(images, 100)}, arguments)["tokenization"]
    print(f"tokenization of 100 tokens: {share:.2f} ms, {share / times['100 tokens']:.1%} of the forward pass")


def main() -> None:
    options = {
        "--official": {"metavar": "PATH", "help": "a checkout of TomerRonen34/mixed-resolution-vit"},
        "--only": {"nargs": "+", "choices": SECTIONS, "default": SECTIONS},
    }
    arguments = parse_arguments("Quadtree ViT", rounds=9, options=options)
    with torch.inference_mode():
        for section in arguments.only:
            globals()[f"benchmark_{section}"](arguments)


if __name__ == "__main__":
    main()
