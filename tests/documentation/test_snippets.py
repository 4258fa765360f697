"""Every snippet of the README, the site and the model cards runs as it stands there, page by page, from top to bottom.

What would be downloaded lies in local folders of the same names and layouts, with tiny models (`scene.py`).
"""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import polyscale
from polyscale.checkpoints import available_checkpoints
from polyscale_cli import app
from polyscale_cli.arguments import join_lists

from .scene import copy_scene, write_scene


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("model_cards/*.md"))]
SNIPPET = re.compile(r"^```(python|sh)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# Folders of the scene that a page's own snippets make.
MADE = {
    "README.md": ("my-model", "my-flexivit"),
    "converting.md": ("my-flexivit",),
    "index.md": ("my-model", "my-flexivit"),
    "training.md": ("my-model", "my-flexivit"),
}
# Commands whose source is a name to download -> the folder that the scene has in place of their result.
DOWNLOADS = {"polyscale convert sparseformer_v1_tiny sparseformer-v1-tiny --to sparseformer": "sparseformer-v1-tiny"}
# Commands that stay until they are stopped: read, and not run.
STAY = ("explore",)


def snippets(page: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of each snippet of a page."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in SNIPPET.finditer(text)]


PAGES_WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


def run_polyscale(words: list[str]) -> None:
    if words[0] in STAY:
        words = [*words, "--help"]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"polyscale {shlex.join(words)}\n{result.output}"


def run_line(line: str) -> None:
    """One line of a shell snippet."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    if shlex.join(words) in DOWNLOADS:
        assert Path(DOWNLOADS[shlex.join(words)], "config.json").is_file()
    elif words[0] == "polyscale":
        run_polyscale(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        run_polyscale(words[words.index("polyscale") + 1 :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,]+)\]", words[-1])
        assert all(extra in extras for extra in ",".join(named).split(",") if extra), line
    else:
        raise AssertionError(f"Nobody knows how to run {line!r}.")


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("documentation") / "scene")


def test_snippets_are_found():
    assert len(PAGES_WITH_SNIPPETS) > 12
    assert sum(len(snippets(page)) for page in PAGES) > 60


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_the_repository_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", [page.relative_to(ROOT) for page in PAGES], ids=str)
def test_no_placeholder_is_left_in_a_page(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b|\bXXX\b", text) == []


def test_every_checkpoint_that_ships_has_a_card_with_its_accuracy():
    for name in available_checkpoints():
        card = (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
        section = card.split("## Accuracy by budget", 1)[1].split("\n## ", 1)[0]
        assert section.count("\n|") > 3, name  # a table: head, line, two budgets at least
        assert "polyscale evaluate" in section, name


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert cited == newest == polyscale.__version__


def test_lists_of_values_are_read_as_the_command_reads_them():
    assert join_lists(["--budgets", "4", "8", "file"]) == ["--budgets", "4,8", "file"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, torchao and the exporters
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES_WITH_SNIPPETS, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run(page, scene, tmp_path, monkeypatch):
    monkeypatch.chdir(copy_scene(scene, tmp_path / "here", MADE.get(page.name, ())))
    monkeypatch.setattr(sys, "argv", ["python"])
    names: dict = {"__name__": "documentation"}
    for language, text, line in snippets(page):
        if language == "python":
            # as many empty lines in front as the page has, so that a traceback names the page's own line
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
        else:
            for command in text.replace("\\\n", " ").splitlines():
                run_line(command)
