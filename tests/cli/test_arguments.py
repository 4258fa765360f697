import pytest
import typer
from typer.testing import CliRunner

from polyscale.cli import app
from polyscale.cli.arguments import parse_fields, parse_numbers, parse_size, split_list


def test_lists_sizes_numbers_and_fields():
    assert split_list("8,12 16") == ["8", "12", "16"]
    assert split_list(None) is None
    assert [parse_size(text) for text in ("16", "10x15", "10X15")] == [16, (10, 15), (10, 15)]
    assert parse_numbers("0.5,.25 0.25") == [0.5, 0.25, 0.25]
    assert parse_fields(["patch_size=[8, 4]", "remainder=pad", "text=a=b"]) == {
        "patch_size": [8, 4],
        "remainder": "pad",
        "text": "a=b",
    }


@pytest.mark.parametrize("text", ["", "a", "8x", "8x8x8", "8.5"])
def test_a_size_that_is_none(text):
    with pytest.raises(typer.BadParameter, match="expected a number such as 16"):
        parse_size(text)


def test_bad_arguments_end_with_a_message_and_no_traceback():
    for arguments, message in (
        (["train", "data", "out", "--patch-sizes", "4", "big"], "expected a number such as 16"),
        (["train", "data", "out", "--mean", "a", "b"], "expected numbers"),
        (["train", "data", "out", "--set", "patch_size"], "expected FIELD=JSON"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_help_lists_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("classify", "show", "convert", "convert-patch-embed", "train", "evaluate", "benchmark"):
        assert command in result.output
