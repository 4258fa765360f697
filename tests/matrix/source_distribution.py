"""Hugging Face's own common test-suite, taken from the source distribution of the installed transformers.

The source distribution is downloaded once, with pip, into the user's cache; nothing of it is part of this repository.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers


_PACKAGE = "transformers_common_tests"
# What the suite imports from neighbours that the source distribution leaves out. The mixins in them ask text models
# about generation, and every model about export, which `test_export.py` asks here.
_STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "polyscale" / f"transformers-{transformers.__version__}"


def _download(folder: Path) -> None:
    """Puts `tests/` of the source distribution into `folder`, all at once or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        result = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(
                f"The source distribution of {requirement} could not be downloaded; with it come Hugging Face's "
                f"common tests. pip said:\n{result.stdout}\n{result.stderr}"
            )
        package = scratch / "unpacked" / _PACKAGE
        for name, text in _STUBS.items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(text)
        with tarfile.open(next(scratch.glob("transformers-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                path = Path(member.name)
                if path.parent.name == "tests" and len(path.parts) == 3 and path.suffix == ".py":
                    (package / path.name).write_bytes(archive.extractfile(member).read())
        try:
            package.parent.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise


def import_common_tests(name: str, picture: Path) -> types.ModuleType:
    """A module of the suite, e.g. "test_modeling_common". `picture` stands in for the photographs it downloads."""
    folder = _cache_folder()
    if not folder.is_dir():
        _download(folder)
    fetcher = types.ModuleType("fetch_hub_objects_for_ci")
    fetcher.url_to_local_path = lambda url, *args, **kwargs: str(picture)
    sys.modules.setdefault(fetcher.__name__, fetcher)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(f"{_PACKAGE}.{name}")


__all__ = ["import_common_tests"]
