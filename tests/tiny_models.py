"""The smallest configs of every family, for tests that ask all of them the same question."""

from transformers import CLIPVisionConfig, PreTrainedConfig, PreTrainedModel

import polyscale


_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "num_labels": 3,
}
_SPARSEFORMER = {
    "feature_width": 8,
    "num_latent_tokens": 4,
    "num_sampling_points": 4,
    "widths": [16, 16],
    "repeats": [1, 1],
    "operations": [["attn", "roi_adj", "sampling_m", "mlp"], ["attn", "mlp"]],
    "num_attention_heads": 2,
    "image_size": 32,
    "num_labels": 3,
}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = ("flexivit", "quadtree_vit", "sparseformer", "sparseformer_video", "s2_vision")


def tiny_fields(family: str) -> tuple[type[PreTrainedConfig], dict]:
    """The config class of a family and the fields of a tiny model of 32 px."""
    return {
        "flexivit": (polyscale.FlexiViTConfig, {**_ENCODER, "base_patch_size": 8}),
        "quadtree_vit": (polyscale.QuadtreeViTConfig, {**_ENCODER, "min_patch_size": 4, "max_patch_size": 16}),
        "sparseformer": (polyscale.SparseFormerConfig, _SPARSEFORMER),
        "sparseformer_video": (polyscale.SparseFormerVideoConfig, {**_SPARSEFORMER, "replicates": 2}),
        "s2_vision": (
            polyscale.S2VisionConfig,
            {"vision_config": CLIPVisionConfig(**_CLIP), "scales": [1, 2], "num_labels": 3},
        ),
    }[family]


def tiny_config(family: str, **fields) -> PreTrainedConfig:
    config_class, own = tiny_fields(family)
    return config_class(**{**own, **fields})


def tiny_classifier(family: str, **fields) -> PreTrainedModel:
    """A classifier in evaluation mode, with random weights."""
    classes = {
        "flexivit": polyscale.FlexiViTForImageClassification,
        "quadtree_vit": polyscale.QuadtreeViTForImageClassification,
        "sparseformer": polyscale.SparseFormerForImageClassification,
        "sparseformer_video": polyscale.SparseFormerForVideoClassification,
        "s2_vision": polyscale.S2VisionForImageClassification,
    }
    return classes[family](tiny_config(family, **fields)).eval()


def pixels_shape(family: str) -> tuple[int, ...]:
    """Of two images, or videos, that the tiny models take."""
    return (2, 2, 3, 32, 32) if family == "sparseformer_video" else (2, 3, 32, 32)
