"""Sample photographs; `ATTRIBUTION.md` beside this file names authors and licences."""

from pathlib import Path


def sample_photographs() -> list[Path]:
    """The photographs that ship with the package; each name begins with the CIFAR-10 class of what it shows."""
    return sorted((Path(__file__).parent / "photographs").glob("*.jpg"))


__all__ = ["sample_photographs"]
