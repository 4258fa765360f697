"""Image-classification data for training and evaluation: any source that `datasets` reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torchvision.transforms import v2


AUGMENTATIONS = ("none", "crop", "resized-crop", "trivial")
_INTERPOLATION = v2.InterpolationMode.BICUBIC


def load_image_dataset(source: str | Path, labelled: bool = True) -> DatasetDict:
    """Reads an image data set.

    Args:
        source: a folder of pictures (one subfolder a class, with or without `train`/`test` above), a folder of parquet
            files, one parquet file, or the name of a data set on a hub.
        labelled: False leaves labels out; then there need not be any, nor subfolders.

    Returns:
        Its splits, each with a column `image` and, where `labelled`, an integer column `label`.

    Raises:
        ValueError: if there is no such source, or it has no image column or no label column.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        splits = load_dataset("parquet", data_files=str(path))
    elif path.is_dir():
        splits = load_dataset(str(path))
    elif path.exists() or str(source).startswith((".", "/", "~")):
        raise ValueError(f"`dataset` must be a folder, a parquet file or a hub name; {source!s} is none of them.")
    else:
        splits = load_dataset(str(source))
    return DatasetDict({name: _with_standard_columns(split, source, labelled) for name, split in splits.items()})


def _with_standard_columns(split: Dataset, source: str | Path, labelled: bool) -> Dataset:
    images = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    if images and not labelled:
        split = split.select_columns([images[0]])
        return split if images[0] == "image" else split.rename_column(images[0], "image")
    labels = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    labels = labels or [name for name in ("label", "labels", "fine_label", "class") if name in split.features]
    if not images or not labels:
        raise ValueError(
            f"The data set {source!s} must have an image column{' and a label column' if labelled else ''}, got the "
            f"columns {dict(split.features)}."
        )
    split = split.select_columns([images[0], labels[0]])
    names = {images[0]: "image", labels[0]: "label"}
    split = split.rename_columns({old: new for old, new in names.items() if old != new})
    return split if isinstance(split.features["label"], ClassLabel) else split.class_encode_column("label")


def evaluation_split(splits: DatasetDict, name: str | None = None) -> str | None:
    """The split to evaluate on: `name`, else the first of validation, valid, test; None if there is none of them.

    Raises:
        ValueError: if `name` is given and the data set has no such split.
    """
    if name is not None:
        if name not in splits:
            raise ValueError(f"`split` must be one of {list(splits)}, got {name!r}.")
        return name
    return next((split for split in ("validation", "valid", "test") if split in splits), None)


def training_transform(
    augmentation: str, image_size: tuple[int, int], image_mean: list[float], image_std: list[float]
) -> Callable:
    """A torchvision v2 transform: PIL picture -> normalised tensor (3, *image_size).

    Args:
        augmentation: "none" (resize), "crop" (resize, a shift of up to an eighth, flip), "resized-crop" (random area
            and aspect ratio, flip) or "trivial" ("resized-crop" and TrivialAugment, arXiv 2103.10158).
        image_size: (height, width) in pixels.
        image_mean: mean of each channel, of values in [0, 1].
        image_std: standard deviation of each channel.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"`augmentation` must be one of {AUGMENTATIONS}, got {augmentation!r}.")
    resize = v2.Resize(image_size, interpolation=_INTERPOLATION, antialias=True)
    if augmentation == "none":
        steps = [resize]
    elif augmentation == "crop":
        padding = (image_size[1] // 8, image_size[0] // 8)
        steps = [resize, v2.RandomCrop(image_size, padding=list(padding)), v2.RandomHorizontalFlip()]
    else:
        steps = [
            v2.RandomResizedCrop(image_size, interpolation=_INTERPOLATION, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
        if augmentation == "trivial":
            steps.append(v2.TrivialAugmentWide())
    return v2.Compose(
        [v2.ToImage(), *steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(image_mean, image_std)]
    )


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """torch's CPU generator seeded from the numbers given; afterwards it is where it was."""
    state = torch.get_rng_state()
    # `torch.manual_seed` would seed the accelerators too, which costs more than a picture
    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class AugmentedImages(torch.utils.data.Dataset):
    """The rows of a split, transformed: `pixel_values`, `index`, and `label` where they have one.

    What a random transform does to a row depends on the seed, the epoch and the index of the row alone, not on the
    number of workers or on what was read before: a resumed run sees the pictures that the unbroken one would see.

    Args:
        split: rows with `image` and perhaps `label` (see `load_image_dataset`).
        transform: PIL picture -> tensor.
        seed: of the random transforms.
    """

    def __init__(self, split: Dataset, transform: Callable, seed: int = 0):
        self.split = split
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        row = self.split[index]
        with _seeded(self.seed, self.epoch, index):
            pixel_values = self.transform(row["image"].convert("RGB"))
        labels = {"label": row["label"]} if "label" in row else {}
        return {"pixel_values": pixel_values, **labels, "index": index}


def collate_pictures(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of `AugmentedImages` -> a batch of `pixel_values` without labels."""
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


class ImageCollator:
    """Rows of `AugmentedImages` -> a batch; with mixup or cutmix, labels are (batch, num_labels) weights.

    Args:
        num_labels: number of classes.
        mixup: alpha of mixup (arXiv 1710.09412), 0 for none.
        cutmix: alpha of cutmix (arXiv 1905.04899), 0 for none; with both, each batch draws one of the two.
        seed: of the mixing, which depends on it and on the rows of the batch alone.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, seed: int = 0):
        self.num_labels = num_labels
        self.seed = seed
        self.mixers = []
        if mixup > 0:
            self.mixers.append(v2.MixUp(alpha=mixup, num_classes=num_labels))
        if cutmix > 0:
            self.mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_labels))

    def without_mixing(self) -> "ImageCollator":
        """The same for evaluation."""
        return ImageCollator(self.num_labels)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        if self.mixers:
            with _seeded(self.seed, *(row["index"] for row in rows)):
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                pixel_values, labels = mixer(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}


__all__ = [
    "AUGMENTATIONS",
    "AugmentedImages",
    "ImageCollator",
    "collate_pictures",
    "evaluation_split",
    "load_image_dataset",
    "training_transform",
]
