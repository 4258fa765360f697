import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import polyscale
from polyscale.cli import app
from polyscale.models.auto import families
from polyscale.training import RECIPES
from polyscale_cli.arguments import join_lists, parse_fields, parse_numbers, parse_size, split_list
from polyscale_cli.printing import reporting


def test_lists_sizes_numbers_and_fields():
    assert split_list("8,12 16") == ["8", "12", "16"]
    assert split_list(["8,12", "16"]) == ["8", "12", "16"]
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
        (["train", "data", "out", "--patch-sizes", "4,big"], "expected a number such as 16"),
        (["train", "data", "out", "--patch-sizes", "4", "big"], "unexpected extra argument"),
        (["train", "data", "out", "--mean", "a,b"], "expected numbers"),
        (["train", "data", "out", "--set", "patch_size"], "expected FIELD=JSON"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_help_lists_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in (
        "classify",
        "calibrate",
        "show",
        "convert",
        "convert-patch-embed",
        "train",
        "evaluate",
        "benchmark",
    ):
        assert command in result.output


@pytest.mark.parametrize(
    ("typed", "joined"),
    [
        ("--budgets 4 8x16 photo.jpg", "--budgets 4,8x16 photo.jpg"),
        ("photo.jpg --budgets 4, 8", "photo.jpg --budgets 4,8"),
        ("--budgets=4 8 -- 9", "--budgets=4,8 -- 9"),
        ("--patch-sizes 8 16 MODEL 7", "--patch-sizes 8,16 MODEL 7"),
        ("--budgets 1+2 1+3.5 --limit 5", "--budgets 1+2,1+3.5 --limit 5"),
        ("--budgets 4 -4 -o", "--budgets 4,-4 -o"),
        ("--budgets 4 --budgets 8", "--budgets 4 --budgets 8"),
        ("--mean imagenet data", "--mean imagenet data"),
        ("--mean .5 0.5 1e-1", "--mean .5,0.5,1e-1"),
        ("--limit 4 8", "--limit 4 8"),
        ("--budgets", "--budgets"),
    ],
)
def test_numbers_after_an_option_are_its_values_and_nothing_else_is(typed, joined):
    assert join_lists(typed.split()) == joined.split()


def test_the_version_is_the_package_s():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"polyscale {polyscale.__version__}\n")


def test_help_names_families_and_recipes():
    train = " ".join(CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "400"}).output.split())
    convert = " ".join(CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "400"}).output.split())
    assert [name for name in RECIPES if name not in train] == []
    ours = "polyscale."
    shipped = {name: family for name, family in families().items() if family.config_class.__module__.startswith(ours)}
    assert [name for name, family in shipped.items() if family.classifier_class and name not in train] == []
    assert [name for name, family in shipped.items() if family.converter and name not in convert] == []


def test_help_imports_no_model():
    code = (
        "import sys; sys.argv = ['polyscale', '--help']\n"
        "from polyscale_cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'polyscale', 'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "benchmark" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("`budgets`\nis wrong"), 2, "polyscale x: `budgets` is wrong\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ZeroDivisionError("by zero"), 2, "unexpected ZeroDivisionError: by zero (POLYSCALE_TRACEBACK=1 shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written."),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(error, code, told, capsys):
    with pytest.raises(typer.Exit) as caught, reporting("x"):
        raise error
    assert caught.value.exit_code == code
    printed = capsys.readouterr().err
    assert told in printed
    assert printed.count("\n") == 1


def test_a_terminated_command_says_so_and_leaves_the_handler_as_it_was(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught, reporting("x"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert capsys.readouterr().err == "polyscale x: terminated; nothing was written.\n"
    assert signal.getsignal(signal.SIGTERM) is before
