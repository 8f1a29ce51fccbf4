"""Documents in chunks: cut, answered, put together, looked through."""

import json

import numpy as np
import pytest
import torch

from conftest import LONGEST, budgetformer
from hf_budgetformer.tools.documents import (
    Chunks,
    DocumentLook,
    answer_documents,
    keep_ends,
    look_through,
    pool_answers,
    split_documents,
    tune_documents,
)
from hf_budgetformer.tools.prediction import predict
from hf_budgetformer_cli import main


ONE, MANY, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def words(count, start=0):
    return " ".join(f"w{(start + number) % 35}" for number in range(count))


@pytest.fixture
def documents():
    return {"text": [words(100), words(4), "", words(61, 7)]}


@pytest.mark.parametrize("stride", [0, 5])
def test_chunks_hold_every_token_once_but_for_what_they_share(documents, tokenizer, stride):
    chunks = split_documents(documents, tokenizer, 12, stride)
    plain = tokenizer(documents["text"], add_special_tokens=False)["input_ids"]
    for number, whole in enumerate(plain):
        pieces = [chunks.rows["input_ids"][x] for x in np.flatnonzero(chunks.owners == number)]
        assert all(ids[0] == 2 and ids[-1] == 3 and len(ids) <= 12 for ids in pieces)
        read = pieces[0][1:-1]
        for ids in pieces[1:]:
            assert ids[1 : 1 + stride] == read[len(read) - stride :]
            read = read + ids[1 + stride : -1]
        assert read == whole
    assert (np.diff(chunks.owners) >= 0).all()
    assert chunks.lengths().tolist() == list(map(len, chunks.rows["input_ids"]))


def test_a_pair_is_in_every_chunk(tokenizer):
    chunks = split_documents({"text": [words(40)], "text_pair": ["w1 w2"]}, tokenizer, 15)
    assert len(chunks.owners) == 4
    assert all(ids[-3:] == [6, 7, 3] for ids in chunks.rows["input_ids"])


@pytest.mark.parametrize("pair", [None, "w1 w2 w3"])
def test_both_ends_are_kept(tokenizer, pair):
    columns = {"text": [words(30), words(5)]} | ({"text_pair": [pair] * 2} if pair else {})
    rows = keep_ends(columns, tokenizer, 14)
    special, beside = (3, 3) if pair else (2, 0)
    room = 14 - special - beside
    ids = rows["input_ids"][0]
    assert len(ids) == 14
    numbers = [x - 5 for x in ids[1 : 1 + room]]
    assert numbers == [*range(room // 2), *range(30 - (room - room // 2), 30)]
    assert rows["input_ids"][1] == tokenizer(words(5), pair)["input_ids"]


def test_answers_are_pooled_as_said():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [2.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    owners = np.array([0, 0, 0, 4])
    mean = pool_answers(logits, owners, "mean", ONE)
    torch.testing.assert_close(mean.softmax(-1)[0], logits[:3].softmax(-1).mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(pool_answers(logits, owners, "max", ONE), logits[[1, 3]])
    vote = pool_answers(logits, owners, "vote", ONE).softmax(-1)
    torch.testing.assert_close(vote, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 1]]), rtol=1e-4, atol=1e-4)
    several = pool_answers(logits - 1.0, owners, "max", MANY)
    assert torch.equal(several, torch.tensor([[1.0, 2.0, 0.0], [-1.0, -1.0, 4.0]]))
    mean = pool_answers(logits - 1.0, owners, "mean", MANY)
    torch.testing.assert_close(mean.sigmoid()[0], (logits - 1.0)[:3].sigmoid().mean(0))
    votes = pool_answers(logits - 1.0, owners, "vote", MANY)
    torch.testing.assert_close(votes.sigmoid()[0], torch.tensor([2 / 3, 1 / 3, 0.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool_answers(logits[:, :1], owners, "mean", NUMBER), torch.tensor([[4 / 3], [0.0]]))
    with pytest.raises(ValueError, match="'mean' for a regression, got 'max'"):
        pool_answers(logits[:, :1], owners, "max", NUMBER)


def test_a_documents_answer_is_that_of_its_chunks_alone(documents, tokenizer):
    """Against each chunk asked by itself."""
    model = budgetformer("bert", looks=[0.25, 1.0], confidence=[0.6])
    chunks = split_documents(documents, tokenizer, 12)
    answers = answer_documents(model, chunks, tokenizer, batch_size=3)
    for number in range(4):
        pieces = [chunks.rows["input_ids"][x] for x in np.flatnonzero(chunks.owners == number)]
        with torch.no_grad():
            outs = [model(input_ids=torch.tensor([ids])) for ids in pieces]
        expected = torch.cat([out.logits.softmax(-1) for out in outs]).mean(0)
        torch.testing.assert_close(answers.logits[number].softmax(-1), expected, rtol=1e-3, atol=1e-4)
        lengths = torch.tensor([len(ids) for ids in pieces], dtype=torch.float32)
        spent = (torch.cat([out.budget for out in outs]) * lengths).sum() / lengths.sum()
        torch.testing.assert_close(answers.spent[number], spent)


def answers_by_budget(owners, by_budget, calls):
    def ask(places, budget):
        calls.append((budget, places.tolist()))
        return torch.tensor(by_budget[budget])[places], torch.full((len(places),), budget)

    return ask, Chunks({"input_ids": [[0] * (1 + x % 2) for x in range(len(owners))]}, np.array(owners))


def test_looks_read_more_of_what_they_doubt_and_nothing_twice():
    sure, torn = [9.0, 0.0], [0.1, 0.0]
    calls = []
    narrow = [sure, sure, sure, torn, torn, torn, torn]
    ask, chunks = answers_by_budget([0, 0, 0, 1, 1, 1, 2], {0.25: narrow, 1.0: [sure] * 6 + [[0.0, 9.0]]}, calls)
    looks = [DocumentLook(1, 0.25), DocumentLook(2, 0.25), DocumentLook(None, 1.0)]
    answers = look_through(ask, chunks, looks, [0.5, 0.5], "mean", ONE)
    assert calls == [(0.25, [0, 3, 6]), (0.25, [5]), (1.0, [3, 4, 5, 6])]
    assert answers.logits.argmax(-1).tolist() == [0, 0, 1]
    lengths = chunks.lengths()
    work = [0.25 * lengths[0] / lengths[:3].sum(), 1.0 + 0.25 * lengths[[3, 5]].sum() / lengths[3:6].sum(), 1.25]
    np.testing.assert_allclose(answers.spent, work, rtol=1e-6)


def test_a_threshold_keeps_the_promise_on_the_documents_it_was_found_on(tokenizer):
    model = budgetformer("bert")
    chunks = split_documents({"text": [words(10 + number % 40, number) for number in range(200)]}, tokenizer, 12)
    first_looks = [DocumentLook(1, 0.25), DocumentLook(None, 0.25), DocumentLook(None, 1.0)]
    tested = tune_documents(model, chunks, tokenizer, first_looks, 0.1)
    full = answer_documents(model, chunks, tokenizer, 32, budget=1.0).logits.argmax(-1)
    assert tested[2].threshold == 0.0  # the second look is the first
    for look, test in zip(first_looks[:2], tested[:2], strict=True):
        looks = [look, DocumentLook(None, 1.0)]
        answers = answer_documents(model, chunks, tokenizer, 32, looks=looks, thresholds=[test.threshold])
        assert (answers.logits.argmax(-1) != full).float().mean().item() == pytest.approx(test.risk)
        assert answers.spent.mean().item() == pytest.approx(test.work, abs=1e-5)
        assert test.risk <= test.bound <= 0.1
    assert tested[0].budget < tested[1].budget
    assert tested[1].budget == pytest.approx(0.25, abs=0.03)
    with pytest.raises(ValueError, match="would take"):
        tune_documents(model, chunks, tokenizer, first_looks, 0.001)


def test_what_cannot_be_looked_through_is_refused(tokenizer, documents):
    ask, chunks = answers_by_budget([0], {1.0: [[0.0, 1.0]]}, [])
    for looks, thresholds, message in (
        ([], [], "one number less than looks"),
        ([DocumentLook(None, 1.0)], [0.5], "one number less than looks"),
        ([DocumentLook(0, 1.0)], [], "at least one chunk, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            look_through(ask, chunks, looks, thresholds, "mean", ONE)
    with pytest.raises(ValueError, match=r"chunks must be one of .* got 'median'"):
        look_through(ask, chunks, [DocumentLook(None, 1.0)], [], "median", ONE)
    with pytest.raises(ValueError, match="more than stride=12 tokens"):
        split_documents(documents, tokenizer, 14, 12)
    with pytest.raises(ValueError, match="stride must be an integer >= 0, got -1"):
        split_documents(documents, tokenizer, 14, -1)


def test_texts_are_predicted_in_chunks_in_their_order(documents, tokenizer):
    model = budgetformer("bert", looks=[0.25, 1.0], confidence=[0.6])
    rows = [({"text": text}, None) for text in documents["text"]]
    rows.insert(1, ({}, "has no text"))
    answers = list(predict(model, tokenizer, rows, 2, 12, spent=True, skip_bad=True, chunks="mean", stride=2))
    assert [answer["row"] for answer in answers] == list(range(5))
    assert answers[1] == {"row": 1, "error": "has no text"}
    expected = answer_documents(model, split_documents(documents, tokenizer, 12, 2), tokenizer, 2)
    for answer, logits, spent in zip(answers[:1] + answers[2:], expected.logits, expected.spent, strict=True):
        assert answer["label"] == model.config.id2label[int(logits.argmax())]
        assert answer["budget"] == pytest.approx(float(spent), abs=1e-5)
    short = [({"text": "w1 w2"}, None)]
    assert next(predict(model, tokenizer, short, chunks="vote"))["score"] == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="stride must be 0 without chunks"):
        list(predict(model, tokenizer, short, stride=3))


def test_the_command_reads_all_of_a_text(tmp_path, tokenizer, capsys):
    budgetformer("bert", looks=[0.25, 1.0]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = words(3 * LONGEST)
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tmp_path), text, "--chunks", "mean", "--stride", "2", "--device", "cpu"])
    assert ended.value.code in (0, None)
    assert set(json.loads(capsys.readouterr().out)) == {"row", "label", "score"}
    for wrong in (["--chunks", "median"], ["--stride", "3"]):
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(tmp_path), text, *wrong])
        assert ended.value.code == 2
        assert wrong[0] in capsys.readouterr().err
