"""Draws the documentation's pictures anew: `python docs/make_figures.py`. Needs no network and no GPU."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import polyscale
from polyscale.explorer import Explorer
from polyscale.figures import figure_to_image, make_grid
from polyscale.models.quadtree_vit.plot_quadtree_vit import draw_quadtrees
from polyscale.models.s2_vision.plot_s2_vision import draw_s2
from polyscale.models.sparseformer.geometry_sparseformer import initial_rois
from polyscale.models.sparseformer.plot_sparseformer import draw_rois


FIGURES = Path(__file__).parent / "figures"
CAT, OWL = (
    next(file for file in polyscale.sample_photographs() if file.name.startswith(name)) for name in ("cat", "bird")
)
BUNDLED = "flexivit-cifar10"


def frontier() -> Image.Image:
    """Accuracy by tokens of the bundled checkpoint and of its control."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    folder = polyscale.bundled_checkpoint(BUNDLED)
    for name, label in (
        ("results", "FlexiViT: one checkpoint, six patch sizes"),
        ("fixed_patch_results", "plain ViT of the same cost, trained at 64 tokens, kernel resized"),
    ):
        results = json.loads((folder / f"{name}.json").read_text())
        axis.plot([r["tokens"] for r in results], [100 * r["top1"] for r in results], marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks([r["tokens"] for r in results], [str(r["tokens"]) for r in results])
    axis.minorticks_off()
    axis.set(xlabel="tokens per image", ylabel="top-1 on CIFAR-10's test set (%)", ylim=(0, 80))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    return figure_to_image(figure)


def slider() -> list[dict]:
    """What the explorer shows of one photograph at each budget: pictures, and what the model says."""
    explorer = Explorer(device="cpu", repeats=9)
    title = explorer.titles[0]
    steps = []
    for budget in explorer.budgets(title):
        view = explorer.view(title, OWL, budget)
        name = f"slider_{view.tokens}.jpg"
        view.drawing.save(FIGURES / name, quality=85)
        steps.append(
            {"image": name, "budget": view.budget, "tokens": view.tokens, "label": view.label, "score": view.score}
        )
    return steps


def quadtree() -> Image.Image:
    torch.manual_seed(0)
    config = polyscale.QuadtreeViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    processor = polyscale.QuadtreeViTImageProcessor(size={"height": 256, "width": 256}, max_patch_size=64)
    model = polyscale.QuadtreeViTModel(config).eval()
    return figure_to_image(draw_quadtrees(model, processor, Image.open(OWL).convert("RGB"), [16, 64, 100, 196]))


def sparseformer() -> Image.Image:
    return draw_rois(Image.open(CAT).convert("RGB"), initial_rois(49), width=420)


def s2() -> Image.Image:
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=112,
            patch_size=8,
        )
    ).eval()
    model = polyscale.S2VisionWrapper.from_vision_model(clip, scales=[1, 2, 3])
    processor = polyscale.S2ImageProcessor.for_config(model.config, fit="crop")
    return figure_to_image(draw_s2(model, processor, Image.open(CAT).convert("RGB")))


def flexivit() -> Image.Image:
    """The patches of three budgets, side by side."""
    explorer = Explorer(device="cpu", repeats=1)
    title = explorer.titles[0]
    figure, axes = make_grid(1, 3, cell=(2.6, 2.8))
    for axis, budget in zip(axes[0], (16, 8, 4), strict=True):
        view = explorer.view(title, CAT, budget)
        axis.imshow(view.drawing)
        axis.set_title(f"{view.budget}: {view.tokens} tokens", fontsize=9)
    return figure_to_image(figure)


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for draw in (frontier, flexivit, quadtree, sparseformer, s2):
        draw().save(FIGURES / f"{draw.__name__}.png", optimize=True)
    (FIGURES / "slider.json").write_text(json.dumps(slider(), indent=1) + "\n")


if __name__ == "__main__":
    main()
