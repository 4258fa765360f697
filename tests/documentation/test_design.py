"""The tables of the design page, held against the code."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
SOURCES = {
    path.relative_to(ROOT / "src").as_posix().removeprefix("polyscale/"): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "src").rglob("*.py"))
}
FAMILIES = ("flexivit", "quadtree_vit", "sparseformer", "sparseformer_video", "s2_vision")


def rows(heading: str) -> list[list[str]]:
    """The cells of each row of the first table under a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def imports(source: str) -> set[str]:
    """Every name that is imported, with its module."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    return {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


IMPORTS = {file: imports(source) for file, source in SOURCES.items()}
PRIVATE = [(name, set(code(files))) for names, files, _ in rows("What is private") for name in code(names)]


@pytest.mark.parametrize(("name", "files"), PRIVATE, ids=[name for name, _ in PRIVATE])
def test_a_private_name_is_used_where_the_page_says(name, files):
    if any(name in found for found in IMPORTS.values()):
        assert {file for file, found in IMPORTS.items() if name in found} == files
    else:
        word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
        assert {file for file, source in SOURCES.items() if word.search(source)} == files


def own_names(tree: ast.AST) -> set[str]:
    """Names that a module defines: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def test_the_page_names_every_private_attribute_of_others():
    trees = [ast.parse(source) for source in SOURCES.values()]
    own = set().union(*map(own_names, trees))
    used = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    modules = {name for found in IMPORTS.values() for name in found if re.search(r"(^|\.)_[a-z]", name)}
    named = " ".join(name for name, _ in PRIVATE)
    unnamed = {name for name in used - own if not re.search(rf"(?<!\w){name}(?!\w)", named)}
    assert unnamed - {"_C"} == set()
    assert {name for name in modules if name.startswith(("torch", "transformers")) and name not in named} == set()


def names_a_family(file: str) -> bool:
    texts = {node.value for node in ast.walk(ast.parse(SOURCES[file])) if isinstance(node, ast.Constant)}
    is_import = any(re.search(rf"models\.({'|'.join(FAMILIES)})\b", name) for name in IMPORTS[file])
    return is_import or not texts.isdisjoint(FAMILIES)


def test_the_page_names_every_file_that_names_a_family():
    listed = {file for files, _, _ in rows("Where a family is named") for file in code(files)}
    assert {file for file in SOURCES if not file.startswith("models/") and names_a_family(file)} == listed


def test_the_places_that_the_page_sends_to_are_there():
    places = {text for _, place in rows("Where a change goes") for text in code(place)}
    files = {text for text in places if re.fullmatch(r"[\w/]+\.py", text) and not text.startswith("tests/")}
    names = {file.rpartition("/")[2] for file in SOURCES}
    assert {file for file in files if file not in SOURCES and file not in names} == set()
    assert {text for text in places if text.startswith("tests/") and not (ROOT / text).exists()} == set()
    words = {text for text in places if re.fullmatch(r"[a-z]+_\w+|[A-Z]\w+", text)}
    assert {
        word for word in words if not any(re.search(rf"\b{word}\b", source) for source in SOURCES.values())
    } == set()
