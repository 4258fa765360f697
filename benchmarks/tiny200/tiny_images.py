"""TinyImageNet-200 as arrays in memory: 100,000 training and 10,000 validation images of 64 x 64 pixels, 200 classes.

    python benchmarks/tiny200/tiny_images.py TINY_IMAGENET_FOLDER ARRAYS_FOLDER

Decodes the JPEG files once. `ARRAYS_FOLDER` then holds `train_images.npy` and `val_images.npy` (uint8, images x 64 x
64 x 3), `train_labels.npy` and `val_labels.npy` (int64), and `classes.json` and `wnids.json` (names and WordNet
numbers in the order of the labels).

`--validation-folder DATA` also sorts the validation images into folders, one a class and with its name, as `polyscale
evaluate MODEL DATA` reads them.
"""

import argparse
import json
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


SIZE = 64
NUM_TRAIN = 100_000
# CLIP's statistics: the weights that a student starts from were made for them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def class_names(folder: Path, wnids: list[str]) -> list[str]:
    """The first name of each class in `words.txt`, with the second one where two classes share the first."""
    synonyms = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
    names = [synonyms[wnid].split(", ") for wnid in wnids]
    counts = Counter(name[0] for name in names)
    return [name[0] if counts[name[0]] == 1 else ", ".join(name[:2]) for name in names]


def read_images(paths: list[Path]) -> np.ndarray:
    """(images, 64, 64, 3) uint8"""
    images = np.empty((len(paths), SIZE, SIZE, 3), dtype=np.uint8)
    for row, path in zip(images, paths, strict=True):
        with Image.open(path) as image:
            row[:] = np.asarray(image.convert("RGB"))
    return images


def decode(folder: Path, output: Path, validation_folder: Path | None = None) -> None:
    wnids = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    splits = {
        "train": [
            (path, label_of[wnid]) for wnid in wnids for path in sorted((folder / "train" / wnid / "images").iterdir())
        ],
        "val": [(folder / "val" / "images" / row[0], label_of[row[1]]) for row in annotations],
    }
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        np.save(output / f"{split}_images.npy", read_images([path for path, _ in rows]))
        np.save(output / f"{split}_labels.npy", np.array([label for _, label in rows]))
        print(f"{split}: {len(rows)} images")
    names = class_names(folder, wnids)
    for path, label in splits["val"] if validation_folder else ():
        target = validation_folder / "validation" / names[label] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (output / "wnids.json").write_text(json.dumps(wnids, indent=1) + "\n")
    (output / "classes.json").write_text(json.dumps(names, indent=1) + "\n")


def load_split(folder: Path, split: str) -> tuple[np.ndarray, torch.Tensor]:
    """Images (images, 64, 64, 3) uint8 and labels (images,) of "train" or "val"."""
    return np.load(folder / f"{split}_images.npy", mmap_mode="r"), torch.from_numpy(
        np.load(folder / f"{split}_labels.npy")
    )


def class_balanced(labels: torch.Tensor, per_class: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `per_class` random images of each class, shuffled."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), labels.bincount().cumsum(0)[:-1]])
    chosen = by_class[(starts[:, None] + torch.arange(per_class)).flatten()]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def normalize(images: np.ndarray) -> torch.Tensor:
    """(images, height, width, 3) uint8 -> (images, 3, height, width) float32"""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


@lru_cache(maxsize=16)
def _view_draws(view: int) -> np.ndarray:
    """Uniform numbers of a view: (5, images)."""
    return np.random.default_rng(view).random((5, NUM_TRAIN), dtype=np.float32)


def view_of(images: np.ndarray, indices: torch.Tensor, view: int) -> torch.Tensor:
    """A view of training images, the same each time: a random crop of 0.4 to all of the area, half of them mirrored.

    Args:
        images: (images, 64, 64, 3) uint8.
        indices: (images,) which training images they are.
        view: its number.

    Returns:
        (images, 3, 64, 64), normalised.
    """
    area, aspect, top, left, mirror = torch.from_numpy(_view_draws(view)[:, indices.numpy()])
    area, aspect = 0.4 + 0.6 * area, torch.exp((2 * aspect - 1) * np.log(4 / 3))
    height, width = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(mirror < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * left - 1)
    theta[:, 1, 2] = (1 - height) * (2 * top - 1)
    pixel_values = normalize(images)
    grid = F.affine_grid(theta, pixel_values.shape, align_corners=False)
    return F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with train/, val/ and words.txt")
    parser.add_argument("output", type=Path)
    parser.add_argument("--validation-folder", type=Path)
    arguments = parser.parse_args()
    decode(arguments.folder, arguments.output, arguments.validation_folder)


if __name__ == "__main__":
    main()
