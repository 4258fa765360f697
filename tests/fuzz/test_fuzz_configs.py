"""Configs from random fields, assignments, and records of files."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..tiny_models import FAMILIES, tiny_config, tiny_fields
from .outcomes import anything, cases, clear_error_at_most


def _names(family):
    config_class, _ = tiny_fields(family)
    fields = [field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")]
    return st.one_of(st.sampled_from([*fields, "num_labels", *config_class.attribute_map]), st.text(max_size=8))


@pytest.mark.parametrize("family", FAMILIES)
@cases(15)
@given(data=st.data())
def test_making_a_config(family, data):
    config_class, fields = tiny_fields(family)
    changes = data.draw(st.dictionaries(_names(family), anything, min_size=1, max_size=2))
    with clear_error_at_most():
        config = config_class(**{**fields, **changes})
        again = config_class(**config.to_dict())
        assert again.to_dict() == config.to_dict()
        config.to_json_string()


@pytest.mark.parametrize("family", FAMILIES)
@cases(15)
@given(data=st.data())
def test_assignments(family, data):
    config = tiny_config(family)
    for _ in range(3):
        name, value = data.draw(_names(family)), data.draw(anything)
        before = config.to_dict()
        with clear_error_at_most(name, *config.attribute_map.values()):
            try:
                setattr(config, name, value)
            except ValueError:
                assert config.to_dict() == before
                raise
    with clear_error_at_most():
        type(config).from_dict(config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
@cases(15)
@given(data=st.data())
def test_budgets_and_sizes(family, data):
    config = tiny_config(family)
    size, budget = data.draw(anything), data.draw(anything)
    with clear_error_at_most():
        config.num_tokens_for(size)
    with clear_error_at_most():
        config.feature_grid_for(size)
    if config.budget_argument is not None:
        with clear_error_at_most():
            config.num_tokens_for(64, **{config.budget_argument: budget})
    name = data.draw(st.sampled_from([*config.changeable_fields, *config.fixed_fields, "banana"]))
    with clear_error_at_most():
        config.with_budget(**{name: budget})
