"""Lower bounds: each dependency has one, and `make test-lowest` runs with exactly these versions."""

import pytest

from .lowest import lowest_versions


def write_project(folder, requirement):
    path = folder / "pyproject.toml"
    path.write_text(f"""[project]
name = "mine"
dependencies = ["torch>=2.8", "transformers>=5.23,<6", "{requirement}"]
optional-dependencies = {{ all = ["mine[some]"], some = ["ruff==0.17.5"] }}
""")
    return path


def test_bounds_become_constraints(tmp_path):
    versions = lowest_versions(write_project(tmp_path, "Pillow>=10.0.1"))
    assert versions == {"torch": "2.8", "transformers": "5.23", "Pillow": "10.0.1", "ruff": "0.17.5"}


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", "numpy~=2.0", "numpy>=2.0; python_version<'3.12'"])
def test_a_dependency_without_a_bound_is_refused(tmp_path, requirement):
    with pytest.raises(ValueError, match="no lower bound"):
        lowest_versions(write_project(tmp_path, requirement))


def test_every_dependency_of_this_project_has_a_bound():
    assert {"torch", "transformers", "onnx", "timm", "av", "pytest"} <= lowest_versions().keys()
