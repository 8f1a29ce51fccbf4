"""An exported model answers as it does here at that budget, and holds nothing else."""

import logging
import sys
import warnings

import pytest
import torch

from conftest import batch_of, budgetformer, equal_shares, stock_classifier, stock_config
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.tools.export import export_onnx, static_model
from hf_budgetformer.tools.narrowing import cut


def small(backbone_type):
    """Two layers, for exporting takes seconds for each; its narrow encoder was trained, so that it looks twice."""
    torch.manual_seed(0)  # module fixtures come before the seed of a test
    # As wide as it takes for parts of weights that the exporter leaves as operations by itself.
    stock = stock_config(backbone_type, num_hidden_layers=2, hidden_size=128)
    config = BudgetFormerConfig.from_backbone_config(stock, narrow_budget=0.5, opening_order=equal_shares(layers=2))
    model = BudgetFormerForSequenceClassification(config).eval()
    model.narrow.steps += 1
    return model


def answers(path, batch):
    """Logits by onnxruntime."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    if "token_type_ids" in names:
        batch["token_type_ids"] = torch.arange(batch["input_ids"].numel()).view(batch["input_ids"].shape) % 2
    assert set(names) == set(batch)
    assert all(x.shape == ["batch", "length"] for x in session.get_inputs())
    assert [x.name for x in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])


def weights_in(path):
    """Numbers that the file holds."""
    onnx = pytest.importorskip("onnx")
    return sum(torch.tensor(tuple(x.dims)).prod().item() for x in onnx.load(path).graph.initializer)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its file at a quarter, and the program, for tests that need not trace it again."""
    pytest.importorskip("onnxruntime")
    programs, export = [], torch.onnx.export
    path = tmp_path_factory.mktemp("exported") / "folder" / "model.onnx"
    model = small("bert").train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.onnx, "export", lambda *given, **named: programs.append(export(*given, **named)) or programs[0]
        )
        assert export_onnx(model, path, 0.25) == path
    assert model.training
    assert [x.name for x in path.parent.iterdir()] == ["model.onnx"]
    return model.eval(), path, programs[0]


@pytest.fixture
def traced_before(exported, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *given, **named: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **named: exported[2])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [[9], [12, 3, 7, 1, 1], [32, 30], [6, 6, 6]])
def test_an_exported_model_answers_as_here_for_any_batch_length_and_padding(exported, lengths, side):
    model, path, _ = exported
    batch = batch_of(lengths, side=side, seed=7)
    logits = answers(path, batch)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**batch, budget=0.25).logits, rtol=1e-4, atol=1e-4)


def test_a_graph_holds_what_the_budget_opens_and_nothing_else(exported):
    model, path, _ = exported
    assert weights_in(path) == pytest.approx(cut(model, 0.25).num_parameters(), rel=0.1)
    assert weights_in(path) < model.num_parameters() / 2


def test_int8_answers_nearly_as_the_model_does(exported, traced_before, tmp_path):
    model = exported[0]
    export_onnx(model, tmp_path / "int8.onnx", 0.25, dtype="int8")
    batch = batch_of(list(range(3, 33)) * 4, seed=3)
    logits = answers(tmp_path / "int8.onnx", batch)
    with torch.no_grad():
        expected = model(**batch, budget=0.25).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.98
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.85
    assert not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "int8.onnx").read_bytes().count(b"MatMulInteger") > 0
    assert [x.name for x in tmp_path.iterdir()] == ["int8.onnx"]


def test_what_fails_the_check_leaves_no_file_and_replaces_none(traced_before, tmp_path):
    other = small("bert")
    other.narrow.head.classifier_copy.bias.data[0] += 0.01
    (tmp_path / "there.onnx").write_text("before")
    for name in ("new.onnx", "there.onnx"):
        with pytest.raises(RuntimeError, match="Onnx must answer as the model does"):
            export_onnx(other, tmp_path / name, 0.25)
    assert [x.name for x in tmp_path.iterdir()] == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "before"
    assert logging.root.manager.disable == logging.NOTSET


def test_parts_of_weights_are_weights(exported):
    """Or what quantises passes them by, and NNCF stops at them (a query of the first token alone reads such a part)."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported[1]).graph
    weights = {x.name for x in graph.initializer}
    assert [node.op_type for node in graph.node if node.input and set(node.input) <= weights] == []


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["cut", 0.25, 1.0, None])
def test_every_kind_of_model_can_be_exported(backbone_type, budget, tmp_path):
    model = small(backbone_type)
    if budget == "cut":
        model, budget = cut(model, 0.25), None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(model, tmp_path / "model.onnx", budget)
    alone = 1.0 if budget is None and model.config.full_encoder else budget
    for lengths, side in (([9], "right"), ([12, 3, 7, 1, 1], "left"), ([12, 3, 7, 32], "right")):
        batch = batch_of(lengths, backbone_type, side=side, seed=7)
        logits = answers(path, batch)
        with torch.no_grad():
            torch.testing.assert_close(logits, model(**batch, budget=alone).logits, rtol=1e-4, atol=1e-4)
    assert weights_in(path) == pytest.approx(static_model(model, budget).num_parameters(), rel=0.1)


def test_a_plain_export_is_of_the_stock_model_and_a_cut_one_as_it_is(backbone_type):
    model = small(backbone_type)
    for budget in (None, 1.0):
        assert static_model(model, budget).config.model_type == backbone_type
    static = static_model(cut(model, 0.25))
    assert static.state_dict().keys() == static_model(model, 0.25).state_dict().keys()
    layered = budgetformer(backbone_type, router="layer")
    assert static_model(layered, 1.0).config.model_type == backbone_type
    with pytest.raises(ValueError, match=r"budget must be 1.0 with router='layer', .* got None"):
        static_model(layered)


def test_what_cannot_be_exported_is_named_before_anything_is_written(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    model, path = budgetformer("bert"), tmp_path / "folder" / "model.onnx"
    for wrong in (stock_classifier("bert"), BudgetFormerModel(model.config)):
        with pytest.raises(ValueError, match=f"must be a BudgetFormer classifier, got {type(wrong).__name__}"):
            export_onnx(wrong, path)
    for budget in (2, 0.5):
        with pytest.raises(ValueError, match=rf"budget must be a float in \(0, 0.25\].*got {budget}"):
            export_onnx(model, path, budget)
    with pytest.raises(ValueError, match=r"budget must be a float in \(0, 0.25\].*got 1.0"):
        export_onnx(cut(model, 0.25), path, 1.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError, match="must be that of a file, got the folder"):
        export_onnx(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        export_onnx(model, tmp_path / "file" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install \"hf-budgetformer\[onnx\]\""):
        export_onnx(model, path)
