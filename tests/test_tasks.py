"""Every task on every backbone: the stock model at budget 1, its own looks, training, folders that go both ways."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, pipeline

import hf_budgetformer
from hf_budgetformer import BudgetFormerForQuestionAnswering, BudgetFormerForTokenClassification
from hf_budgetformer.backbones import BACKBONES
from hf_budgetformer.losses import teacher_divergence
from hf_budgetformer.modeling_budgetformer import TASKS
from test_backbones import tiny_batch, tiny_config


SHIFTED = [task for task in TASKS if task != "SequenceClassification"]
FIELDS = {"QuestionAnswering": ("start_logits", "end_logits")}


def batch_for(task, kind):
    """Inputs and labels."""
    if task == "MultipleChoice":
        batch = tiny_batch(kind, [40, 7, 40, 13, 1, 9])
        return {name: x.view(2, 3, -1) for name, x in batch.items()}, {"labels": torch.tensor([2, 0])}
    batch = tiny_batch(kind)
    if task == "QuestionAnswering":
        return batch, {name: torch.tensor([3, 2, 30, 1, 0]) for name in ("start_positions", "end_positions")}
    if task == "TokenClassification":
        labels = torch.randint(3, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        return batch, {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}
    return batch, {"labels": torch.tensor([0, 2, 1, 1, 0])}


def answers(outputs, task):
    return [outputs[name] for name in FIELDS.get(task, ("logits",))]


def real(task, batch, x):
    """Of an answer, what is not about padding."""
    return x[batch["attention_mask"].bool()] if task in ("TokenClassification", "QuestionAnswering") else x


def ours_of(task):
    return getattr(hf_budgetformer, f"BudgetFormerFor{task}")


def stock_of(task):
    return getattr(transformers, f"AutoModelFor{task}")


@pytest.fixture
def pair(task, kind, tmp_path):
    """A stock model, and ours from its folder; in eval mode."""
    fields = {"num_labels": 2} if task == "QuestionAnswering" else {}
    if kind == "distilbert":
        fields["qa_dropout"] = 0.0
    stock_of(task).from_config(tiny_config(kind, **fields)).save_pretrained(tmp_path / "stock")
    stock = stock_of(task).from_pretrained(tmp_path / "stock").eval()
    return stock, ours_of(task).from_pretrained(tmp_path / "stock", narrow_budget=0.75).eval()


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("task", SHIFTED)
def test_budget_one_is_the_stock_model(task, kind, pair):
    """Contract 1: bit for bit where padding stays, at real tokens where it leaves; gradients too."""
    stock, model = pair
    batch, labels = batch_for(task, kind)
    expected = stock(**batch, **labels)
    got = model(**batch, **labels, budget=1.0, executor="masked")
    packed = model(**batch, budget=1.0)
    for one, other, third in zip(*(answers(x, task) for x in (got, expected, packed)), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(real(task, batch, third), real(task, batch, other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss)
    for one in (stock, model):
        one.train()
        one(**batch, **labels, **({} if one is stock else {"executor": "masked"})).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("task", SHIFTED)
@torch.no_grad()
def test_doubted_inputs_are_looked_at_again_whole(task, kind, pair):
    """Contracts 2 and 4: each input's answer is that of its last look, packed as masked."""
    _, model = pair
    batch, _ = batch_for(task, kind)
    model.narrow.steps.fill_(1)
    first, full = (model(**batch, budget=budget) for budget in (0.3, 1.0))
    masked = model(**batch, budget=0.3, executor="masked")
    for one, other in zip(answers(first, task), answers(masked, task), strict=True):
        torch.testing.assert_close(real(task, batch, one), real(task, batch, other), rtol=1e-5, atol=1e-5)
    mask = None if task == "MultipleChoice" else batch["attention_mask"]
    sure = model.doubt(model._unite(first), mask)
    model.config.looks, model.config.confidence = [0.3, 1.0], [sure.quantile(0.5).item()]
    got = model(**batch)
    doubted = sure < sure.quantile(0.5)
    assert torch.equal(got.budget > 1.0, doubted)
    assert 0 < doubted.sum() < len(doubted)
    for output, one, other in zip(*(answers(x, task) for x in (got, first, full)), strict=True):
        shape = (-1, *[1] * (one.dim() - 1))
        torch.testing.assert_close(output, torch.where(doubted.view(shape), other, one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", SHIFTED)
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_training_makes_the_narrow_encoder_say_what_the_full_model_says(task, kind, pair):
    _, model = pair
    model.config.freeze_full = True
    model._freeze()
    batch, _ = batch_for(task, kind)
    model.train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch, budget=0.75).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert {name.split(".")[0] for name, x in model.named_parameters() if x.grad is not None} == {"narrow"}


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("task", SHIFTED)
def test_checkpoints_go_both_ways(task, kind, pair, tmp_path):
    """Contract 6."""
    stock, model = pair
    model.save_pretrained(tmp_path / "ours")
    again, info = stock_of(task).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(model)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert all(torch.equal(again.state_dict()[name], x) for name, x in model.state_dict().items())
    _, info = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("narrow.") for name in info["unexpected_keys"])
    _, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])


def test_confidence_is_that_of_the_least_sure_token_and_of_both_ends_together():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model = BudgetFormerForTokenClassification.__new__(BudgetFormerForTokenClassification)
    best = logits.softmax(-1).topk(2).values
    margins = best[..., 0] - best[..., 1]
    expected = torch.stack([margins[0, :3].min(), margins[1].min()])
    torch.testing.assert_close(model.doubt(logits, mask), expected)
    spans = BudgetFormerForQuestionAnswering.__new__(BudgetFormerForQuestionAnswering)
    ends = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((3, 5)):
        best = ends[row, :length].softmax(0).topk(2, dim=0).values
        torch.testing.assert_close(spans.doubt(ends, mask)[row], (best[0] - best[1]).prod())
    # One real token is the only place there is.
    torch.testing.assert_close(spans.doubt(ends, torch.tensor([[1, 0, 0, 0, 0]] * 2)), torch.ones(2))
    far = spans.diverge(ends, ends.flip(0), mask, {})
    pairs = []
    for row, length in enumerate((3, 5)):
        for end in range(2):
            one, other = ends[row, :length, end], ends.flip(0)[row, :length, end]
            pairs.append(teacher_divergence(one[None], other[None], "single_label_classification"))
    torch.testing.assert_close(far, torch.cat(pairs).mean())


def test_a_pipeline_labels_tokens_from_our_folder(tokenizer, tmp_path):
    config = tiny_config("bert")
    stock = stock_of("TokenClassification").from_config(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours_of("TokenClassification").from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    entities = pipeline("token-classification", str(tmp_path / "ours"))("w1 w2 w3")
    expected = pipeline("token-classification", stock, tokenizer=tokenizer)("w1 w2 w3")
    assert entities
    for one, other in zip(entities, expected, strict=True):
        assert (one["entity"], one["word"]) == (other["entity"], other["word"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_the_page_of_backbones_and_tasks_names_every_row():
    page = (Path(__file__).parents[1] / "docs" / "backbones_and_tasks.md").read_text()
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert rows == {*BACKBONES, "model_type", *TASKS}
