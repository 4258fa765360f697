"""What the explorer's page shows, without the page: a checkpoint's answer to an image file at a budget, drawn."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..assets import sample_photographs
from ..checkpoints import DEFAULT_CHECKPOINT, available_checkpoints
from ..classification import classify_images
from ..figures import budget_lines, figure_to_image, image_drawer, make_grid
from ..layers.token_budget import budget_ladder_of
from ..loading import LoadedModel, load_classifier, load_config
from ..models.auto import family_of
from ..utils.images import UnreadableImageError, open_pixels


class View(NamedTuple):
    """An image at a budget.

    Attributes:
        drawing (`PIL.Image.Image`): the image, with the patches or regions of the budget.
        budget (`str`): the budget argument and its value, such as "patch size 8"; empty where `tokens` says it.
        tokens (`int`): what the image cost, prefix tokens not counted.
        label (`str`): the best class.
        score (`float`): its probability.
        milliseconds (`float`): time of the model alone.
    """

    drawing: Image.Image
    budget: str
    tokens: int
    label: str
    score: float
    milliseconds: float


class Explorer:
    """Checkpoints to look at, each loaded when it is first asked for.

    Args:
        sources (`Sequence[str or os.PathLike]`, *optional*): local folders or hub names; they come before the
            checkpoints that ship with the package, of which the default one is the first.
        device (`str`, *optional*): where the models run; the machine's accelerator, else the CPU, when `None`.
        repeats (`int`, *optional*, defaults to 3): timed calls whose median is shown.

    Raises:
        ValueError: for a source whose config cannot be read.
        OSError: if there is no such checkpoint.
    """

    def __init__(self, sources: Sequence[str | os.PathLike] = (), device: str | None = None, repeats: int = 3):
        self.device, self.repeats = device, repeats
        self.sources: dict[str, str] = {}
        self._photographs: dict[str, list[Path]] = {}
        bundled = sorted(available_checkpoints(), key=lambda name: name != DEFAULT_CHECKPOINT)
        for source in [*sources, *bundled]:
            config = load_config(source)
            name = Path(os.fspath(source)).name or os.fspath(source)
            title = f"{name} ({config.model_type})"
            if title in self.sources and self.sources[title] != os.fspath(source):
                title = f"{os.fspath(source)} ({config.model_type})"
            self.sources[title] = os.fspath(source)
            self._photographs[title] = sample_photographs((config.id2label or {}).values())
        self._loaded: dict[str, LoadedModel] = {}

    @property
    def titles(self) -> list[str]:
        """The checkpoints to choose from: name and family."""
        return list(self.sources)

    def photographs(self, title: str) -> list[Path]:
        """The sample photographs that fit a checkpoint: the first set whose classes are all among its labels.

        Those of CIFAR-10's classes where there is no such set.

        Raises:
            ValueError: for an unknown title.
        """
        self._check_title(title)
        return self._photographs[title]

    def classifier(self, title: str) -> LoadedModel:
        """The classifier behind a title, and its image processor.

        Raises:
            ValueError: for an unknown title, or a checkpoint that holds no trained classifier.
            OSError: if the checkpoint is gone.
        """
        self._check_title(title)
        if title not in self._loaded:
            self._loaded[title] = load_classifier(self.sources[title], self.device)
        return self._loaded[title]

    def budgets(self, title: str) -> list[Any]:
        """The budgets of a checkpoint, from few tokens to many; `[None]` for a model without any."""
        return budget_ladder_of(self.classifier(title).model.config)

    def check(self, file: str | os.PathLike) -> None:
        """Refuses a file that is no usable image.

        Raises:
            ValueError: with a sentence that says why.
        """
        try:
            open_pixels(file)
        except UnreadableImageError as error:
            raise ValueError(
                f"{Path(file).name} cannot be used: {error.reason}. Take a JPEG, PNG or WebP file."
            ) from error

    def view(self, title: str, file: str | os.PathLike, budget: Any) -> View:
        """An image file as a checkpoint sees it at a budget, and what it says of it.

        Args:
            title (`str`): one of `titles`.
            file (`str` or `os.PathLike`): an image.
            budget: one of `budgets(title)`.

        Raises:
            ValueError: for an image or a budget that the model cannot take.
        """
        self.check(file)
        loaded = self.classifier(title)
        records, errors = classify_images([file], loaded, [budget], repeats=self.repeats)
        if errors:
            raise ValueError(f"{Path(file).name} cannot be used at this budget: {errors[0]['error']}")
        record = records[0]
        *said, _ = budget_lines(loaded.model.config, budget, [record["tokens"]])
        drawing = _drawing(loaded, open_pixels(file), budget)
        return View(drawing, " ".join(said), *(record[key] for key in ("tokens", "label", "score", "milliseconds")))

    def _check_title(self, title: str) -> None:
        if title not in self.sources:
            raise ValueError(f"`title` must be one of {', '.join(self.titles)}, got {title!r}.")


def _drawing(loaded: LoadedModel, image: Image.Image, budget: Any) -> Image.Image:
    """An image as a model cuts it up at a budget; where its family only draws whole figures, that figure."""
    family = family_of(loaded.model.config)
    whole = None if family is None or family.budget_drawing is not None else family.function("drawing")
    if whole is None:
        figure, axes = make_grid(1, 1, cell=(5.0, 5.0))
        image_drawer(*loaded)(axes[0, 0], image, budget)
        return figure_to_image(figure)
    drawing = whole(*loaded, image, None if budget is None else [budget])
    return drawing if isinstance(drawing, Image.Image) else figure_to_image(drawing)


__all__ = ["Explorer", "View"]
