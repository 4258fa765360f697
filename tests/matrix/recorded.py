"""Results of rows that need a library which `make test` does not install, kept from a run that had it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from .table import RECORDED, Outcomes


class Recorder(Outcomes):
    """A pytest plugin: writes to `RECORDED` what this run found, with which command and versions, and when."""

    def __init__(self, library: str, arguments: Sequence[str]):
        super().__init__()
        self.library = library
        self.command = " ".join(("pytest", *arguments))

    def pytest_sessionfinish(self) -> None:
        # A family whose tests failed is left out: its cell says that nothing is known.
        rows: dict[str, dict[str, str]] = {}
        for (column, family), outcomes in self.outcomes.items():
            found = set(outcomes.values())
            if found != {"skipped"}:
                row = rows.setdefault(column, {})
                if found <= {"passed", "gap"}:
                    row[family] = self.reasons[column, family] if "gap" in found else ""
        versions = (f"{name} {version(name).partition('+')[0]}" for name in (self.library, "transformers", "torch"))
        by = f"By `{self.command}` on {datetime.now(UTC).date()}, with {', '.join(versions)}."
        recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
        recorded.update({column: {"by": by, "gaps": gaps} for column, gaps in rows.items()})
        RECORDED.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")


__all__ = ["Recorder"]
