"""The explorer's functions and page, and the page in a headless Chromium where there is one."""

import shutil

import pytest
from typer.testing import CliRunner

from polyscale import sample_photographs
from polyscale.explorer import Explorer
from polyscale_cli import app

from ..tiny_checkpoints import (
    TINY_IMAGENET_LABELS,
    label_fields,
    save_tiny_flexivit,
    save_tiny_quadtree_vit,
    save_tiny_s2,
    save_tiny_sparseformer,
)


CAT = next(file for file in sample_photographs() if file.name.startswith("cat"))
TINY200 = sample_photographs(TINY_IMAGENET_LABELS)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    tiny = {
        "flexivit": save_tiny_flexivit,
        "quadtree": save_tiny_quadtree_vit,
        "sparse": save_tiny_sparseformer,
        "s2": save_tiny_s2,
    }
    return Explorer([save(root / name) for name, save in tiny.items()], device="cpu", repeats=1)


def test_local_folders_come_before_the_bundled_checkpoints(explorer):
    assert explorer.titles == [
        "flexivit (flexivit)",
        "quadtree (quadtree_vit)",
        "sparse (sparseformer)",
        "s2 (s2_vision)",
        "flexivit-tiny200 (flexivit)",
        "flexivit-cifar10 (flexivit)",
        "quadtree-vit-cifar10 (quadtree_vit)",
        "quadtree-vit-tiny200 (quadtree_vit)",
        "s2-flexivit-tiny200 (s2_vision)",
        "sparseformer-tiny200 (sparseformer)",
    ]


def test_budgets_go_from_few_tokens_to_many(explorer):
    assert explorer.budgets("flexivit (flexivit)") == [16, 8, 4]
    assert explorer.budgets("quadtree (quadtree_vit)") == [4, 10, 19, 28, 37, 46, 55, 64]
    assert explorer.budgets("sparse (sparseformer)") == [None]
    assert explorer.budgets("s2 (s2_vision)") == [[1, 1], [1, 2]]


@pytest.mark.parametrize(
    ("title", "folder", "count"),
    [
        ("flexivit (flexivit)", "photographs", 6),
        ("flexivit-cifar10 (flexivit)", "photographs", 6),
        ("flexivit-tiny200 (flexivit)", "tiny200", 12),
        ("quadtree-vit-cifar10 (quadtree_vit)", "photographs", 6),
        ("quadtree-vit-tiny200 (quadtree_vit)", "tiny200", 12),
        ("s2-flexivit-tiny200 (s2_vision)", "tiny200", 12),
        ("sparseformer-tiny200 (sparseformer)", "tiny200", 12),
    ],
)
def test_photographs_fit_the_checkpoint(explorer, title, folder, count):
    photographs = explorer.photographs(title)
    assert {file.parent.name for file in photographs} == {folder}
    assert len(photographs) == count
    with pytest.raises(ValueError, match="`title` must be one of flexivit"):
        explorer.photographs("other")


@pytest.mark.parametrize(
    ("labels", "folder"),
    [
        (TINY_IMAGENET_LABELS, "tiny200"),
        ([*reversed(TINY_IMAGENET_LABELS), "something else"], "tiny200"),
        ([label for label in TINY_IMAGENET_LABELS if label != "koala"], "photographs"),
        (["something", "else"], "photographs"),
    ],
    ids=["its labels", "more labels", "one is missing", "others"],
)
def test_photographs_of_a_set_are_shown_where_every_class_is_a_label(tmp_path, labels, folder):
    explorer = Explorer([save_tiny_flexivit(tmp_path / "mine", **label_fields(labels))])
    assert {file.parent.name for file in explorer.photographs("mine (flexivit)")} == {folder}


@pytest.mark.parametrize(
    ("title", "budget", "said", "tokens"),
    [
        ("flexivit (flexivit)", 8, "patch size 8", 16),
        ("quadtree (quadtree_vit)", 19, "", 19),
        ("sparse (sparseformer)", None, "", 9),
        ("s2 (s2_vision)", [1, 2], "scales 1+2", 16),
    ],
)
def test_a_view_of_every_family(explorer, title, budget, said, tokens):
    view = explorer.view(title, CAT, budget)
    assert (view.budget, view.tokens) == (said, tokens)
    assert view.label in explorer.classifier(title).model.config.label2id
    assert 0 < view.score < 1
    assert view.milliseconds > 0
    assert len(view.drawing.getcolors(2**20)) > 200


def test_the_drawing_shows_the_budget(explorer):
    drawings = [explorer.view("flexivit (flexivit)", CAT, budget).drawing for budget in (4, 16)]
    assert drawings[0].tobytes() != drawings[1].tobytes()


def test_a_checkpoint_that_is_not_there_is_refused():
    with pytest.raises(OSError, match="neither a bundled checkpoint"):
        Explorer(["./no-such-folder"])


def test_an_unknown_title_is_refused(explorer):
    with pytest.raises(ValueError, match="`title` must be one of flexivit"):
        explorer.view("other", CAT, None)


def test_a_bad_file_gets_a_sentence(explorer, tmp_path):
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png cannot be used: not a readable image"):
        explorer.view("flexivit (flexivit)", bad, 8)


def test_the_command_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["explore"])
    assert (result.exit_code, result.output) == (
        2,
        "polyscale explore: gradio is not installed: pip install 'polyscale[app]'.\n",
    )


@pytest.fixture
def page(explorer):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from polyscale.explorer.page import Page

    return Page(explorer)


@pytest.mark.parametrize("position", [-3, 0, 1, 99, "1", True])
def test_a_position_off_the_slider_is_the_nearest_on_it(page, position):
    drawing, answer, problem = page.show("flexivit (flexivit)", str(CAT), position)
    at = 99 if position == 99 else 1
    assert problem == ""
    assert drawing is not None
    assert answer.split("<br>")[1] == page.show("flexivit (flexivit)", str(CAT), at)[1].split("<br>")[1]


@pytest.mark.parametrize("arguments", [(None, 1), (5, 1), (str(CAT), None), (str(CAT), float("inf"))])
def test_what_a_page_cannot_show_is_a_problem_and_no_error(page, arguments):
    drawing, answer, problem = page.show("flexivit (flexivit)", *arguments)
    assert (drawing, answer) == (None, "")
    assert problem.startswith('<div class="problem"')


def test_both_panels_answer(page):
    left, left_answer, right, right_answer, problem = page.both("flexivit (flexivit)", str(CAT), 1, 3)
    assert "patch size 16 · 4 tokens" in left_answer
    assert "patch size 4 · 64 tokens" in right_answer
    assert left.tobytes() != right.tobytes()
    assert problem == ""


def test_a_bad_upload_leaves_the_image_before_it(page, tmp_path):
    bad = tmp_path / "notes.txt"
    bad.write_text("<b>no image</b>")
    file, problem = page.upload(str(bad), str(CAT))
    assert file == str(CAT)
    assert "notes.txt cannot be used" in problem
    assert 'role="alert"' in problem
    assert page.upload(str(CAT), "") == (str(CAT), "")


def test_labels_of_a_checkpoint_are_escaped(page):
    from polyscale.explorer import View
    from polyscale.explorer.page import answer_html

    assert "&lt;script&gt;" in answer_html(View(None, "", 1, "<script>", 0.5, 1.0))


def test_sliders_follow_the_checkpoint(page):
    left, right = page.sliders("quadtree (quadtree_vit)")
    assert (left.value, right.value, right.maximum) == (1, 8, 8)
    left, _ = page.sliders("sparse (sparseformer)")
    assert not left.interactive


def test_photographs_follow_the_checkpoint(page):
    cifar, tiny = [str(file) for file in sample_photographs()], [str(file) for file in TINY200]
    left, right, gallery, *files = page.choose("flexivit-tiny200 (flexivit)", cifar, cifar[3])
    assert (left.value, right.value, right.maximum) == (1, 6, 6)
    assert [item["image"]["orig_name"] for item in gallery.value] == [file.name for file in TINY200]
    assert files == [tiny, tiny[0]]
    assert page.choose("sparse (sparseformer)", tiny, tiny[5])[3:] == (cifar, cifar[0])
    assert page.choose("flexivit-tiny200 (flexivit)", cifar, "my.png")[3:] == (tiny, "my.png")


def test_photographs_stay_where_the_next_checkpoint_has_the_same(page):
    tiny = [str(file) for file in TINY200]
    _, _, gallery, *files = page.choose("quadtree-vit-tiny200 (quadtree_vit)", tiny, tiny[5])
    assert "value" not in gallery  # no update
    assert files == [tiny, tiny[5]]


def test_the_page_starts_with_photographs_of_its_first_checkpoint(tmp_path):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from polyscale.explorer.page import build_page

    mine = save_tiny_flexivit(tmp_path / "mine", **label_fields(TINY_IMAGENET_LABELS))
    blocks = build_page(Explorer([mine], device="cpu", repeats=1))
    (gallery,) = [block for block in blocks.blocks.values() if type(block).__name__ == "Gallery"]
    assert [item["image"]["orig_name"] for item in gallery.value] == [file.name for file in TINY200]


@pytest.fixture
def url(explorer, monkeypatch):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from polyscale.explorer.page import build_page, launch_options

    blocks = build_page(explorer)
    _, url, _ = blocks.launch(**launch_options(), prevent_thread_lock=True, quiet=True)
    yield url
    blocks.close(verbose=False)


@pytest.fixture
def browser_page():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 390, "height": 844})
        browser.close()


@pytest.mark.slow
def test_upload_slide_and_compare_in_a_browser(url, browser_page, tmp_path):
    requests = []
    browser_page.on("request", lambda request: requests.append(request.url))
    browser_page.goto(url)
    left, right = browser_page.locator("#left-answer"), browser_page.locator("#right-answer")
    left.get_by_text("4 tokens").wait_for()
    right.get_by_text("64 tokens").wait_for()
    assert browser_page.evaluate("document.documentElement.scrollWidth") == 390  # no sideways scrolling on a phone

    browser_page.locator("#left-budget input[type=range]").focus()
    browser_page.keyboard.press("ArrowRight")
    left.get_by_text("16 tokens").wait_for()
    right.get_by_text("64 tokens").wait_for()

    drawing = browser_page.locator("#left-drawing img")

    def changed(action) -> None:
        before = drawing.get_attribute("src")
        action()
        browser_page.wait_for_function(
            "before => document.querySelector('#left-drawing img')?.getAttribute('src') !== before", arg=before
        )

    changed(lambda: browser_page.set_input_files("input[type=file]", str(CAT)))
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    browser_page.get_by_label("Remove this file").or_(browser_page.get_by_label("Clear")).first.click()
    browser_page.set_input_files("input[type=file]", str(bad))
    browser_page.get_by_role("alert").get_by_text("notes.png cannot be used").wait_for()
    left.get_by_text("16 tokens").wait_for()
    changed(lambda: browser_page.locator(".samples button").nth(3).click())
    browser_page.get_by_role("alert").wait_for(state="detached")
    browser_page.get_by_label("Checkpoint").click()
    changed(lambda: browser_page.get_by_role("option", name="quadtree (quadtree_vit)").click())
    left.get_by_text("4 tokens").wait_for()
    browser_page.locator("#left-budget input[type=range]").focus()
    browser_page.keyboard.press("ArrowRight")
    left.get_by_text("10 tokens").wait_for()

    samples = browser_page.locator(".samples button")
    assert samples.count() == 6
    browser_page.get_by_label("Checkpoint").click()
    changed(lambda: browser_page.get_by_role("option", name="quadtree-vit-tiny200 (quadtree_vit)").click())
    left.get_by_text("16 tokens").wait_for()
    assert samples.count() == 12
    assert browser_page.locator(".samples button.selected").count() == 0
    changed(lambda: samples.nth(9).click())
    left.get_by_text("lesser panda").wait_for()
    right.get_by_text("lesser panda").wait_for()

    outside = [request for request in requests if not request.startswith((url, "data:", "blob:"))]
    assert outside == []
