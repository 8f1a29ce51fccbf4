"""The README's Python blocks run as they are written, on local stand-ins for what the Hub would give."""

import re
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from documents import README, ROOT, blocks, run_python, use_stand_ins


BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="module")
def namespace(tmp_path_factory, texts, tokenizer):
    """What is there after all blocks."""
    found = blocks(README, "python")
    assert len(found) >= 2
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_stand_ins(monkeypatch, tmp_path_factory.mktemp("readme"), texts, tokenizer)
        stock = AutoModelForSequenceClassification.from_pretrained("me/my-fine-tuned-bert").eval()
        yield {**run_python("README.md", found), "stock": stock}


def test_the_python_blocks_run_in_order(namespace):
    assert namespace["model"].is_trained()
    assert namespace["model"].config.margins is not None
    assert namespace["out"].budget.shape == (2,)
    assert set(namespace["classify"]("w1 w2")[0]) == {"label", "score"}


def test_a_budget_of_1_is_the_users_model_after_training_too(namespace):
    model, batch = namespace["model"], namespace["batch"]
    ours = model(**batch, budget=1.0, executor="masked").logits
    assert torch.equal(ours, namespace["stock"](**batch).logits)


def count_flops(model, batch, budget):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, budget=budget)
    return counter.get_total_flops()


def test_a_quarter_of_the_work_is_at_most_a_quarter_of_the_flops_with_gradients_on(namespace):
    model, batch = namespace["model"].eval(), namespace["batch"]
    assert torch.is_grad_enabled()
    whole = count_flops(model, batch, 1.0)
    # Work is counted at 128 tokens, where a head of a model this narrow costs nearly twice what it does at these few.
    assert 0.15 < count_flops(model, batch, 0.25) / whole < 0.27
    assert count_flops(model, batch, 1 / 12) / whole < 0.15


def test_the_table_of_savings_is_what_was_measured():
    import report

    results = report.read_results(BENCHMARKS / "results")
    assert report.fill(README, "savings", report.savings(results)) == README


def test_the_table_of_savings_is_made_of_results():
    import report

    names = ["stock", "onnx-int8", "openvino-int8", "ours 1", "looks 1/12, all for 10%", "ours 1/4"]
    figures = {
        "ways": {f"{x} sorted": {"ratio_to_sorted": {"median": float(n)}} for n, x in enumerate(names, 1)},
        "latency_ms": {"ours 1/4": {"ratio": 2.5}},
    }
    result = {"settings": {"level": "model", "title": "Some news"}, "figures": {"2": figures}}
    told = report.savings({"some": result})
    for number, start in enumerate(
        ["stock model, P", "stock model, onnx", "stock model, O", "ours, all", "**o", "ours, e"], 1
    ):
        assert re.search(rf"^\| {re.escape(start)}.* \| {number}.0x \|$", told, flags=re.MULTILINE)
    assert "2.5x (Some news)" in told
    assert "Not measured yet" in report.savings({})


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
