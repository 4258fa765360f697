"""The documentation's table: no mark without a run, and a run elsewhere says where."""

import json
from types import SimpleNamespace

import pytest

from . import recorded, table


_COLUMN = "ExecuTorch (XNNPACK), any batch size"


def _report(family: str, outcome: str, reason: str = "") -> SimpleNamespace:
    report = SimpleNamespace(
        user_properties=[("matrix_cell", [_COLUMN, family])],
        when="call",
        nodeid=f"test_executorch[{family}]",
        outcome=outcome,
        passed=outcome == "passed",
        skipped=outcome == "skipped",
        longrepr=("test_export.py", 1, f"Skipped: {reason}") if outcome == "skipped" else None,
    )
    if outcome == "xfailed":
        report.outcome, report.skipped, report.wasxfail = "skipped", True, f"reason: {reason}"
    return report


@pytest.fixture
def record(monkeypatch, tmp_path):
    path = tmp_path / "recorded.json"
    path.write_text("{}")
    for module in (recorded, table):
        monkeypatch.setattr(module, "RECORDED", path)
    return path


def _row(path, reports: list) -> list[str]:
    plugin = table.MatrixTable(path)
    for report in reports:
        plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish()
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(f"| {_COLUMN}")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_recorded_run_fills_what_this_one_cannot(record, tmp_path):
    recorder = recorded.Recorder("pytest", ["tests/matrix", "--matrix-record", "pytest"])
    for report in (
        _report("flexivit", "passed"),
        _report("quadtree_vit", "xfailed", "No sort."),
        _report("s2_vision", "failed"),
        _report("sparseformer", "skipped", "needs executorch"),
    ):
        recorder.pytest_runtest_logreport(report)
    recorder.pytest_sessionfinish()
    row = json.loads(record.read_text())[_COLUMN]
    assert row["gaps"] == {"flexivit": "", "quadtree_vit": "No sort."}
    assert row["by"].startswith("By `pytest tests/matrix --matrix-record pytest` on 20")
    assert f"pytest {pytest.__version__}" in row["by"]

    names = ("flexivit", "quadtree_vit", "sparseformer", "sparseformer_video", "s2_vision")
    cells = _row(tmp_path / "table.md", [_report(name, "skipped", "needs executorch") for name in names])
    missing = "not run here: needs executorch"
    assert [cell.partition(" [")[0] for cell in cells] == ["✓", "no", missing, missing, missing]
    text = (tmp_path / "table.md").read_text()
    assert row["by"] in text
    assert "] [" not in text, "two notes side by side are a link to Markdown"


def test_a_run_with_the_library_counts_more_than_a_recorded_one(record, tmp_path):
    record.write_text(json.dumps({_COLUMN: {"by": "By hand.", "gaps": {"flexivit": "", "s2_vision": ""}}}))
    cells = _row(tmp_path / "table.md", [_report("flexivit", "failed"), _report("s2_vision", "passed")])
    assert cells == ["✗", "not run", "not run", "not run", "✓"]
