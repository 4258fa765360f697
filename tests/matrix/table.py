"""The documentation's table of what works for which family, made from the results of the tests."""

import json
from collections import defaultdict
from pathlib import Path

import torch
import transformers


# The rows, in the order of the page -> a remark on how they are tested, or None.
COLUMNS: dict[str, str | None] = {
    "save and load in a fresh process": None,
    "Auto classes": (
        "`AutoBackbone.from_pretrained` takes no local folder in transformers 5.23; the class itself does."
    ),
    "image processors, torchvision and PIL": None,
    "token budget from the config": None,
    'pipeline("image-classification")': None,
    'pipeline("image-feature-extraction")': None,
    "Trainer: the loss falls on photographs": None,
    "gradient checkpointing, equal gradients": None,
    "Trainer: a killed run, resumed, equals an unbroken one": None,
    "accelerate launch, two processes (DDP)": None,
    "FSDP2, two processes": "By `DistributedConfig(fsdp_size=2)`: accelerate's own FSDP needs an accelerator.",
    "tensor parallel, two processes": None,
    "device_map with offload to disk": None,
    "float16 and bfloat16, also under autocast": None,
    "sdpa equals eager": None,
    "flex attention, where the class says so": "Flash attention needs a GPU and is not part of the tests.",
    "hidden states (True, int, list) and attentions": None,
    "torch.compile, one graph, no recompilation": None,
    "torch.export, any batch size": None,
    "ONNX, any batch size": None,
    "torch.onnx.export(dynamo=True), any batch size": None,
    "OpenVINO, any batch size": None,
    "ExecuTorch (XNNPACK), any batch size": None,
    "int8 weights (torchao)": None,
    "LoRA (peft), saved and reloaded": None,
    "LLaVA tower at two budgets: forward, loss, generate, save, reload": None,
    "LLaVA tower: projector-only and full training": None,
    "LLaVA with its tower swapped: fresh process, generation, hidden states, bfloat16, compile": (
        "`torch.compile` of the tower: transformers' code around it breaks the graph of every LLaVA."
    ),
    "converted and wrapped: reload, hidden states, compile": (
        "Checkpoints with learned positions (ViT), a pre-norm (CLIP), registers and SwiGLU (DINOv2), a bootstrapped "
        "SparseFormer; S2 around CLIP, ViT, DINOv2 and SigLIP."
    ),
    "converted and wrapped: resumed training equals unbroken": (
        "By the trainers of `polyscale.training`: `Trainer` itself leaves out weights that transformers stores under "
        "other names than they have in memory, such as those of a ViT."
    ),
    "without polyscale, by the code in the checkpoint": None,
    "Hugging Face's common test-suite": "Passed / need a GPU, deepspeed or kernels / do not apply.",
}
# Where a page holds the table.
START, END = "<!-- matrix -->", "<!-- end of matrix -->"
_COUNTED = "Hugging Face's common test-suite"
# Words in the reason of a skip that say that a machine lacks something, not that the test makes no sense here.
_LACKING = ("gpu", "cuda", "accelerator", "deepspeed", "kernel", "flash", "mps", "xpu", "slow", "bitsandbytes")
# How the reason of a skip begins where a whole row lacks a library, or a version of one.
_NEEDS = "needs "
# For libraries that are not installed everywhere: row -> which run found its results, family -> "" or why a gap.
RECORDED = Path(__file__).with_name("recorded.json")


class Outcomes:
    """A pytest plugin: keeps the outcome of each test with a `matrix_cell` mark."""

    def __init__(self):
        # (column, family) -> test -> outcome; a test with failed parts has failed
        self.outcomes: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        self.reasons: dict[tuple[str, str], str] = {}
        # (column, family) -> tests skipped because this machine lacks something
        self.lacking: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report) -> None:
        for name, value in report.user_properties:
            if name != "matrix_cell" or (report.when != "call" and report.passed):
                continue
            cell = tuple(value)
            if self.outcomes[cell].get(report.nodeid) != "failed":
                self.outcomes[cell][report.nodeid] = report.outcome
            if hasattr(report, "wasxfail"):
                self.outcomes[cell][report.nodeid] = "gap"
                self.reasons[cell] = report.wasxfail.removeprefix("reason: ")
            elif report.skipped and isinstance(report.longrepr, tuple):
                reason = self.reasons[cell] = report.longrepr[2].removeprefix("Skipped: ")
                if any(word in reason.lower() for word in _LACKING):
                    self.lacking[cell].add(report.nodeid)


class MatrixTable(Outcomes):
    """A pytest plugin that writes the table at the end."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def pytest_sessionfinish(self) -> None:
        if self.outcomes:
            self.path.write_text(self._placed(self.render()), encoding="utf-8")

    def _placed(self, table: str) -> str:
        """The table, or a page that is there already with the table between its marks."""
        page = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        before, start, rest = page.partition(START)
        _, end, after = rest.partition(END)
        return f"{before}{start}\n\n{table}\n{end}{after}" if start and end else table

    def render(self) -> str:
        from .families import FAMILIES

        recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
        notes: list[str] = []

        def note(*texts: str) -> str:
            notes.extend(text for text in texts if text not in notes)
            # One pair of brackets: Markdown reads `[7] [6]` as a link.
            return f" [{', '.join(str(notes.index(text) + 1) for text in texts)}]"

        lines = [
            "| | " + " | ".join(family.title for family in FAMILIES) + " |",
            "|---|" + "---|" * len(FAMILIES),
        ]
        for column, remark in COLUMNS.items():
            cells = [column + (note(remark) if remark else "")]
            for family in FAMILIES:
                if column in family.not_asked:
                    cells.append("n/a" + note(family.not_asked[column]))
                    continue
                outcomes = list(self.outcomes.get((column, family.name), {}).values())
                if "failed" in outcomes:
                    cells.append("✗")
                elif "gap" in outcomes:
                    cells.append("no" + note(self.reasons[column, family.name]))
                elif "passed" in outcomes:
                    lacking = len(self.lacking[column, family.name])
                    counts = f"{outcomes.count('passed')} / {lacking} / {outcomes.count('skipped') - lacking}"
                    cells.append(f"✓ {counts}" if column == _COUNTED else "✓")
                elif self.reasons.get((column, family.name), "").startswith(_NEEDS):
                    row = recorded.get(column, {"gaps": {}})
                    if family.name in row["gaps"]:
                        gap = row["gaps"][family.name]
                        cells.append("no" + note(gap, row["by"]) if gap else "✓" + note(row["by"]))
                    else:
                        cells.append(f"not run here: {self.reasons[column, family.name]}")
                elif outcomes:
                    cells.append("n/a" + note(self.reasons.get((column, family.name), "skipped")))
                else:
                    cells.append("not run")
            lines.append("| " + " | ".join(cells) + " |")
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, CPU"
        lines += [
            "",
            f"Each ✓ is a test that ran with {versions}: `pytest tests/matrix --matrix-table docs/tested.md`; a note "
            "says where it was another run.",
        ]
        lines += ["", *(f"{index}. {text}" for index, text in enumerate(notes, start=1))]
        return "\n".join(lines) + "\n"


__all__ = ["COLUMNS", "RECORDED", "MatrixTable", "Outcomes"]
