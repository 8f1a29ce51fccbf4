"""Compiled, exported and traced at a constant budget: one graph, and in it nothing that the budget does not pay for."""

import warnings

import pytest
import torch

from conftest import batch_of, budgetformer, stock_classifier
from hf_budgetformer.tools.narrowing import cut


BUDGETS = (1.0, 0.5, 0.25, 0.125)


def wide(backbone_type, **fields):
    """Half a model's units in the narrow encoder, so that budgets leave some of them closed."""
    return budgetformer(backbone_type, narrow_budget=0.5, **fields)


class Exported(torch.nn.Module):
    def __init__(self, model, budget):
        super().__init__()
        self.model, self.budget = model, budget

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, budget=self.budget).logits


def export(model, budget, backbone_type):
    batch = batch_of([5, 9], backbone_type)
    return torch.export.export(Exported(model, budget), (batch["input_ids"], batch["attention_mask"]))


def products(program):
    """Shapes of the weights, (outputs, inputs), of an exported program's matrix products."""
    linear = torch.ops.aten.linear.default
    nodes = [node for node in program.graph.nodes if node.target is linear]
    return [tuple(node.args[1].meta["val"].shape) for node in nodes]


def used(program):
    """Names of the parameters that an exported program reads."""
    parameters = program.graph_signature.inputs_to_parameters
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in parameters]
    return {parameters[node.name].removeprefix("model.") for node in nodes if node.users}


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_exported_graph_holds_the_open_units_and_nothing_else(budget, backbone_type):
    model = wide(backbone_type)
    program = export(model, budget, backbone_type)
    batch = batch_of([5, 9], backbone_type)
    logits = program.module()(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(logits, model(**batch, budget=budget).logits, rtol=1e-4, atol=1e-5)
    names = {name for name in used(program) if not name.startswith(f"{model.base_model_prefix}.embeddings.")}
    if budget == 1.0:
        assert names
        assert not any(name.startswith("narrow.") for name in names)
        return
    assert all(name.startswith("narrow.") for name in names)
    counts = model.narrow.order.look(budget).counts
    expected = []
    last = len(counts.heads) - 1
    for layer, (heads, neurons) in enumerate(zip(counts.heads, counts.neurons, strict=True)):
        # In the last layer the first token asks alone, and all are keys and values.
        projections = [(4 * heads, 16), (2 * 4 * heads, 16)] if layer == last else [(3 * 4 * heads, 16)]
        expected += [*projections, (16, 4 * heads)] if heads else []
        expected += [(neurons, 16)] * (neurons > 0) + [(16, neurons)] * (neurons > 0)
    encoder = products(program)[: len(expected)]
    assert encoder == expected
    assert len(products(program)) == len(expected) + 2  # pooler, or dense, and classifier


def test_a_cut_model_exports_without_a_view(backbone_type):
    program = export(cut(wide(backbone_type), 0.25), None, backbone_type)
    whole = {name: tuple(x.shape) for name, x in program.state_dict.items() if x.dim() == 2}
    shapes = {shape for name, shape in whole.items() if "narrow." in name and "layer" in name}
    rows = max(shape[0] for shape in shapes if shape[0] % 12 == 0)
    split = {(rows // 3, 16), (rows // 3 * 2, 16)}  # the last layer's queries, and its keys and values
    assert shapes | split >= {shape for shape in products(program)[:-2] if 0 not in shape}


@pytest.mark.parametrize("budget", [pytest.param(1.0, marks=pytest.mark.slow), 0.25])
def test_one_compiled_graph_serves_batches_of_all_sizes(budget):
    """A message made of a size, in a check that does not fail, would compile each size anew."""
    model, graphs = wide("bert", num_hidden_layers=2).requires_grad_(False), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.config.problem_type = "single_label_classification"  # which the stock loss writes there when it first runs
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([5, 9], [5, 9, 3], [7, 2, 11, 4], [12] * 5):
        batch = batch_of(lengths)
        labels = torch.zeros(len(lengths), dtype=torch.long)
        outputs, expected = (run(**batch, labels=labels, budget=budget) for run in (compiled, model))
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(outputs.budget, expected.budget)
    assert len(graphs) == 1


@pytest.mark.parametrize("budget", [1.0, 0.25, None])
def test_a_traced_model_answers_the_same_with_and_without_gradients(budget, backbone_type):
    """`torch.jit.trace`, and OpenVINO's converter on it, check what gradients gave against a run without."""
    model = Exported(wide(backbone_type), budget)
    batch, other = batch_of([5, 9], backbone_type), batch_of([4, 9], backbone_type, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is made constant, and that TorchScript is old
        traced = torch.jit.trace(model, tuple(batch.values()), check_trace=True)
    for inputs in (batch, other):
        with torch.no_grad():
            expected = model.model(**inputs, budget=1.0 if budget is None else budget).logits  # a graph has no doubt
            torch.testing.assert_close(traced(*inputs.values()), expected, rtol=1e-4, atol=1e-5)


def test_numbers_do_not_depend_on_whether_gradients_are_on(backbone_type):
    model, batch = wide(backbone_type), batch_of([5, 9, 12], backbone_type)
    for executor in ("auto", "masked"):
        for budget in (*BUDGETS, None):
            with torch.no_grad():
                expected = model(**batch, budget=budget, executor=executor).logits
            assert torch.equal(model(**batch, budget=budget, executor=executor).logits, expected)


def test_the_stock_graph_is_the_graph_at_budget_one(backbone_type):
    """As many matrix products as the stock class has, of the same shapes."""
    batch = batch_of([5, 9], backbone_type)
    stock = torch.export.export(stock_classifier(backbone_type), (batch["input_ids"], batch["attention_mask"]))
    assert products(export(wide(backbone_type), 1.0, backbone_type)) == products(stock)
