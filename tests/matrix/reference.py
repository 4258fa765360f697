"""Writes a checkpoint, and what a process that loads it has to find."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from polyscale.assets import sample_photographs
from polyscale.hub import save_with_code

from .families import Family
from .pictures import photographs
from .video import moving_frames


@torch.no_grad()
def write_reference(family: Family, folder: Path, with_code: bool) -> dict[str, Any]:
    """Puts a checkpoint and `expected.safetensors` into `folder`; returns what the fresh process has to know."""
    classifier = family.make_model()
    processor = family.make_processor()
    # Named after the family: code that comes with a checkpoint is imported by the name of its folder.
    checkpoint = folder / f"{family.name}-checkpoint"
    if with_code:
        save_with_code(classifier, checkpoint, processor)
    else:
        classifier.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)

    pixel_values = family.make_inputs()
    expected = {"pixel_values": pixel_values}
    body = getattr(classifier, classifier.base_model_prefix)
    for index, budget in enumerate(family.budgets):
        outputs = body(pixel_values, **budget.knobs)
        expected[f"last_hidden_state.{index}"] = outputs.last_hidden_state
        expected[f"pooler_output.{index}"] = outputs.pooler_output
        expected[f"logits.{index}"] = classifier(pixel_values, **budget.knobs).logits
    samples = [moving_frames(picture) if family.is_video else picture for picture in photographs()[:3]]
    backends = [family.processor] if family.processor_pil is None else [family.processor, family.processor_pil]
    names = dict(zip(("torchvision", "pil"), (cls.__name__ for cls in backends), strict=False))
    for backend in names:
        processed = family.make_processor(backend)(samples, return_tensors="pt")
        expected[f"processed.{backend}"] = processed["pixel_values"]
    task = "Video" if family.is_video else "Image"
    auto_classes = {
        "AutoModel": family.model.__name__,
        f"AutoModelFor{task}Classification": family.classifier.__name__,
    }
    if family.backbone is not None:
        auto_classes["AutoBackbone"] = family.backbone.__name__
        backbone = family.backbone.from_pretrained(checkpoint)
        expected["feature_map"] = backbone(pixel_values).feature_maps[-1]
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")
    return {
        "checkpoint": str(checkpoint),
        "auto_classes": auto_classes,
        "processors": names,
        "budgets": [{"knobs": budget.knobs, "num_tokens": budget.num_tokens} for budget in family.budgets],
        "num_prefix_tokens": getattr(classifier.config, "num_prefix_tokens", 0),
        "pictures": [str(path) for path in sample_photographs()[:3]],
        "is_video": family.is_video,
        "with_polyscale": not with_code,
    }


__all__ = ["write_reference"]
