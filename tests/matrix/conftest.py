"""Leaves Hugging Face's common test-suite alone, and the download it begins with, where slow tests are not wanted."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_suite = collection_path == Path(__file__).with_name("test_common.py")
    return True if is_suite and config.option.markexpr == "not slow" else None
