"""What budget tuning gains: agreement with the untuned model at all tokens, before and after, on the same images.

    polyscale train IMAGES TUNED --init-from QUADTREE --tune-budgets 0.3 1.0 --tune-by merging
    python benchmarks/better_tokens/tuned.py QUADTREE TUNED IMAGES --by merging --tokens 25 40 52 --csv FILE

QUADTREE is a Quadtree ViT with a processor beside it: a classifier or, with `--probe`, a tower whose embeddings the
probe classifies. Intervals are 95 % of a bootstrap over the images, paired for the gain. The file grows: rows of the
same model, way and budget are replaced.
"""

import argparse
import csv
from pathlib import Path

import torch
from measured import Answers, ask, interval, read_images
from torch import tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from polyscale import QuadtreeViTModelWithProjection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("tuned")
    parser.add_argument("images", type=Path, help="folder of images, or a .npy of (images, height, width, 3) uint8")
    parser.add_argument("--by", choices=("budget", "merging"), default="budget", help="what TUNED was tuned by")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--name", required=True, help="of the model in the file")
    parser.add_argument("--probe", type=Path, help="`probe.pt` of clip_teacher.py: a classifier of the embeddings")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000)
    arguments = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(arguments.source)
    config = AutoConfig.from_pretrained(arguments.tuned)  # of both: options may have been set for the tuning
    probe = torch.load(arguments.probe, weights_only=True) if arguments.probe else None
    kind = AutoModelForImageClassification if probe is None else QuadtreeViTModelWithProjection
    models = [kind.from_pretrained(name, config=config).eval() for name in (arguments.source, arguments.tuned)]
    everything = config.num_tokens_range()[1]
    images = read_images(arguments.images, arguments.limit, config.image_size)
    mean, std = tensor([processor.image_mean, processor.image_std])[:, :, None, None]
    batches = ((images - mean) / std).split(20)

    def answers(model, **call):
        def run(pixels):
            outputs = model(pixels, **call)
            return (outputs.logits, outputs.logits) if probe is None else (outputs.image_embeds, None)

        return Answers.joined([ask(run, batches)], probe)

    full = answers(models[0], num_tokens=everything)
    rows = []
    for tokens in arguments.tokens:
        call = {"num_tokens": tokens}
        if arguments.by == "merging":
            call = {"num_tokens": everything, "merge_tokens_to": tokens}
        given = [answers(model, **call) for model in models]
        before, after = (answer.agreement(full) for answer in given)
        row = {"model": arguments.name, "by": arguments.by, "tokens": tokens, "images": len(images)}
        row |= {"before": before.mean(), "after": after.mean()}
        row["after_low"], row["after_high"] = interval(after)
        row["gain_low"], row["gain_high"] = interval(after.astype(float) - before)
        row["cosine_before"], row["cosine_after"] = (answer.cosine(full) for answer in given)
        rows.append(
            {name: value if isinstance(value, str | int) else round(float(value), 4) for name, value in row.items()}
        )
        print(rows[-1], flush=True)
    known = []
    if arguments.csv.exists():
        with open(arguments.csv, newline="", encoding="utf-8") as file:
            new = {(row["model"], row["by"], str(row["tokens"])) for row in rows}
            known = [row for row in csv.DictReader(file) if (row["model"], row["by"], row["tokens"]) not in new]
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([*known, *rows])


if __name__ == "__main__":
    main()
