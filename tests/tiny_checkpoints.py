"""Tiny random checkpoints that tests of the demo's parts share."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from polyscale import (
    FlexiViTConfig,
    FlexiViTForImageClassification,
    FlexiViTImageProcessor,
    QuadtreeViTConfig,
    QuadtreeViTForImageClassification,
    QuadtreeViTImageProcessor,
    S2ImageProcessor,
    S2VisionConfig,
    S2VisionForImageClassification,
    SparseFormerConfig,
    SparseFormerForImageClassification,
    SparseFormerImageProcessor,
)


CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# TinyImageNet's 200 classes, in the order of the labels
TINY_IMAGENET_LABELS = tuple(
    (Path(__file__).parent / "fixtures" / "tiny_imagenet_labels.txt").read_text(encoding="utf-8").splitlines()
)


def label_fields(labels: Sequence[str]) -> dict[str, dict]:
    """The fields of a config that name its labels."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


_LABELS = label_fields(CIFAR10_LABELS)


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
            **_LABELS,
            **fields,
        }
    )
    FlexiViTForImageClassification(config).save_pretrained(folder)
    FlexiViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


def save_tiny_quadtree_vit(folder: Path, **fields) -> Path:
    """A classifier of 32 px images with 4 to 64 tokens, 16 by default, and its processor."""
    torch.manual_seed(0)
    encoder = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes = {"image_size": 32, "min_patch_size": 4, "max_patch_size": 16, "num_tokens": 16}
    QuadtreeViTForImageClassification(QuadtreeViTConfig(**{**encoder, **sizes, **_LABELS, **fields})).save_pretrained(
        folder
    )
    QuadtreeViTImageProcessor(size={"height": 32, "width": 32}, max_patch_size=16).save_pretrained(folder)
    return folder


def save_tiny_sparseformer(folder: Path, **fields) -> Path:
    """A classifier of 32 px images with 9 tokens, and its processor."""
    torch.manual_seed(0)
    config = SparseFormerConfig(
        feature_width=8,
        num_latent_tokens=9,
        num_sampling_points=4,
        num_attention_heads=2,
        widths=[32, 32],
        repeats=[2, 1],
        operations=[["attn", "roi_adj", "sampling_m", "mlp"], ["attn", "mlp"]],
        image_size=32,
        **{**_LABELS, **fields},
    )
    SparseFormerForImageClassification(config).save_pretrained(folder)
    SparseFormerImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


def save_tiny_s2(folder: Path, **fields) -> Path:
    """A classifier around a CLIP of 16 px tiles at the scales 1 and 2, and its processor."""
    torch.manual_seed(0)
    base = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = S2VisionConfig(**{"vision_config": base, "scales": [1, 2], **_LABELS, **fields})
    S2VisionForImageClassification(config).save_pretrained(folder)
    S2ImageProcessor.for_config(config).save_pretrained(folder)
    return folder
