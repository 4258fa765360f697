"""Settings of the whole test run, and the documentation's matrix as a table (`--matrix-table FILE`)."""

import os
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Marks that Hugging Face's common test-suite puts on its tests.
_SUITE_MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "order",
    "torch_compile_test",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix-table",
        metavar="FILE",
        type=Path,
        help="write docs/tested.md's table of what works for which family to FILE, from the results of this run",
    )
    parser.addoption(
        "--matrix-record",
        metavar="LIBRARY",
        help="keep the results of this run, with LIBRARY's version and the day, for tables written without LIBRARY",
    )


def pytest_configure(config: pytest.Config) -> None:
    for mark in _SUITE_MARKS:
        config.addinivalue_line("markers", f"{mark}: of Hugging Face's common test-suite")
    config.addinivalue_line(
        "markers", "matrix_cell(column, family): the cell of the documentation's matrix that a test fills"
    )
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist: only the process that gathers reports writes
    path = config.getoption("--matrix-table")
    if path is not None and not is_worker:
        from .matrix.table import MatrixTable

        config.pluginmanager.register(MatrixTable(path.absolute()), "matrix_table")
    library = config.getoption("--matrix-record")
    if library is not None and not is_worker:
        from .matrix.recorded import Recorder

        config.pluginmanager.register(Recorder(library, config.invocation_params.args), "matrix_recorder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("matrix_cell")
        if mark is not None:
            item.user_properties.append(("matrix_cell", list(mark.args)))


@pytest.fixture(autouse=True)
def transformers_verbosity():
    """Commands silence transformers for the length of their process; here the process goes on with the next test."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
