"""Tiny random checkpoints that tests of the demo's parts share."""

from pathlib import Path

import torch

from polyscale import FlexiViTConfig, FlexiViTForImageClassification, FlexiViTImageProcessor


CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def save_tiny_flexivit(folder: Path, **fields) -> Path:
    """A classifier of 32 px pictures into CIFAR-10's classes, trained at patch sizes 4 to 16, and its processor."""
    torch.manual_seed(0)
    config = FlexiViTConfig(
        **{
            "image_size": 32,
            "base_patch_size": 8,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "train_patch_sizes": [16, 8, 4],
            "id2label": dict(enumerate(CIFAR10_LABELS)),
            "label2id": {label: index for index, label in enumerate(CIFAR10_LABELS)},
            **fields,
        }
    )
    FlexiViTForImageClassification(config).save_pretrained(folder)
    FlexiViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder
