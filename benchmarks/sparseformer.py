"""SparseFormer against the official code: speed of inference and training; the CPU kernels against the plain
operations, bfloat16 against float32; cost by tokens and by size of the image.

    python benchmarks/sparseformer.py [--official PATH] [--rounds 5] [--threads 2] [--device cuda] [--processor-time]
    [--quick]

PATH is a checkout of showlab/sparseformer. Without it only what needs no counterpart is measured. Weights are
random, and the same on both sides; the outputs are compared first.
"""

import argparse
import copy
import importlib
import sys
from pathlib import Path

import torch
from timing import compare, parse_arguments, peak_memory, report

from polyscale import SparseFormerConfig
from polyscale.models.sparseformer.convert_sparseformer import load_official
from polyscale.models.sparseformer.cpu_sparseformer import sample_features_on_cpu
from polyscale.models.sparseformer.geometry_sparseformer import sample_features


BATCH_SIZE = 8
# Preset -> goal of the speed ratio on a CPU in float32.
GOALS = {"sparseformer_v1_tiny": 1.4, "sparseformer_v1_base": 1.15, "sparseformer_btsp_augreg_base": 1.2}
GPU_GOAL, GPU_COMPILED_GOAL, TRAINING_GOAL, HALF_GOAL = 1.5, 2.0, 1.2, 1.8


def official_model(path: Path, name: str) -> torch.nn.Module:
    """The official model of a preset, with random weights."""
    folder = str(path / "sparseformer")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    config = importlib.import_module("sparseformer.config").route_name_to_config(name)
    return importlib.import_module("sparseformer.modeling").SparseFormer(**config).eval()


def our_model(name: str, state_dict: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """Our model of a preset, with those official weights or random ones."""
    if state_dict is not None:
        source = load_official(state_dict, name)
        model = source.model_class(source.config)
        model.load_state_dict(source.state_dict)
        return model.eval()
    return _classifier(SparseFormerConfig.preset(name))


def _classifier(config: SparseFormerConfig) -> torch.nn.Module:
    from polyscale import SparseFormerForImageClassification

    return SparseFormerForImageClassification(config).eval()


def training_step(model: torch.nn.Module, pixels: torch.Tensor):
    """A call that computes a loss and all gradients."""

    def step():
        with torch.inference_mode(False), torch.enable_grad():
            model.zero_grad(set_to_none=True)
            outputs = model(pixels)
            getattr(outputs, "logits", outputs).square().mean().backward()

    return step


def compare_with_official(path: Path, arguments: argparse.Namespace) -> None:
    place = {"device": arguments.device, "dtype": arguments.dtype}
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    on_cpu = arguments.device == "cpu"
    for name, goal in list(GOALS.items())[: 1 if arguments.quick else None]:
        theirs = official_model(path, name)
        ours = our_model(name, theirs.state_dict())
        pixels = torch.randn(BATCH_SIZE, 3, 224, 224)
        with torch.inference_mode():
            difference = (ours(pixels).logits - theirs(pixels)).abs().max().item()
        report(f"{name}, largest difference of logits in float32", difference, at_most=1e-4)
        ours, theirs, pixels = ours.to(**place), theirs.to(**place), pixels.to(**place)
        calls = (lambda model=ours, x=pixels: model(x)), (lambda model=theirs, x=pixels: model(x))
        compare(f"{name}, inference", *calls, goal=goal if on_cpu else GPU_GOAL, **settings)
        if not on_cpu:
            compiled = torch.compile(ours, fullgraph=True)
            compare(
                f"{name}, compiled",
                lambda model=compiled, x=pixels: model(x),
                calls[1],
                goal=GPU_COMPILED_GOAL,
                **settings,
            )
        # No stochastic depth on either side: they would not draw alike.
        steps = training_step(ours, pixels.clone()), training_step(theirs, pixels.clone())
        compare(f"{name}, training step", *steps, goal=TRAINING_GOAL, **settings)


def compare_training_memory(path: Path, arguments: argparse.Namespace) -> None:
    """Peak memory of a training step on the CPU, above the weights."""
    name = next(iter(GOALS))
    makers = (("our_model", f"{name!r}"), ("official_model", f"Path({str(path)!r}), {name!r}"))
    mine, other = (
        peak_memory(
            _IMPORTS.format(benchmarks=Path(__file__).parent, maker=maker, arguments=made_of),
            _TRAINING_STEP.format(batch_size=BATCH_SIZE),
            arguments.threads,
        )
        for maker, made_of in makers
    )
    report(f"{name}, memory of a training step (MiB): ours {mine:.0f}, theirs {other:.0f}", mine / other, at_most=1)


# By its path, not its name: the official code has a package `sparseformer` too.
_IMPORTS = """
from pathlib import Path
import runpy
import sys
import torch
sys.path.insert(0, "{benchmarks}")
benchmark = runpy.run_path("{benchmarks}/sparseformer.py")
model = benchmark["{maker}"]({arguments})
"""

_TRAINING_STEP = """
benchmark["training_step"](model, torch.randn({batch_size}, 3, 224, 224))()
"""


def costs(arguments: argparse.Namespace) -> None:
    """How the cost grows with latent tokens, and with the image beyond the early convolution."""
    place = {"device": arguments.device, "dtype": arguments.dtype}
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    models = {
        count: _classifier(SparseFormerConfig.preset("sparseformer_btsp_augreg_base", num_latent_tokens=count))
        for count in (48, 96, 192)
    }
    pixels = torch.randn(BATCH_SIZE, 3, 224, 224).to(**place)
    for count in (48, 96):
        few, many = models[count].to(**place), models[2 * count].to(**place)
        title = f"{count} tokens against {2 * count}"
        ratio = compare(title, lambda m=few: m(pixels), lambda m=many: m(pixels), goal=1.6, **settings)
        report(f"  cost of {2 * count} in that of {count}", ratio, at_most=2.2)
    large = torch.randn(BATCH_SIZE, 3, 448, 448).to(**place)
    base = models[48].sparseformer
    features = [base.features(images) for images in (pixels, large)]

    def beyond_convolution(grid: torch.Tensor):
        tokens, rois = base.embeddings(BATCH_SIZE)
        return lambda: base.layers[0](tokens, rois, grid)

    ratio = compare(
        "layers that look, 448 against 224 px",
        beyond_convolution(features[1]),
        beyond_convolution(features[0]),
        goal=0.9,
        **settings,
    )
    report("  their cost at 448 px, in that at 224 px", 1 / ratio, at_most=1.1)


def compare_sampling(arguments: argparse.Namespace) -> None:
    """Sampling on a CPU against torch's `grid_sample`, forward and backward, for images and for videos."""
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    for what, batch_size, sizes in (("images", BATCH_SIZE, (56, 56)), ("videos of 8 frames", 1, (8, 56, 56))):
        features = torch.randn(batch_size, *sizes, 96, requires_grad=True)
        points = torch.rand(batch_size, 49 * BATCH_SIZE // batch_size, 36, len(sizes), requires_grad=True)
        gradient = torch.randn(*points.shape[:3], 96)

        def step(sample, features=features, points=points, gradient=gradient):
            with torch.inference_mode(False), torch.enable_grad():
                features.grad = points.grad = None
                sample(features, points, "zeros").backward(gradient)

        calls = (lambda step=step: step(sample_features_on_cpu), lambda step=step: step(sample_features))
        compare(f"sampling {what}", *calls, goal=1, **settings)


def compare_on_cpu(arguments: argparse.Namespace) -> None:
    """Our models on a CPU: with and without the CPU kernels, and in bfloat16, with what that loses in the logits."""
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    pixels = torch.randn(BATCH_SIZE, 3, 224, 224)
    for name in list(GOALS)[: 1 if arguments.quick else None]:
        model = our_model(name)
        plain = copy.deepcopy(model)
        plain.config.cpu_kernels = False
        calls = [lambda model=side: model(pixels) for side in (model, plain)]
        compare(f"{name}, CPU kernels against none", *calls, goal=1, **settings)
        steps = [training_step(side, pixels.clone()) for side in (model, plain)]
        compare(f"{name}, the same, training step", *steps, goal=1, **settings)
        half, plain_half = copy.deepcopy(model).bfloat16(), plain.bfloat16()
        calls = (lambda model=half: model(pixels.bfloat16()), lambda model=model: model(pixels))
        compare(f"{name}, bfloat16 against float32", *calls, goal=HALF_GOAL, **settings)
        with torch.inference_mode():
            exact = model(pixels).logits
            lost = [
                (side(pixels.bfloat16()).logits - exact).square().mean().sqrt().item() for side in (half, plain_half)
            ]
        report(f"{name}, loss of bfloat16, with the CPU kernels to without", lost[0] / lost[1], at_most=1.1)


def main() -> None:
    options = {"--official": {"type": Path, "metavar": "PATH", "help": "a checkout of showlab/sparseformer"}}
    arguments = parse_arguments("SparseFormer at 224 px, batch 8", rounds=5, options=options)
    if arguments.official is None:
        print("No --official: nothing to compare with.\n")
    else:
        compare_with_official(arguments.official, arguments)
        if arguments.device == "cpu":
            compare_training_memory(arguments.official, arguments)
    if arguments.device == "cpu":
        compare_on_cpu(arguments)
        compare_sampling(arguments)
    costs(arguments)


if __name__ == "__main__":
    main()
