"""S2 around CLIP: speed against the published function, memory of `split_forward`.

    python benchmarks/s2_vision.py [--official FOLDER] [--rounds 5] [--threads 2] [--device cuda] [--processor-time]

FOLDER is a copy of bfshi/scaling_on_scales (it needs einops). Without it the other side is the published procedure
written down here: each scale resized, cut, run and joined on its own. `--quick`: fewer cases, CLIP-L with two layers.
"""

import sys

import torch
import torch.nn.functional as F
from timing import compare, parse_arguments, peak_memory, report
from transformers import CLIPVisionConfig, CLIPVisionModel

from polyscale.models.s2_vision import multiscale_forward


SCALES = [1, 2, 3]


def one_forward_per_scale(model, images: torch.Tensor, scales: list[int], num_prefix_token: int) -> torch.Tensor:
    """The published procedure for square images."""
    batch, _, side, _ = images.shape
    maps, prefixes = [], []
    for scale in scales:
        scaled = F.interpolate(images.float(), size=side * scale, mode="bicubic").to(images.dtype)
        tiles = torch.cat([part for row in scaled.chunk(scale, dim=2) for part in row.chunk(scale, dim=3)])
        tokens = model(tiles)
        prefixes.append(tokens[:, :num_prefix_token].unflatten(0, (-1, batch)).mean(dim=0))
        tokens = tokens[:, num_prefix_token:].transpose(1, 2)
        grid = int(tokens.shape[2] ** 0.5)
        parts = tokens.unflatten(2, (grid, grid)).split(batch)
        rows = [torch.cat(parts[row * scale : (row + 1) * scale], dim=3) for row in range(scale)]
        maps.append(F.interpolate(torch.cat(rows, dim=2).float(), size=grid, mode="area").to(images.dtype))
    tokens = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
    return torch.cat([torch.cat(prefixes, dim=-1), tokens], dim=1)


def official_function(folder: str | None):
    if folder is None:
        return "one forward per scale", one_forward_per_scale
    sys.path.insert(0, folder)
    from s2wrapper import forward

    return "s2wrapper", lambda model, x, scales, num_prefix_token: forward(
        model, x, scales=scales, num_prefix_token=num_prefix_token
    )


def main() -> None:
    options = {"--official": {"metavar": "FOLDER", "help": "a copy of bfshi/scaling_on_scales"}}
    arguments = parse_arguments("S2 around CLIP-B/32 at scales [1, 2, 3]", rounds=5, options=options)
    name, official = official_function(arguments.official)
    place = {"device": arguments.device, "dtype": arguments.dtype}
    settings = {"rounds": arguments.rounds, "device": arguments.device, "clock": arguments.clock}
    clip = CLIPVisionModel(CLIPVisionConfig()).eval().to(**place)

    def features(tiles: torch.Tensor) -> torch.Tensor:
        return clip(tiles).last_hidden_state

    on_cpu = arguments.device == "cpu"
    for batch in (2,) if on_cpu else (1, 2, 8):
        images = torch.randn(batch, 3, 224, 224).to(**place)
        ours = multiscale_forward(features, images, scales=SCALES, num_prefix_token=1)
        theirs = official(features, images, scales=SCALES, num_prefix_token=1)
        print(f"largest difference {(ours - theirs).abs().max().item():.2e}")
        goal = 1.0 if on_cpu or batch > 1 else 1.3
        compare(
            f"batch {batch}, {name}",
            lambda x=images: multiscale_forward(features, x, scales=SCALES, num_prefix_token=1),
            lambda x=images: official(features, x, scales=SCALES, num_prefix_token=1),
            goal=goal,
            **settings,
        )

    print("\npeak memory, CPU, float32, fresh processes (MiB):")
    for batch in (2,) if arguments.quick else (2, 16):
        single, split, whole = (
            peak_memory(_IMPORTS, _PASS.format(batch=batch, options=options), arguments.threads)
            for options in ("scales=[1]", "scales=[1, 2, 3], split_forward=True", "scales=[1, 2, 3]")
        )
        print(f"batch {batch:<3} one scale {single:6.0f}   [1, 2, 3] at once {whole:6.0f}")
        report(f"batch {batch:<3} [1, 2, 3] with split_forward {split:6.0f}   ratio", split / single, at_most=1.15)

    layers = 2 if arguments.quick else 24
    code = _LARGE.format(layers=layers)
    largest = peak_memory(_IMPORTS, code, arguments.threads) / 1024
    report(f"3780 x 3780 pixels, CLIP-L/14-336 of {layers} layers, GiB", largest, at_most=24)


_IMPORTS = """
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from polyscale.models.s2_vision import S2VisionWrapper, multiscale_forward
"""

_PASS = """
clip = CLIPVisionModel(CLIPVisionConfig()).eval()
with torch.inference_mode():
    multiscale_forward(
        lambda x: clip(x).last_hidden_state, torch.randn({batch}, 3, 224, 224), num_prefix_token=1, {options}
    )
"""

_LARGE = """
config = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers={layers},
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
model = S2VisionWrapper.from_vision_model(
    CLIPVisionModel(config).eval(), img_sizes=[336, 1008, 3780], split_forward=True
)
with torch.inference_mode():
    model(torch.randn(1, 3, 3780, 3780))
"""


if __name__ == "__main__":
    main()
