"""Every public class and function says what its arguments are, in transformers' format."""

import inspect
import re

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

import polyscale


# `name (`int`, *optional*, defaults to 3): ...`, several names in front of one description included.
_ARGUMENT = re.compile(r"^\s+((?:[*\w]+)(?:, [*\w]+)*) \(`[^)]*", re.MULTILINE)


def documented_arguments(thing: object) -> set[str]:
    """Names that a docstring, or that of a base class in this library, describes with a type."""
    places = thing.__mro__ if inspect.isclass(thing) else (thing,)
    docs = [
        inspect.getdoc(part) or ""
        for place in places
        if place.__module__.startswith("polyscale")
        for part in (place, vars(place).get("__init__"))
    ]
    found = [match.split(", ") for doc in docs for match in _ARGUMENT.findall(doc)]
    return {name.lstrip("*") for names in found for name in names}


def arguments(thing: object) -> list[str]:
    """Names of the arguments that a user gives; those of models are their config, and of other wrappers `kwargs`."""
    if inspect.isclass(thing) and issubclass(thing, PreTrainedModel):
        return []
    if inspect.isclass(thing) and issubclass(thing, PreTrainedConfig):
        return thing._own_fields()
    if inspect.isclass(thing) and not any(
        "__init__" in vars(place) for place in thing.__mro__ if place.__module__.startswith("polyscale")
    ):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(thing).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in kinds]


@pytest.mark.parametrize("name", [name for name in polyscale.__all__ if callable(getattr(polyscale, name))])
def test_every_argument_has_its_type_in_the_docstring(name):
    thing = getattr(polyscale, name)
    missing = [argument for argument in arguments(thing) if argument not in documented_arguments(thing)]
    assert not missing, f"{name} does not describe {missing}"
