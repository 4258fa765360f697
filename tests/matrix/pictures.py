"""Real photographs for the matrix: those that ship with polyscale, so that no test needs the network."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from polyscale.assets import sample_photographs


@lru_cache
def photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.open(path).convert("RGB") for path in sample_photographs())


class CropDataset(Dataset):
    """Crops of three photographs, resized to the shape a family eats; the class is the photograph.

    The crop is a function of the index alone, so that every process and every run sees the same data.
    """

    num_classes = 3

    def __init__(self, input_shape: tuple[int, ...], length: int = 48):
        self.input_shape = input_shape
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        label = index % self.num_classes
        picture = photographs()[label]
        generator = np.random.default_rng(index)
        side = min(picture.size) // 2
        left, top = generator.integers(0, [picture.width - side + 1, picture.height - side + 1]).tolist()
        height, width = self.input_shape[-2:]
        crop = picture.crop((left, top, left + side, top + side)).resize((width, height))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 127.5 - 1
        return {"pixel_values": pixels.expand(self.input_shape).clone(), "labels": label}


__all__ = ["CropDataset", "photographs"]
