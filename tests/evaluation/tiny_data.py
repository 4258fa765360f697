"""A data set of three classes and a FlexiViT that knows them."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTImageProcessor


NAMES = ["a", "b", "c"]


def make_split(names=NAMES, count=11, images=None) -> Dataset:
    rng = np.random.default_rng(0)
    made = [PILImage.fromarray(rng.integers(0, 255, (20, 28, 3)).astype(np.uint8)) for _ in range(count)]
    labels = [int(label) for label in rng.integers(0, len(names), count)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images or made, "label": labels}, features=features)


def save_checkpoint(folder, **fields):
    torch.manual_seed(0)
    config = FlexiViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        base_patch_size=4,
        initializer_range=0.3,  # so that answers differ from image to image
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        **fields,
    )
    FlexiViTForImageClassification(config).save_pretrained(folder)
    FlexiViTImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
