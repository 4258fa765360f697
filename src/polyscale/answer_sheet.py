"""One sheet that shows what several models say of the same photographs, and which answers are right."""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from .demonstration import ModelAnswers
from .figures import budget_lines, draw_image, image_drawer
from .models.auto import family_of
from .utils.images import open_pixels
from .utils.text import no_math


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RIGHT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"  # signs that matplotlib's own font has
# (ink, ground) of answers: blue-green and vermilion stay apart for colour-blind eyes
_COLOURS = {True: ("#00695c", "#d5eeea"), False: ("#b93a12", "#fde0d5")}
_INK, _PALE = "#1b1b1b", "#5f6368"
_DPI = 100
_WIDTH, _WIDEST_CELL = 1600, 200  # pixels: of a sheet of many columns, of a cell in one of few
_MARGIN, _GAP, _GROUP_GAP = 20, 12, 26  # pixels: around, between cells, between models
_EDGE = 3  # pixels of ground around an image
_HEAD, _LABEL, _COUNT, _CAPTION = 144, 25, 46, 92  # pixels of height: above the cells, below each, at the bottom
_CAPTION_TEXT = (
    f"{RIGHT} right, {WRONG} wrong; the percentage is the probability that the model gives its answer. Lines cut an "
    "image into the pieces that cost one visual token each; a piece that the model sees coarsely is drawn so. What a "
    "model crops away is not drawn; a darkened border, which fills no whole piece, is not seen either."
)
_CAPTION_OF_OTHERS = " Images without lines: the tokens of the model are no such pieces."


@dataclass
class _Column:
    """A model at a budget."""

    answers: ModelAnswers
    records: list[dict]  # of each photograph
    left: float = 0.0  # pixels


def _columns(answers: Sequence[ModelAnswers]) -> list[_Column]:
    columns = []
    for model in answers:
        files = list(dict.fromkeys(record["file"] for record in model.records))
        count = len(model.records) // max(len(files), 1)  # the budgets, in the same order for each photograph
        columns += [_Column(model, model.records[place::count]) for place in range(count)]
    return columns


class _Sheet:
    """A figure whose parts are placed in pixels from its top left corner."""

    def __init__(self, columns: Sequence[_Column]):
        from matplotlib.figure import Figure

        self.columns = columns
        names = [column.answers.name for column in columns]
        gaps = [_GROUP_GAP, *(_GAP if name == before else _GROUP_GAP for before, name in pairwise(names))]
        free = _WIDTH - 2 * _MARGIN - sum(gaps)
        self.cell = min(_WIDEST_CELL, free // (len(columns) + 1))  # the photograph alone is the first
        left = _MARGIN
        for column, gap in zip(columns, gaps, strict=True):
            left += self.cell + gap
            column.left = left
        self.row_height = self.cell + _LABEL + 2 * _EDGE + _GAP
        self.bottom = _MARGIN + _HEAD + len(columns[0].records) * self.row_height
        self.width, self.height = left + self.cell + _MARGIN, self.bottom + _COUNT + _CAPTION
        self.figure = Figure(figsize=(self.width / _DPI, self.height / _DPI), dpi=_DPI, facecolor="white")

    def axis(self, left: float, top: float) -> "Axes":
        """The axes of a cell, without ticks and frame."""
        bottom = self.height - top - self.cell
        place = (left / self.width, bottom / self.height, self.cell / self.width, self.cell / self.height)
        axis = self.figure.add_axes(place)
        axis.axis("off")
        return axis

    def box(self, left: float, top: float, width: float, height: float, **colours) -> None:
        from matplotlib.patches import Rectangle

        corner = (left / self.width, 1 - (top + height) / self.height)
        size = (width / self.width, height / self.height)
        self.figure.patches.append(
            Rectangle(corner, *size, transform=self.figure.transFigure, figure=self.figure, zorder=-1, **colours)
        )

    def text(self, left: float, top: float, text: str, size: float, **options) -> None:
        """Text around a place."""
        options = {"va": "center", "ha": "center", "color": _INK, **options}
        self.figure.text(left / self.width, 1 - top / self.height, no_math(text), fontsize=size, **options)

    def middle(self, left: float) -> float:
        """The middle of a cell."""
        return left + self.cell / 2


def draw_answer_sheet(answers: Sequence[ModelAnswers]) -> "Figure":
    """A row for each photograph, a column for each model and budget, and below them how many answers are right.

    Right and wrong answers differ by a sign and by colour.

    Args:
        answers (`Sequence[ModelAnswers]`): as `polyscale.demonstration.answer_photographs` returns them.

    Raises:
        ValueError: if there are none.
    """
    columns = _columns(answers)
    if not columns:
        raise ValueError("`answers` is empty: no model was asked, so there is nothing to draw.")
    sheet = _Sheet(columns)
    _draw_heads(sheet)
    for row, record in enumerate(columns[0].records):
        _draw_photograph(sheet, row, record)
    for column in columns:
        _draw_answers(sheet, column)
    _draw_counts(sheet)
    _draw_caption(sheet)
    return sheet.figure


def _draw_heads(sheet: _Sheet) -> None:
    """What the sheet shows, the models, and below them the budgets."""
    models = len({column.answers.name for column in sheet.columns})
    asked = f"{len(sheet.columns[0].records)} photographs, {models} {'model' if models == 1 else 'models'}"
    title = f"{asked}: what each model says, by the visual tokens that it spends"
    wrapped = textwrap.fill(title, round((sheet.width - 2 * _MARGIN) / 11))
    sheet.text(_MARGIN, _MARGIN, wrapped, 15, ha="left", va="top", linespacing=1.2)
    line = _MARGIN + 82
    for name, group in groupby(sheet.columns, key=lambda column: column.answers.name):
        lefts = [column.left for column in group]
        left, width = lefts[0], lefts[-1] + sheet.cell - lefts[0]
        short = os.path.basename(os.path.abspath(name))
        lines = textwrap.wrap(short, max(round(width / 10.5), 8), max_lines=3, placeholder="…")
        sheet.text(left + width / 2, line - 6, "\n".join(lines), 12, weight="bold", va="bottom", linespacing=1.1)
        sheet.box(left, line, width, 1.5, color=_INK)
    for column in sheet.columns:
        config = column.answers.loaded.model.config
        tokens = [record["tokens"] for record in column.records]
        *more, spent = budget_lines(config, column.records[0]["budget"], tokens)
        sheet.text(sheet.middle(column.left), line + 18, spent, 13)
        sheet.text(sheet.middle(column.left), line + 40, " ".join(more), 10, color=_PALE)


def _draw_photograph(sheet: _Sheet, row: int, record: dict) -> None:
    top = _MARGIN + _HEAD + row * sheet.row_height
    axis = sheet.axis(_MARGIN, top)
    axis.set_anchor("S")  # near its class
    draw_image(axis, open_pixels(record["file"]))
    sheet.text(sheet.middle(_MARGIN), top + sheet.cell + _LABEL / 2, record["class"], 11, weight="bold")


def _draw_answers(sheet: _Sheet, column: _Column) -> None:
    draw = image_drawer(*column.answers.loaded)
    for row, record in enumerate(column.records):
        top = _MARGIN + _HEAD + row * sheet.row_height
        ink, ground = _COLOURS[record["right"]]
        size = (sheet.cell + 2 * _EDGE, sheet.cell + _LABEL + 2 * _EDGE)
        sheet.box(column.left - _EDGE, top - _EDGE, *size, facecolor=ground, edgecolor=ink)
        draw(sheet.axis(column.left, top), open_pixels(record["file"]), record["budget"])
        answer = _fitted(record["label"], f" {record['score']:.0%}", 10, sheet.cell)
        below = top + sheet.cell + _LABEL / 2
        sheet.text(sheet.middle(column.left), below, answer, 10, color=ink, weight="bold")
        sign = RIGHT if record["right"] else WRONG
        badge = {"boxstyle": "circle,pad=0.2", "facecolor": ink, "edgecolor": "white"}
        sheet.text(column.left + 11, top + 11, sign, 11, color="white", weight="bold", bbox=badge)


def _fitted(text: str, end: str, size: float, room: float) -> str:
    """Bold text and what it ends with; in `room` pixels, for which the text is cut where it must be."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(weight="bold", size=size)
    for length in range(len(text), 0, -1):
        cut = text if length == len(text) else f"{text[:length].strip()}…"
        width, _, _ = text_to_path.get_text_width_height_descent(cut + end, font, ismath=False)  # points
        if width * _DPI / 72 <= room:
            break
    return cut + end


def _draw_counts(sheet: _Sheet) -> None:
    top = sheet.bottom + _COUNT / 2
    sheet.text(sheet.middle(_MARGIN), top, "right", 13, weight="bold")
    for column in sheet.columns:
        right = sum(record["right"] for record in column.records)
        sheet.text(sheet.middle(column.left), top, f"{right} of {len(column.records)}", 13, weight="bold")


def _draw_caption(sheet: _Sheet) -> None:
    families = [family_of(column.answers.loaded.model.config) for column in sheet.columns]
    is_cut = all(family is not None and family.budget_drawing is not None for family in families)
    text = _CAPTION_TEXT if is_cut else _CAPTION_TEXT + _CAPTION_OF_OTHERS
    wrapped = textwrap.fill(text, round((sheet.width - 2 * _MARGIN) / 7.4))
    top = sheet.bottom + _COUNT + 14
    sheet.text(_MARGIN, top, wrapped, 10, ha="left", va="top", color=_PALE, linespacing=1.35)


__all__ = ["RIGHT", "WRONG", "draw_answer_sheet"]
