"""S2 around a trained FlexiViT for TinyImageNet-200: the encoder stays frozen, its classifier is trained on features.

    python benchmarks/tiny200/s2_head.py ARRAYS_FOLDER FLEXIVIT_FOLDER OUTPUT_FOLDER --images 30000 --patch-size 8

Pools the features of all scales once for each training image, on the first view that lite_teacher.py embeds too. Then
trains a linear classifier on them, with the labels and with the classes of a teacher: of lite_teacher.py with
`--embeddings`, or of a classifier of this library with `--teacher`, the FlexiViT itself at a smaller patch size for
instance. Prints the accuracy of the same procedure at the first scale alone beside it.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_images import class_balanced, load_split, normalize, view_of
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from polyscale import FlexiViTForImageClassification, S2ImageProcessor, S2VisionForImageClassification


@torch.no_grad()
def pooled_features(model: S2VisionForImageClassification, pixel_values: torch.Tensor, bf16: bool) -> torch.Tensor:
    """What the classifier reads: (images, scales * width)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model.s2_vision(pixel_values, pooled_only=True).pooler_output.float()


def all_features(
    model: S2VisionForImageClassification, images: np.ndarray, indices: torch.Tensor, view: int | None, bf16: bool
) -> torch.Tensor:
    rows, began = [], time.monotonic()
    for chosen in indices.split(50):
        batch = images[chosen.numpy()]
        pixel_values = normalize(batch) if view is None else view_of(batch, chosen, view)
        rows.append(pooled_features(model, pixel_values, bf16))
        if len(rows) % 100 == 0:
            print(f"{50 * len(rows)} images, {50 * len(rows) / (time.monotonic() - began):.0f}/s", flush=True)
    return torch.cat(rows)


@torch.no_grad()
def teacher_logits(folder: Path, images: np.ndarray, indices: torch.Tensor) -> torch.Tensor:
    """What a classifier, at its own budget, says of the first view: (images, classes)."""
    teacher = AutoModelForImageClassification.from_pretrained(folder).eval()
    views = (view_of(images[chosen.numpy()], chosen, 0) for chosen in indices.split(50))
    return torch.cat([teacher(pixel_values).logits for pixel_values in views])


def fit_classifier(
    features: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None, epochs: int, seed: int
) -> nn.Linear:
    """Cross entropy with the labels, and with the teacher's classes where there are any; cosine schedule."""
    torch.manual_seed(seed)
    mean, std = features.mean(dim=0), features.std(dim=0)
    classifier = nn.Linear(features.shape[1], 200)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=0.05)
    steps = epochs * (len(features) // 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(features), (256,))
        logits = classifier((features[chosen] - mean) / std)
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        if teacher is not None:
            loss = 0.5 * loss + F.kl_div(logits.log_softmax(-1), teacher[chosen].softmax(-1), reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():  # the standardisation becomes a part of the layer
        classifier.weight.div_(std)
        classifier.bias.sub_(classifier.weight @ mean)
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument("flexivit", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--validation-images", type=int, default=2000)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2])
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    taught = parser.add_mutually_exclusive_group()
    taught.add_argument("--embeddings", type=Path, help="made by lite_teacher.py")
    taught.add_argument("--teacher", type=Path, help="a classifier of the same classes")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for CPUs made for it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    images, labels = load_split(arguments.arrays, "train")
    val_images, val_labels = load_split(arguments.arrays, "val")
    base = FlexiViTForImageClassification.from_pretrained(arguments.flexivit, attn_implementation="eager")
    base.config.patch_size = arguments.patch_size
    model = S2VisionForImageClassification.from_vision_model(
        base.base_model, scales=arguments.scales, id2label=base.config.id2label, label2id=base.config.label2id
    ).eval()
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = class_balanced(labels, len(labels) // 200, generator)[: arguments.images]
    held = class_balanced(val_labels, arguments.validation_images // 200, generator)
    features = all_features(model, images, chosen, 0, arguments.bf16)
    held_features = all_features(model, val_images, held, None, arguments.bf16)
    teacher = None
    if arguments.embeddings is not None:
        probe = torch.load(arguments.embeddings / "probe.pt", weights_only=True)
        embeddings = np.load(arguments.embeddings / "embeddings_0.npy", mmap_mode="r")[chosen.numpy()]
        teacher = F.linear(torch.from_numpy(embeddings).float(), probe["weight"], probe["bias"])
    if arguments.teacher is not None:
        teacher = teacher_logits(arguments.teacher, images, chosen)
    width = features.shape[1] // len(arguments.scales)
    for name, count in (("first scale alone", width), ("all scales", features.shape[1])):
        classifier = fit_classifier(features[:, :count], labels[chosen], teacher, arguments.epochs, arguments.seed)
        right = (classifier(held_features[:, :count]).argmax(-1) == val_labels[held]).float().mean()
        print(f"{name}: top-1 {right:.4f} on {len(held)} validation images")
    model.head.load_state_dict(classifier.state_dict())
    model.save_pretrained(arguments.output)
    S2ImageProcessor.for_config(model.config, AutoImageProcessor.from_pretrained(arguments.flexivit)).save_pretrained(
        arguments.output
    )


if __name__ == "__main__":
    main()
