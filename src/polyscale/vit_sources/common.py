"""What every converter to FlexiViT hands on, and the pieces they share."""

from typing import Any, NamedTuple

import torch

from ..models.flexivit.configuration_flexivit import FlexiViTConfig
from ..models.flexivit.image_processing_flexivit import FlexiViTImageProcessor
from ..models.flexivit.modeling_flexivit import FlexiViTForImageClassification, FlexiViTModel, FlexiViTPreTrainedModel
from ..models.flexivit.modeling_projection_flexivit import FlexiViTModelWithProjection
from ..utils.checkpoint_files import check_state_dict, empty_model


# How ordinary ViTs are resized after the fact, and how FlexiViT's own weights were trained to be.
ORDINARY_KERNEL = {"kernel_interpolation": "bicubic", "kernel_antialias": True}
FLEXIVIT_KERNEL = {"kernel_interpolation": "bilinear", "kernel_antialias": False}


# What comes on top of the model, by the first word of its tensors' names.
_CLASSES = {
    "head": FlexiViTForImageClassification,
    "projection": FlexiViTModelWithProjection,
    None: FlexiViTModel,
}


def head_of(state_dict: dict[str, torch.Tensor]) -> str | None:
    """What comes on top of the model: "head" (a classifier), "projection" (CLIP's), or `None`."""
    first_words = {name.partition(".")[0] for name in state_dict}
    return next((head for head in _CLASSES if head in first_words), None)


class FlexiViTSource(NamedTuple):
    """A checkpoint of another library in FlexiViT's terms.

    `config.architectures` names the class that `state_dict` belongs to: `FlexiViTForImageClassification` where the
    source has a classifier, `FlexiViTModelWithProjection` where it has CLIP's projection, else `FlexiViTModel`.
    `image_processor` is None where the source says nothing about it.
    """

    config: FlexiViTConfig
    state_dict: dict[str, torch.Tensor]
    image_processor: FlexiViTImageProcessor | None

    @property
    def model_class(self) -> type[FlexiViTPreTrainedModel]:
        return next(one for one in _CLASSES.values() if self.config.architectures == [one.__name__])

    @property
    def head(self) -> str | None:
        """The first word of the names of a head's tensors: "head", "projection", or `None`."""
        return head_of(self.state_dict)


def label_maps(labels: list[str] | None, num_labels: int) -> dict[str, Any]:
    """The config's label fields; numbered names where none are known."""
    if labels is None:
        return {"num_labels": num_labels}
    # Names such as "crane" stand for two classes of ImageNet: `label2id` keeps the first of them.
    label2id: dict[str, int] = {}
    for index, label in enumerate(labels):
        label2id.setdefault(label, index)
    return {"id2label": dict(enumerate(labels)), "label2id": label2id}


def imagenet_labels(num_labels: int) -> list[str] | None:
    """The names of ImageNet's classes in their usual order, by how many there are; None where timm has no list."""
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset
    except ImportError:
        return None
    subset = infer_imagenet_subset({"num_classes": num_labels})
    return None if subset is None else ImageNetInfo(subset).label_descriptions()


def make_source(
    fields: dict[str, Any],
    state_dict: dict[str, torch.Tensor],
    image_processor: FlexiViTImageProcessor | None,
    source: str,
    overrides: dict[str, Any],
) -> FlexiViTSource:
    """Puts a converted checkpoint together and checks that nothing is missing and nothing left over.

    Args:
        fields: config fields that the source determines.
        state_dict: tensors by the names of `FlexiViTModel`, a classifier's under "head.", CLIP's
            projection under "projection.".
        image_processor: the source's, or None.
        source: what the tensors come from, for errors.
        overrides: config fields that the caller sets.

    Raises:
        ValueError: for an unknown field, or tensors that do not fit.
    """
    head = head_of(state_dict)
    model_class = _CLASSES[head]
    config = FlexiViTConfig(**{**fields, **overrides}, architectures=[model_class.__name__])
    state_dict = {
        f"flexivit.{name}" if head and not name.startswith(f"{head}.") else name: tensor.detach().clone()
        for name, tensor in state_dict.items()
    }
    check_state_dict(state_dict, empty_model(model_class, config), source)
    config.dtype = next(iter(state_dict.values())).dtype
    return FlexiViTSource(config, state_dict, image_processor)


def make_image_processor(num_channels: int = 3, **fields: Any) -> FlexiViTImageProcessor:
    """An image processor; images become RGB where the model has three channels."""
    return FlexiViTImageProcessor(do_convert_rgb=num_channels == 3, **fields)


__all__ = [
    "FLEXIVIT_KERNEL",
    "ORDINARY_KERNEL",
    "FlexiViTSource",
    "head_of",
    "imagenet_labels",
    "label_maps",
    "make_image_processor",
    "make_source",
]
