"""What a user sees of an import and of the commands: nothing of other libraries."""

import subprocess
import sys

import pytest

from .matrix.running import environment


@pytest.mark.parametrize(
    "arguments", [("-c", "import polyscale"), ("-m", "polyscale", "--help")], ids=["import", "help"]
)
def test_no_warnings_of_other_libraries(arguments):
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
