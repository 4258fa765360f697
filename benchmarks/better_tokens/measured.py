"""What a variant says of all images, kept on the disk; the table and the drawing of all variants."""

import csv
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from polyscale.figures import make_grid
from polyscale.utils.images import find_images, open_image


FIELDS = (
    "model",
    "variant",
    "share",
    "tokens",
    "mean_tokens",
    "agreement",
    "agreement_low",
    "agreement_high",
    "against_published",
    "against_published_low",
    "against_published_high",
    "cosine",
    "milliseconds",
    "processor_milliseconds",
    "images",
)


def read_images(path: Path, limit: int, side: int) -> torch.Tensor:
    """(images, 3, side, side) in [0, 1]: the middle square of each image, resized; drawn with seed 0."""
    stored = np.load(path, mmap_mode="r") if path.suffix == ".npy" else None
    files = find_images(path) if stored is None else stored
    chosen = sorted(np.random.default_rng(0).permutation(len(files))[:limit])
    images = torch.empty(len(chosen), 3, side, side)
    for place, index in enumerate(chosen):
        pixels = np.array(open_image(files[index])) if stored is None else stored[index].copy()
        height, width = pixels.shape[:2]
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        square = torch.from_numpy(pixels[top : top + edge, left : left + edge]).permute(2, 0, 1)[None].float() / 255
        images[place] = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)[0]
    return images


class Answers:
    """What a model says of all images: unit embeddings, logits where it has classes, and its time per image.

    Args:
        embeddings: (images, width).
        logits: (images, classes), or None.
        milliseconds: of wall time per image.
        processor_milliseconds: of processor time per image, which other programs on the machine disturb less.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        logits: torch.Tensor | None,
        milliseconds: float,
        processor_milliseconds: float,
    ):
        self.embeddings = embeddings
        self.logits = logits
        self.milliseconds = milliseconds
        self.processor_milliseconds = processor_milliseconds

    @classmethod
    def joined(cls, parts: list["Answers"], probe: dict[str, torch.Tensor] | None = None) -> "Answers":
        """The answers on several chunks of images as one, with the logits of a probe where there are none."""
        embeddings = torch.cat([part.embeddings for part in parts])
        logits = None if parts[0].logits is None else torch.cat([part.logits for part in parts])
        if logits is None and probe is not None:
            logits = F.linear(embeddings, probe["weight"], probe["bias"])
        counts = torch.tensor([len(part.embeddings) for part in parts], dtype=torch.float64)
        times = [
            float(torch.tensor([getattr(part, name) for part in parts], dtype=torch.float64) @ counts / counts.sum())
            for name in ("milliseconds", "processor_milliseconds")
        ]
        return cls(embeddings, logits, *times)

    def top(self, others: torch.Tensor) -> torch.Tensor:
        """The answer for each image: its class, or without classes the nearest other image by `others`."""
        if self.logits is not None:
            return self.logits.argmax(dim=1)
        return (self.embeddings @ others.T).fill_diagonal_(-2).argmax(dim=1)

    def agreement(self, full: "Answers") -> np.ndarray:
        """For each image, whether the answer is the one at all tokens."""
        return (self.top(full.embeddings) == full.top(full.embeddings)).numpy()

    def cosine(self, full: "Answers") -> float:
        return float((self.embeddings * full.embeddings).sum(dim=1).mean())


@torch.inference_mode()
def ask(run: Callable, batches: Iterable[torch.Tensor]) -> Answers:
    """The answers of `run`, a function of pixels that gives (embedding, logits or None)."""
    embeddings, logits, wall, processor, count = [], [], 0.0, 0.0, 0
    for batch in batches:
        if count == 0:
            run(batch)  # one-time costs
        began, began_processor = time.perf_counter(), time.process_time()
        embedding, scores = run(batch)
        wall += time.perf_counter() - began
        processor += time.process_time() - began_processor
        count += len(batch)
        embeddings.append(F.normalize(embedding, dim=-1))
        logits.append(scores)
    scores = None if logits[0] is None else torch.cat(logits)
    return Answers(torch.cat(embeddings), scores, 1000 * wall / count, 1000 * processor / count)


def remembered(folder: Path, name: str, make: Callable[[], Answers]) -> Answers:
    """The answers that `folder` holds under a name, or those that `make` gives, which go there."""
    file = folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.pt"
    if file.exists():
        return Answers(**torch.load(file))
    answers = make()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vars(answers), file)
    return answers


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of one value per image, by a bootstrap over the images."""
    rng = np.random.default_rng(0)
    drawn = values.astype(float)[rng.integers(0, len(values), (2000, len(values)))].mean(axis=1)
    return tuple(np.percentile(drawn, [2.5, 97.5]))


def table_row(place: dict, answers: Answers, full: Answers, published: Answers | None) -> dict:
    """A row of the table.

    Args:
        place: "model", "variant", "share", "tokens" and "mean_tokens".
        answers: of the variant.
        full: of the same weights at all tokens.
        published: of the published quadtree at the same budget; differences are paired by image.
    """
    agreement = answers.agreement(full)
    measured = {"agreement": float(agreement.mean())}
    measured["agreement_low"], measured["agreement_high"] = interval(agreement)
    if published is not None:
        difference = agreement.astype(float) - published.agreement(full)
        measured["against_published"] = float(difference.mean())
        measured["against_published_low"], measured["against_published_high"] = interval(difference)
    measured["cosine"] = answers.cosine(full)
    times = {name: round(getattr(answers, name), 3) for name in ("milliseconds", "processor_milliseconds")}
    rounded = {name: round(float(value), 4) for name, value in measured.items()}
    return {**place, **rounded, **times, "images": len(agreement)}


def write_table(path: Path, rows: list[dict]) -> None:
    """The rows of this run, and those of other models that the file holds already."""
    others = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            others = [row for row in csv.DictReader(file) if row["model"] != rows[0]["model"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows([*others, *rows])


def draw_table(path: Path, output: Path) -> None:
    """Agreement, with its interval, by mean tokens and by processor time: two axes for each model of the table."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys(row["model"] for row in rows))
    everywhere = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = make_grid(len(models), 2, cell=(7.0, 5.0))
    marks = "os^vDP*X<>hd"
    for line, model in zip(axes, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        names = list(dict.fromkeys(row["variant"] for row in own))
        for axis, field, label in zip(
            line,
            ("mean_tokens", "processor_milliseconds"),
            ("tokens per image, mean of the layers", "processor time per image, ms"),
            strict=True,
        ):
            for name in names:
                points = sorted(
                    [float(row[field]), *(100 * float(row[f"agreement{end}"]) for end in ("", "_low", "_high"))]
                    for row in own
                    if row["variant"] == name
                )
                at, value, low, high = np.array(points).T
                place = everywhere.index(name)
                axis.errorbar(
                    at,
                    value,
                    yerr=np.maximum([value - low, high - value], 0),
                    marker=marks[place % len(marks)],
                    color=f"C{place % 10}",
                    linestyle="-" if place < 10 else "--",
                    elinewidth=0.5,
                    label=name,
                )
            axis.xaxis.set_major_locator(_locator())
            axis.yaxis.set_major_locator(_locator())
            axis.tick_params(labelbottom=True, labelleft=True)
            axis.set_xlabel(label)
            axis.set_ylabel("same answer as at all tokens, %")
            axis.set_title(model)
            axis.grid(alpha=0.3)
        line[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    figure.savefig(output)


def _locator():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(8)
