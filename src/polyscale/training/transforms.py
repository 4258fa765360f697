"""From the images of a data set to the batches of a training step: augmentation, mixing, seeds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torchvision.transforms import v2
from transformers.image_processing_utils import BaseImageProcessor

from ..utils.images import UnreadableImageError
from ..utils.processors import pixels_and_options, pixels_of
from ..utils.validation import check_choice
from .data import stored_name


AUGMENTATIONS = ("none", "crop", "resized-crop", "trivial")
_INTERPOLATION = v2.InterpolationMode.BICUBIC


class TrainingTransform:
    """An image -> a normalised tensor (channels, *image_size).

    Args:
        augmentation: "none" (resize), "crop" (resize, a shift of up to an eighth, flip), "resized-crop" (random area
            and aspect ratio, flip) or "trivial" ("resized-crop" and TrivialAugment, arXiv 2103.10158).
        image_size: (height, width) in pixels.
        image_mean: mean of each channel, of values in [0, 1].
        image_std: standard deviation of each channel.

    Raises:
        ValueError: for an unknown `augmentation`, or "trivial" with channels that are not 1 or 3.
    """

    def __init__(
        self, augmentation: str, image_size: tuple[int, int], image_mean: list[float], image_std: list[float]
    ):
        check_choice("augmentation", augmentation, AUGMENTATIONS)
        self.num_channels = len(image_mean)
        if augmentation == "trivial" and self.num_channels not in (1, 3):
            raise ValueError("`augmentation='trivial'` changes colours: it needs images of 1 or 3 channels.")
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
        self.steps = v2.Compose(
            [*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(image_mean), list(image_std))]
        )

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        return self.steps(pixels_of(image, self.num_channels)).as_subclass(torch.Tensor)


class ProcessorTransform:
    """An image -> what an image processor makes of it: (channels, height, width).

    Args:
        processor: the one that is saved beside the model.
        num_channels: of the model.
    """

    def __init__(self, processor: BaseImageProcessor, num_channels: int = 3):
        self.processor = processor
        self.num_channels = num_channels

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        pixels, options = pixels_and_options(image, self.num_channels)
        return self.processor([pixels], return_tensors="pt", **options)["pixel_values"][0]


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """torch's CPU generator seeded from the numbers given, and put back afterwards."""
    state = torch.get_rng_state()
    # `torch.manual_seed` would seed the accelerators too, which costs more than an image
    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class AugmentedImages(torch.utils.data.Dataset):
    """The rows of a split, transformed: `pixel_values`, `index`, and `label` where they have one.

    What a random transform does to a row depends on the seed, the epoch and the index of the row alone, not on the
    number of workers or on what was read before: a resumed run sees the images that the unbroken one would see.

    Args:
        split: rows with `image` and perhaps `label` (see `load_image_dataset`).
        transform: image -> tensor.
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
            try:
                pixel_values = self.transform(row["image"])
            except ValueError as error:
                raise UnreadableImageError(stored_name(self.split, index), str(error)) from error
        labels = {"label": row["label"]} if "label" in row else {}
        return {"pixel_values": pixel_values, **labels, "index": index}


def collate_images(rows: list[dict]) -> dict[str, torch.Tensor]:
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
    "ProcessorTransform",
    "TrainingTransform",
    "collate_images",
]
