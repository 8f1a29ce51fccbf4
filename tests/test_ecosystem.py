"""Other packages and pipelines on our models, beside the stock class on the same weights."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    pipeline,
)
from transformers.pipelines import get_supported_tasks

from conftest import equal_shares, stock_config
from hf_budgetformer import (
    BudgetFormerForQuestionAnswering,
    BudgetFormerForSequenceClassification,
    BudgetFormerForTokenClassification,
    BudgetFormerModel,
)


TEXTS = ["w1 w2 w3", "w14 w11 w12 w19", "w25", "w30 w3 w17 w22 w5 w9"]
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
PAIRS = {
    "classification": (BertForSequenceClassification, BudgetFormerForSequenceClassification),
    "tokens": (BertForTokenClassification, BudgetFormerForTokenClassification),
    "spans": (BertForQuestionAnswering, BudgetFormerForQuestionAnswering),
    "encoder": (BertModel, BudgetFormerModel),
}


@pytest.fixture
def folders(tmp_path, tokenizer):
    """Makes folders of a stock model and of ours on its weights, with a narrow encoder that counts as trained."""

    def make(kind, **fields):
        stock, ours = PAIRS[kind]
        places = tmp_path / f"stock {kind}", tmp_path / f"our {kind}"
        stock(stock_config("bert", **fields)).save_pretrained(places[0])
        model = ours.from_pretrained(places[0], opening_order=equal_shares())
        model.narrow.steps.fill_(1)
        model.save_pretrained(places[1])
        for place in places:
            tokenizer.save_pretrained(place)
        return tuple(map(str, places))

    return make


def full(pipe):
    """A pipeline whose plain call is the full model's."""
    pipe.model.config.looks = [1.0]
    return pipe


def assert_alike(actual, expected):
    """The same answers, but for last bits of scores."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(actual[name], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float | np.floating):
        assert actual == pytest.approx(expected, abs=1e-5)
    else:
        assert actual == expected


def check_pipeline(task, folders, ask):
    """The full model's pipeline answers as the stock one; with looks it spends less, and answers otherwise."""
    stock, ours = (pipeline(task, folder, device="cpu") for folder in folders)
    expected = [ask(stock, text) for text in TEXTS]
    assert_alike([ask(full(ours), text) for text in TEXTS], expected)
    spent = []
    ours.model.register_forward_hook(lambda module, args, outputs: spent.append(outputs.budget.max().item()))
    ours.model.config.looks = [0.25]
    looked = [ask(ours, text) for text in TEXTS]
    assert 0.0 < max(spent) <= 0.25
    with pytest.raises(AssertionError):
        assert_alike(looked, expected)


def test_zero_shot_classification(folders):
    labels = {"id2label": NLI, "label2id": {name: number for number, name in NLI.items()}}
    check_pipeline(
        "zero-shot-classification",
        folders("classification", **labels),
        lambda pipe, text: pipe(text, candidate_labels=["w1", "w2 w3"]),
    )


def test_token_classification(folders):
    check_pipeline("token-classification", folders("tokens"), lambda pipe, text: pipe(text))


@pytest.mark.skipif("question-answering" not in get_supported_tasks(), reason="gone from pipelines in transformers 5")
def test_question_answering(folders):
    check_pipeline(
        "question-answering",
        folders("spans", num_labels=2),
        lambda pipe, text: pipe(question="w1 w2", context=f"{text} w7 w8"),
    )


class Accuracy:
    """Made of evaluate's class where there is one, for its own metrics come from the Hub."""

    @staticmethod
    def make(evaluate):
        class Metric(evaluate.Metric):
            def _info(self):
                features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
                return evaluate.MetricInfo(description="", citation="", features=features)

            def _compute(self, predictions, references):
                return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}

        return Metric()


def test_evaluator_measures_what_the_pipeline_answers(folders, texts, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    # evaluate 0.4.6 still asks transformers, which is without TensorFlow now, whether a model is of it.
    monkeypatch.setattr(transformers, "TFPreTrainedModel", type("TFPreTrainedModel", (), {}), raising=False)
    _, ours = folders("classification")
    pipe = full(pipeline("text-classification", ours, device="cpu"))
    rows = texts.select(range(12))
    numbers = {f"LABEL_{number}": number for number in range(3)}
    result = evaluate.evaluator("text-classification").compute(
        pipe, rows, metric=Accuracy.make(evaluate), label_mapping=numbers
    )
    answers = [numbers[answer["label"]] for answer in pipe(list(rows["text"]))]
    assert result["accuracy"] == pytest.approx(np.mean(np.array(answers) == np.array(rows["label"])))


def test_setfit_trains_an_encoder_and_a_head_on_it(folders, texts, tmp_path):
    setfit = pytest.importorskip("setfit")
    stock, ours = folders("encoder")
    rows = texts.filter(lambda row: row["label"] < 2).select(range(8))
    assert sorted(set(rows["label"])) == [0, 1]
    answers = {}
    for name, folder in (("stock", stock), ("ours", ours)):
        model = setfit.SetFitModel.from_pretrained(folder, device="cpu")
        arguments = setfit.TrainingArguments(
            str(tmp_path / name), batch_size=4, max_steps=3, report_to="none", save_strategy="no"
        )
        setfit.Trainer(model, arguments, train_dataset=rows).train()
        answers[name] = model.predict_proba(TEXTS)
    assert type(model.model_body[0].model) is BudgetFormerModel
    assert model.model_body[0].model.narrow.steps > 1
    torch.testing.assert_close(answers["ours"], answers["stock"], rtol=0.05, atol=0.05)
    model.save_pretrained(str(tmp_path / "saved"))
    again = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.predict_proba(TEXTS), answers["ours"], rtol=1e-4, atol=1e-5)
