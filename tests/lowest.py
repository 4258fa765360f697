"""Prints the lower bound of every dependency in pyproject.toml as a constraint for pip, one `name==version` a line."""

import re
import tomllib
from pathlib import Path


_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# A name and its first bound; what follows, such as ",<6", bounds it from above.
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:>=|==)(?P<version>[\w.]+)(?:,<[\w.]+)?")


def lowest_versions(path: Path = _PYPROJECT) -> dict[str, str]:
    """Name -> lowest version, of the dependencies and of all extras.

    Raises:
        ValueError: for a dependency without a lower bound.
    """
    project = tomllib.loads(path.read_text())["project"]
    versions = {}
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in requirements:
            if requirement.startswith(f"{project['name']}["):  # other extras of this project
                continue
            match = _REQUIREMENT.fullmatch(requirement)
            if match is None:
                raise ValueError(f"{requirement!r} in {path.name} has no lower bound: write it as `name>=version`.")
            versions[match["name"]] = match["version"]
    return versions


if __name__ == "__main__":
    for _name, _version in lowest_versions().items():
        print(f"{_name}=={_version}")
