"""`torch.compile`: one graph, and no new one when settings come back that were seen before."""

import pytest
import torch
from torch.testing import assert_close

from .families import each_family


_COLUMN = "torch.compile, one graph, no recompilation"


class CountingBackend:
    """A compiler backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_family(_COLUMN)
def test_no_recompilation_when_a_budget_returns(family):
    model, inputs = family.make_model(), family.make_inputs()
    backend = CountingBackend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for budget in family.budgets:
            assert_close(compiled(inputs, **budget.knobs).logits, model(inputs, **budget.knobs).logits)
        graphs = backend.graphs
        assert graphs <= len(family.budgets)
        for budget in (*family.budgets, *reversed(family.budgets)):
            assert_close(compiled(inputs, **budget.knobs).logits, model(inputs, **budget.knobs).logits)
    assert backend.graphs == graphs


@each_family(_COLUMN)
def test_training_step_in_one_graph(family):
    model, inputs, labels = family.make_model().train(), family.make_inputs(), torch.tensor([0, 1])
    backend = CountingBackend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for budget in (*family.budgets, *family.budgets):
        model.zero_grad()
        model(inputs, labels=labels, **budget.knobs).loss.backward()
        expected = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        compiled(inputs, labels=labels, **budget.knobs).loss.backward()
        assert_close([parameter.grad for parameter in model.parameters()], expected)
    assert backend.graphs <= len(family.budgets)


@pytest.mark.slow
@each_family(_COLUMN)
def test_hidden_states_in_one_graph(family):
    """transformers installs its recorders at the first eager call; after it, recording does not break the graph."""
    model, inputs = family.make_model(family.model), family.make_inputs()
    with torch.no_grad():
        expected = model(inputs, output_hidden_states=True).hidden_states
        compiled = torch.compile(model, fullgraph=True, backend=CountingBackend())
        assert_close(compiled(inputs, output_hidden_states=True).hidden_states, expected)


@pytest.mark.slow
@each_family(_COLUMN)
def test_generated_code_is_right(family):
    """The default backend, which generates C++ on a CPU."""
    model, inputs = family.make_model(), family.make_inputs()
    budget = family.budgets[-1]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        assert_close(
            compiled(inputs, **budget.knobs).logits, model(inputs, **budget.knobs).logits, rtol=1e-4, atol=1e-5
        )
