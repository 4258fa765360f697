"""The documentation's table of what a server can use, from a real run of every tower in every kind of LLaVA model.

`python -m tests.serving.servable_table docs/serving.md` writes it between the marks of the page.
"""

import sys
from pathlib import Path

from polyscale.serving import check_servable

from ..llava.llava_tiny import HOSTS, swapped


START, END = "<!-- servable -->", "<!-- end of servable -->"
HOST_TITLES = {
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "vipllava": "VipLLaVA",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma 3",
}
TOWER_TITLES = {
    "own": "the tower that it comes with",
    "s2": "S2",
    "s2_dynamic": "Dynamic-S2",
    "flexivit": "FlexiViT",
    "flexivit_registers": "FlexiViT with registers",
    "flexivit_no_cls": "FlexiViT without CLS",
    "flexivit_merging": "FlexiViT, tokens merged",
    "quadtree": "Quadtree ViT, `num_tokens`",
    "quadtree_threshold": "Quadtree ViT, `split_threshold`",
    "quadtree_merging": "Quadtree ViT, tokens merged",
    "sparseformer": "SparseFormer",
    "sparseformer_cls": "SparseFormer with CLS",
}
REFUSED = "refused"


def cell(tower: str, host: str) -> tuple[str, str | None]:
    """What the table says about a tower in a host, and for a refusal its reason."""
    try:
        report = check_servable(*(HOSTS[host]() if tower == "own" else swapped(tower, host)))
    except ValueError as error:
        words = str(error).partition(": ")[2].partition(";")[0].split(" ", 1)  # "it passes nothing but ..."
        return REFUSED, f"Such a model {words[1]}"
    passed = sum(check.passed for check in report.checks)
    return f"{passed} of {len(report.checks)}", None


def render() -> str:
    """The table, with the reasons of refusals below it."""
    lines = ["| tower | " + " | ".join(HOST_TITLES.values()) + " |", "|---|" + "---|" * len(HOST_TITLES)]
    reasons: list[str] = []
    for tower, title in TOWER_TITLES.items():
        words = []
        for host in HOST_TITLES:
            word, reason = cell(tower, host)
            if reason is not None:
                if reason not in reasons:
                    reasons.append(reason)
                word += f" [{reasons.index(reason) + 1}]"
            words.append(word)
        lines.append(f"| {title} | " + " | ".join(words) + " |")
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes])


def write(path: Path) -> None:
    """Puts the table between the marks of a page."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{path} has no {START} ... {END}.")
    path.write_text(f"{before}{START}\n\n{render()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
