"""A baked model answers as the one it comes from does with the same heads open, and an exported one as it is."""

import logging
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from conftest import STOCK, batch_of, budgetformer, stir_routers, stock_classifier, stock_config
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.tools import export
from hf_budgetformer.tools.baselines import prune
from hf_budgetformer.tools.export import bake, count_open_heads, export_onnx


KINDS = ["baked", "own", 0.5, 1.0]


def batches(backbone_type):
    return [batch_of([9, 4, 6], backbone_type, seed=seed) for seed in range(4)]


def test_the_count_is_the_mean_of_the_gates(backbone_type):
    model = budgetformer(backbone_type).train()
    found = count_open_heads(model, batches(backbone_type), 0.5)
    assert model.training
    model.eval()
    gates = [model(**batch, head_budget=0.5, output_head_gates=True).head_gates for batch in batches(backbone_type)]
    torch.testing.assert_close(found, torch.cat(gates).mean(0))


@pytest.mark.parametrize("head_budget", [0.3, 0.6, 1.0, None])
def test_a_baked_model_keeps_what_is_opened_most_often(backbone_type, head_budget):
    model = budgetformer(backbone_type)
    opened = count_open_heads(model, batches(backbone_type), head_budget)
    baked = bake(model, batches(backbone_type), head_budget)
    heads = baked.config.static_heads
    assert abs(sum(map(len, heads)) - opened.sum().item()) <= 1.0
    for shares, kept in zip(opened, heads, strict=True):
        closed = [share for head, share in enumerate(shares.tolist()) if head not in kept]
        assert min(shares[kept].tolist()) >= max(closed, default=0.0)


def test_a_baked_model_answers_as_the_dynamic_one_with_these_gates_forced(backbone_type, tmp_path):
    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type)
    bake(model, batches(backbone_type), 0.5).save_pretrained(tmp_path)
    baked = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for layer, kept in zip(model.base_model.encoder.layer, baked.config.static_heads, strict=True):
        forced = torch.zeros(4).index_fill(0, torch.tensor(kept), 1.0)
        layer.router._choose = lambda count, scores, forced=forced: forced.expand_as(scores)
    with torch.no_grad():
        expected = model(**batch, executor="masked").logits
        torch.testing.assert_close(baked(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_baked_model_compiles_into_one_graph():
    baked, batch = bake(budgetformer("bert"), batches("bert"), 0.5), batch_of([9, 4, 6])
    with torch.no_grad():
        compiled = torch.compile(baked, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**batch).logits, baked(**batch).logits, rtol=1e-5, atol=1e-5)


def test_what_has_no_routers_cannot_be_baked():
    with pytest.raises(ValueError, match="with routers, got BertForSequenceClassification"):
        bake(STOCK["bert"][2](stock_config("bert")), batches("bert"))
    with pytest.raises(ValueError, match="with routers"):
        bake(prune(budgetformer("bert"), [[0], [1], [2]]), batches("bert"))
    with pytest.raises(ValueError, match="at least one batch"):
        bake(budgetformer("bert"), [])


def small(backbone_type, kind):
    """Two layers, for exporting takes seconds for each; baked or not."""
    torch.manual_seed(0)  # module fixtures come before the seed of a test
    config = BudgetFormerConfig.from_backbone_config(stock_config(backbone_type, num_hidden_layers=2))
    model = stir_routers(BudgetFormerForSequenceClassification(config).eval())
    return bake(model, batches(backbone_type), 0.5) if kind == "baked" else model


def answers(path, model, batch):
    """Logits and heads by onnxruntime and by torch, and labels alike."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    outputs = [x.name for x in session.get_outputs()]
    if "token_type_ids" in names:
        batch["token_type_ids"] = torch.arange(batch["input_ids"].numel()).view(batch["input_ids"].shape) % 2
    assert set(names) == set(batch)
    assert all(x.shape == ["batch", "length"] for x in session.get_inputs())
    found = session.run(None, {name: batch[name].numpy() for name in names})
    return dict(zip(outputs, map(torch.from_numpy, found), strict=True)), model(**batch)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A baked model and its file; and the program, for tests that need not trace it again."""
    pytest.importorskip("onnxruntime")
    traced = []
    trace, path = export._trace, tmp_path_factory.mktemp("exported") / "folder" / "model.onnx"
    model = small("bert", "baked").train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_trace", lambda *given: traced.append(trace(*given)) or traced[0])
        assert export_onnx(model, path) == path
    assert model.training
    assert [x.name for x in path.parent.iterdir()] == ["model.onnx"]
    return model.eval(), path, traced[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [[9], [12, 3, 7, 1, 1], [32, 30], [6, 6, 6]])
def test_an_exported_model_answers_as_it_did_for_any_batch_length_and_padding(exported, lengths, side):
    model, path, _ = exported
    with torch.no_grad():
        found, expected = answers(path, model, batch_of(lengths, side=side, seed=7))
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)


def test_int8_answers_nearly_as_the_model_does(exported, monkeypatch, tmp_path):
    model, _, program = exported
    monkeypatch.setattr(export, "_trace", lambda *given: program)
    export_onnx(model, tmp_path / "int8.onnx", quantize=True)
    with torch.no_grad():
        found, expected = answers(tmp_path / "int8.onnx", model, batch_of(list(range(3, 33)) * 4, seed=3))
    both = torch.stack([found["logits"].flatten(), expected.logits.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.98
    assert (both.view(2, -1, 3).argmax(-1).diff(dim=0) == 0).float().mean() > 0.85
    assert not torch.allclose(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "int8.onnx").read_bytes().count(b"MatMulInteger") > 0
    assert [x.name for x in tmp_path.iterdir()] == ["int8.onnx"]


def test_what_fails_the_check_leaves_no_file_and_replaces_none(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_trace", lambda *given: exported[2])
    other = small("bert", "baked")
    other.classifier.bias.data[0] += 0.01
    (tmp_path / "there.onnx").write_text("before")
    for name in ("new.onnx", "there.onnx"):
        with pytest.raises(RuntimeError, match="must answer as the model does"):
            export_onnx(other, tmp_path / name)
    assert [x.name for x in tmp_path.iterdir()] == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "before"
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_exported(backbone_type, kind, tmp_path):
    model = small(backbone_type, kind)
    head_budget = kind if isinstance(kind, float) else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(model, tmp_path / "model.onnx", head_budget)
    model.config.head_budget = head_budget
    with torch.no_grad():
        for lengths, side in (([9], "right"), ([12, 3, 7, 1, 1], "left"), ([12, 3, 7, 32], "right")):
            found, expected = answers(path, model, batch_of(lengths, backbone_type, side=side, seed=7))
            torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)
            assert ("head_budget" in found) == (kind != "baked")
            if "head_budget" in found:
                torch.testing.assert_close(found["head_budget"], expected.head_budget)


def test_what_cannot_be_exported_is_named_before_anything_is_written(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_trace", lambda *given: pytest.fail("traced"))
    model, path = budgetformer("bert"), tmp_path / "folder" / "model.onnx"
    for wrong in (stock_classifier("bert"), BudgetFormerModel(model.config)):
        with pytest.raises(ValueError, match=f"must be a BudgetFormer classifier, got {type(wrong).__name__}"):
            export_onnx(wrong, path)
    with pytest.raises(ValueError, match=r"head_budget must be a share.*got 2"):
        export_onnx(model, path, 2)
    with pytest.raises(ValueError, match=r"the heads of this model are static; got 0.5"):
        export_onnx(prune(model, [[0], [1], [2]]), path, 0.5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError, match="must be that of a file, got the folder"):
        export_onnx(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        export_onnx(model, tmp_path / "file" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install \"hf-budgetformer\[onnx\]\""):
        export_onnx(model, path)
