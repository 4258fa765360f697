"""Scores a checkpoint on the 10,000 validation images of TinyImageNet-200 at each budget: accuracy, and the classes it
knows best and least.

    python benchmarks/tiny200/report_tiny200.py ARRAYS_FOLDER CHECKPOINT --budgets 4 5 6 8 10 12 16 21 32

Images go through the checkpoint's own image processor and the Auto classes, as in `polyscale evaluate`. Writes
`results.json` into the checkpoint's folder, unless `--limit` is given.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tiny_images import load_split
from transformers import AutoImageProcessor, AutoModelForImageClassification

import polyscale  # noqa: F401 (registers the families)


@torch.no_grad()
def score(model, processor, images, batch_size: int, **budget) -> tuple[torch.Tensor, float]:
    """The five best classes of each image (images, 5), and images per second through the model."""
    best, seconds = [], 0.0
    for start in range(0, len(images), batch_size):
        pixel_values = processor(list(images[start : start + batch_size].copy()), return_tensors="pt")["pixel_values"]
        began = time.perf_counter()
        logits = model(pixel_values, **budget).logits
        seconds += time.perf_counter() - began
        best.append(logits.topk(5).indices)
    return torch.cat(best), len(images) / seconds


def extremes(right: torch.Tensor, labels: torch.Tensor, names: dict[int, str], count: int = 5) -> str:
    """One line: the classes with the most and the fewest right answers, in per cent."""
    counts = labels.bincount(minlength=len(names))
    shares = 100 * torch.zeros(len(names)).index_add(0, labels, right.float()) / counts.clamp(min=1)
    order = [index for index in shares.argsort(descending=True, stable=True).tolist() if counts[index] > 0]
    shown = [
        "; ".join(f"{names[index]} {shares[index]:.0f}" for index in part) for part in (order[:count], order[-count:])
    ]
    return f"best: {shown[0]}. Least: {shown[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arrays", type=Path, help="made by tiny_images.py")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--budget-argument", default="patch_size")
    parser.add_argument("--budgets", type=int, nargs="+", required=True)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--limit", type=int, help="only the first images")
    arguments = parser.parse_args()

    images, labels = load_split(arguments.arrays, "val")
    images, labels = images[: arguments.limit], labels[: arguments.limit]
    model = AutoModelForImageClassification.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.checkpoint)
    results = []
    for budget in arguments.budgets:
        call = {arguments.budget_argument: budget}
        best, speed = score(model, processor, images, arguments.batch_size, **call)
        right = best == labels[:, None]
        top1, top5 = right[:, 0].float().mean().item(), right.any(1).float().mean().item()
        tokens = budget if arguments.budget_argument == "num_tokens" else model.num_tokens_for(64, **call)
        results.append(
            {
                "image_size": [64, 64],
                "budget": budget,
                "tokens": tokens,
                "top1": round(top1, 4),
                "top5": round(top5, 4),
                "images_per_second": round(speed, 1),
            }
        )
        print(
            f"| {budget} | {tokens} | {100 * top1:.2f} | {100 * top5:.2f} |",
            extremes(right[:, 0], labels, model.config.id2label),
            flush=True,
        )
    if arguments.limit is None:
        (arguments.checkpoint / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
