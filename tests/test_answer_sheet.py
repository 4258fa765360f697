import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from polyscale import FlexiViTConfig, QuadtreeViTConfig, SparseFormerConfig
from polyscale.answer_sheet import RIGHT, WRONG, draw_answer_sheet
from polyscale.assets import photograph_class, sample_photographs
from polyscale.demonstration import answer_photographs
from polyscale.figures import budget_lines

from .test_demonstration import TINY200, save_one_answer
from .tiny_checkpoints import (
    TINY_IMAGENET_LABELS,
    save_tiny_flexivit,
    save_tiny_quadtree_vit,
    save_tiny_s2,
    save_tiny_sparseformer,
)


CLASSES = [photograph_class(file) for file in sample_photographs(TINY_IMAGENET_LABELS)]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def badges(figure, sign):
    return [text for text in figure.texts if text.get_text() == sign]


def test_a_budget_is_said_in_its_own_words_and_in_tokens():
    assert budget_lines(FlexiViTConfig(), 16, [16]) == ["patch size 16", "16 tokens"]
    assert budget_lines(FlexiViTConfig(), (4, 8), [9, 9]) == ["patch size 4x8", "9 tokens"]
    assert budget_lines(QuadtreeViTConfig(), 31, [31, 31]) == ["31 tokens"]
    assert budget_lines(QuadtreeViTConfig(), None, [31, 16, 40]) == ["16 to 40 tokens"]
    assert budget_lines(SparseFormerConfig(), None, [49]) == ["49 tokens"]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The sheet of a model that calls everything a koala."""
    name = save_one_answer(tmp_path_factory.mktemp("models") / "koalas", "koala")
    return draw_answer_sheet(answer_photographs([name], device="cpu"))


def test_right_answers_are_counted_for_each_column(known):
    assert texts(known).count("1 of 12") == 3
    assert texts(known).count("koala 100%") == 3 * 12
    assert [text for text in texts(known) if text.endswith(" tokens")] == ["4 tokens", "16 tokens", "64 tokens"]
    assert [text for text in texts(known) if "patch" in text] == ["patch size 16", "patch size 8", "patch size 4"]
    assert [text for text in texts(known) if text in CLASSES] == CLASSES
    assert "koalas" in texts(known)  # the checkpoint, without its folder
    assert texts(known)[0].startswith("12 photographs, 1 model: ")


def test_wrong_answers_differ_by_a_sign_and_by_colour(known):
    right, wrong = badges(known, RIGHT), badges(known, WRONG)
    assert (len(right), len(wrong)) == (3, 3 * 11)
    heights = {round(text.get_position()[1], 6) for text in right}
    named = {round(text.get_position()[1], 6): text for text in known.texts if text.get_text() == "koala"}
    assert len(heights) == 1  # in one row, that of the koala
    assert 0 < heights.pop() - next(iter(named)) < 1 / 12
    colours = [{text.get_bbox_patch().get_facecolor() for text in group} for group in (right, wrong)]
    assert [len(group) for group in colours] == [1, 1]
    red, green, _, _ = colours[0].pop()
    assert green > red
    red, green, _, _ = colours[1].pop()
    assert red > green


def test_the_sheet_of_all_families_is_readable(tmp_path):
    saves = (save_tiny_flexivit, save_tiny_quadtree_vit, save_tiny_sparseformer, save_tiny_s2)
    names = [str(save(tmp_path / save.__name__.removeprefix("save_"), **TINY200)) for save in saves]
    answers = answer_photographs(names, device="cpu")
    figure = draw_answer_sheet(answers)
    columns = 3 + 3 + 1 + 2
    assert len(figure.axes) == 12 * (columns + 1)
    assert texts(figure)[0].startswith("12 photographs, 4 models: ")
    right = [sum(record["right"] for record in answer.records) for answer in answers]
    assert len(badges(figure, RIGHT)) == sum(right)
    assert len(badges(figure, WRONG)) == 12 * columns - sum(right)
    counts = [int(text.partition(" ")[0]) for text in texts(figure) if text.endswith(" of 12")]
    assert (len(counts), sum(counts)) == (columns, sum(right))
    assert "Images without lines" in " ".join(texts(figure)[-1].split())

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    height, width, _ = np.asarray(canvas.buffer_rgba()).shape
    assert 1500 <= width <= 1600
    assert height < 2 * width
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    for place, box in enumerate(boxes):  # nothing is written over something else
        assert not any(box.overlaps(other) for other in boxes[place + 1 :]), figure.texts[place].get_text()


def test_patches_are_drawn_on_the_photographs(known):
    grids = [len(axis.collections) for axis in known.axes]
    assert sorted(set(grids)) == [0, 2]  # the photograph alone; vertical and horizontal lines
    assert grids.count(2) == 3 * 12
    assert "Images without lines" not in " ".join(texts(known)[-1].split())


def test_labels_of_any_length_and_sign_are_drawn(tmp_path):
    strange = [f"${'x' * 60}$" if label == "acorn" else label for label in TINY_IMAGENET_LABELS]
    fields = {"id2label": dict(enumerate(strange)), "label2id": {label: i for i, label in enumerate(strange)}}
    name = save_one_answer(tmp_path / "model", strange[-1], train_patch_sizes=[16], **fields)
    figure = draw_answer_sheet(answer_photographs([name], device="cpu"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (label,) = {text for text in texts(figure) if text.endswith(" 100%")}
    assert label.startswith(r"\$xxx")
    assert "…" in label
    drawn = next(text for text in figure.texts if text.get_text() == label)
    assert drawn.get_window_extent().width <= 200
    assert matplotlib.colors.to_hex(drawn.get_color()) == matplotlib.colors.to_hex(
        badges(figure, WRONG)[0].get_bbox_patch().get_facecolor()
    )


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`answers` is empty"):
        draw_answer_sheet([])
