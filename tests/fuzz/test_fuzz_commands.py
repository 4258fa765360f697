"""What a user may type: every command ends with an exit code, never in a traceback."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from polyscale.cli import app

from .outcomes import cases


COMMANDS = get_command(app).commands
VALUES = st.one_of(
    st.sampled_from(
        ["", "-1", "0", "nan", "8", "8x8", "1e400", "a=b", "pooling=banana", "=", "[/red]", "ab/cd/ef", "-"]
    ),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), max_size=6),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.mark.parametrize("command", sorted(COMMANDS))
@cases(5)
@given(data=st.data())
def test_commands(command, place, data, monkeypatch_module):
    options = [name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("--")]
    arguments = data.draw(st.lists(VALUES, min_size=1, max_size=3))
    for name in data.draw(st.lists(st.sampled_from(options), max_size=3, unique=True)):
        arguments += [name] if data.draw(st.booleans()) else [name, data.draw(VALUES)]
    # places that nobody has: nothing is read, trained or written
    arguments = [f"{place}/{text}" if "/" in text and "red" not in text else text for text in arguments]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.output


@pytest.fixture(scope="module", autouse=True)
def monkeypatch_module(place):
    """Relative names lead into an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield patch
