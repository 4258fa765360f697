"""Settings of the whole test run, and the table that the matrix writes for the README."""

import os


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
    "torch_export_test",
)


def pytest_configure(config):
    for mark in _SUITE_MARKS:
        config.addinivalue_line("markers", f"{mark}: of Hugging Face's common test-suite")
    config.addinivalue_line(
        "markers", "matrix_cell(column, family): the cell of the README's matrix that a test fills"
    )
