"""Every tower in every kind of LLaVA model, asked what a server asks."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from polyscale.llava import set_token_budget
from polyscale.serving import check_servable

from ..llava.llava_tiny import CLIP, HOSTS, TOWERS, swapped
from .servable_table import END, HOST_TITLES, START, TOWER_TITLES


GRIDS = ("s2", "flexivit", "flexivit_no_cls", "flexivit_registers")
VARYING = ("s2_dynamic", "quadtree_threshold")
PAIRS = [("llava", name) for name in TOWERS]
PAIRS += [(host, name) for host in ("vipllava", "paligemma") for name in TOWERS if name not in VARYING]
PAIRS += [(host, name) for host in ("llava_next", "llava_onevision", "gemma3") for name in GRIDS]


@pytest.mark.parametrize(("host", "name"), PAIRS)
def test_every_tower_in_every_host(host, name):
    report = check_servable(*swapped(name, host))
    assert report.passed, str(report)
    assert len(report.checks) == 11


@pytest.mark.parametrize(
    ("host", "name"), [(host, name) for host in HOSTS for name in TOWERS if (host, name) not in PAIRS]
)
def test_every_other_pair_is_refused(host, name):
    with pytest.raises(ValueError, match="A LlavaForConditionalGeneration takes it"):
        swapped(name, host)


def test_the_documentation_has_the_table():
    """Of this run: `servable_table.py` writes it."""
    table = (Path(__file__).parents[2] / "docs" / "serving.md").read_text().partition(START)[2].partition(END)[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ")][1:]
    assert set(TOWER_TITLES) == {"own", *TOWERS}
    for name, row in zip(TOWER_TITLES, rows, strict=True):
        for host, cell in zip(HOST_TITLES, row[1:], strict=True):
            works = name == "own" or (host, name) in PAIRS
            assert cell.strip(" |").startswith("11 of 11" if works else "refused"), (name, host, cell)


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_as_it_comes(host):
    report = check_servable(*HOSTS[host]())
    assert report, str(report)


@pytest.mark.parametrize(
    ("name", "words", "most"),
    [("quadtree_threshold", {}, 64), ("s2_dynamic", {}, 6 * 16), ("flexivit", {"num_tokens": 9}, 9)],
)
def test_bounds(name, words, most):
    model, processor = swapped(name)
    if words:
        set_token_budget(model, processor, **words)
    for size in ([10_000, 10_000], [40, 90], [1, 1]):
        assert processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"] == [most]


@pytest.mark.parametrize(
    ("host", "limit"),
    [("llava", "image_size"), ("paligemma", "must have as many tokens"), ("gemma3", "all name a budget or none")],
)
def test_what_the_budgets_of_a_batch_have_in_common_is_said(host, limit):
    answer = check_servable(*swapped("flexivit", host)).checks[-1]
    assert answer.question == "a request brings its own budget"
    assert answer.detail.endswith(limit) or f"{limit}, and all" in answer.detail


def test_what_a_server_could_not_use_is_said():
    model, processor = swapped("flexivit")
    _, other = swapped("quadtree")
    report = check_servable(model, other)
    assert not report
    assert "FAIL" in str(report)
    failed = [check.question for check in report.checks if not check.passed]
    assert "features and placeholders of a batch match" in failed
    assert check_servable(model, processor)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="`model` must be one of LlavaForConditionalGeneration"):
        check_servable(CLIPVisionModel(CLIPVisionConfig(**CLIP)), None)
    model, _ = swapped("flexivit")
    for processor in (None, "processor", model):
        with pytest.raises(ValueError, match="`processor` must be a processor of texts and images, got"):
            check_servable(model, processor)


def test_the_plugin_is_declared():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "polyscale"]
    if not found:  # an installation made before the entry point was added
        import tomllib

        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        assert project["entry-points"]["vllm.general_plugins"] == {"polyscale": "polyscale.serving:register"}
    for point in found:
        assert point.load()() is None
