"""Rerankers and embeddings: sentence-transformers on our folders, trained, saved, loaded, and asked for a budget."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from conftest import STOCK, equal_shares, stock_config, stock_folder
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, BudgetFormerModel
from test_hub import finish, start


pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as EncoderArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, CrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling


PAIRS = [("w1 w2", "w3 w4 w5"), ("w1", "w9 w8 w7 w6 w5 w4"), ("w20 w21 w22", "w1"), ("w9", "w2 w30")]
TEXTS = ["w1 w2 w3", "w5", "w9 w9 w9 w8 w7 w1 w30", "w11 w12 w13 w14 w15"]
TINY = {"opening_order": equal_shares(), "narrow_budget": 0.25}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A stock reranker and encoder, and ours with the same weights, whose narrow encoders count as trained."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("sentences")
    stock_folder("bert", folder / "stock reranker", num_labels=1)
    STOCK["bert"][1](stock_config("bert")).save_pretrained(folder / "stock encoder")
    kinds = {"reranker": BudgetFormerForSequenceClassification, "encoder": BudgetFormerModel}
    for name, kind in kinds.items():
        model = kind.from_pretrained(folder / f"stock {name}", **TINY)
        model.narrow.steps.fill_(1)
        model.save_pretrained(folder / name)
    for path in folder.iterdir():
        tokenizer.save_pretrained(path)
    return folder


def reranker(folder, **options):
    return CrossEncoder(str(folder), device="cpu", **options)


def encoder(folder, **options):
    transformer = Transformer(str(folder), **options)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


@torch.no_grad()
def scores_of(model, tokenizer, **options):
    batch = tokenizer([list(pair) for pair in PAIRS], padding=True, return_tensors="pt")
    return model(**batch, **options).logits[:, 0].sigmoid().numpy()


def test_a_reranker_scores_and_ranks_as_the_stock_one_does(folders):
    stock, ours = reranker(folders / "stock reranker"), reranker(folders / "reranker")
    assert type(ours[0].model) is BudgetFormerForSequenceClassification
    np.testing.assert_allclose(ours.predict(PAIRS), stock.predict(PAIRS), atol=1e-6)
    passages = [passage for _, passage in PAIRS]
    expected, ranking = stock.rank("w3 w1", passages), ours.rank("w3 w1", passages)
    assert [row["corpus_id"] for row in ranking] == [row["corpus_id"] for row in expected]


def test_a_reranker_spends_the_budget_of_its_looks(folders, tokenizer, tmp_path):
    ours = reranker(folders / "reranker")
    expected = scores_of(ours[0].model, tokenizer, budget=0.25)
    assert np.abs(ours.predict(PAIRS) - expected).max() > 1e-3
    ours[0].model.config.looks = [0.25]
    np.testing.assert_allclose(ours.predict(PAIRS), expected, atol=1e-6)
    ours.save_pretrained(str(tmp_path))
    for loaded in (reranker(tmp_path), reranker(folders / "reranker", config_kwargs={"looks": [0.25]})):
        np.testing.assert_allclose(loaded.predict(PAIRS), expected, atol=1e-6)


def test_an_encoder_encodes_as_the_stock_one_does(folders):
    stock, ours = encoder(folders / "stock encoder"), encoder(folders / "encoder")
    assert type(ours[0].model) is BudgetFormerModel
    np.testing.assert_allclose(ours.encode(TEXTS), stock.encode(TEXTS), atol=1e-5)


def test_an_encoder_spends_the_budget_of_its_looks(folders, tmp_path):
    ours = encoder(folders / "encoder")
    full = ours.encode(TEXTS)
    ours[0].model.config.looks = [0.25]
    narrow = ours.encode(TEXTS)
    assert np.abs(narrow - full).max() > 1e-2
    ours.save_pretrained(str(tmp_path))
    others = [SentenceTransformer(str(tmp_path), device="cpu")]
    others.append(SentenceTransformer(str(folders / "encoder"), device="cpu", config_kwargs={"looks": [0.25]}))
    for loaded in others:
        np.testing.assert_allclose(loaded.encode(TEXTS), narrow, atol=1e-6)


def test_a_budget_can_be_asked_for_with_each_call(folders, tokenizer, tmp_path):
    ours, scorer = encoder(folders / "encoder"), reranker(folders / "reranker")
    with pytest.raises(ValueError, match="budget"):
        ours.encode(TEXTS, budget=0.25)
    full = ours.encode(TEXTS)
    for model in (ours, scorer):
        model.module_kwargs = {"0": ["budget"]}
    narrow = ours.encode(TEXTS, budget=0.25)
    np.testing.assert_allclose(ours.encode(TEXTS), full, atol=1e-6)
    assert np.abs(narrow - full).max() > 1e-2
    ours.save_pretrained(str(tmp_path / "encoder"))
    loaded = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS, budget=0.25), narrow, atol=1e-6)
    expected = scores_of(scorer[0].model, tokenizer, budget=0.25)
    np.testing.assert_allclose(scorer.predict(PAIRS, budget=0.25), expected, atol=1e-6)
    with pytest.raises(ValueError, match="budget must be"):
        scorer.predict(PAIRS, budget=3.0)


def arguments_for(kind, folder, **options):
    """No clipping, which takes the norm of all gradients, and plain descent, which keeps rounding errors small."""
    options = {"max_steps": 3, "learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0, **options}
    return kind(str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no", **options)


def train_reranker(model, folder, callbacks=(), **options):
    rows = Dataset.from_dict(
        {
            "query": [query for query, _ in PAIRS] * 2,
            "passage": [passage for _, passage in PAIRS] * 2,
            "label": [1.0, 0.0, 0.0, 1.0] * 2,
        }
    )
    args = arguments_for(CrossEncoderTrainingArguments, folder, **options)
    loss = BinaryCrossEntropyLoss(model)
    trainer = CrossEncoderTrainer(model, args, train_dataset=rows, loss=loss, callbacks=list(callbacks))
    trainer.train()
    return trainer


def train_encoder(model, folder, wrap=lambda model, loss: loss):
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": [f"{text} w33" for text in TEXTS]})
    loss = wrap(model, MultipleNegativesRankingLoss(model))
    args = arguments_for(EncoderArguments, folder)
    SentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss).train()


def assert_both_learned(ours, stock, folder):
    """The full encoder has learned, exactly what the stock model has; and the narrow one has learned."""
    state, before = ours.state_dict(), type(ours).from_pretrained(folder).state_dict()
    for name, weight in stock.base_model.state_dict().items():
        torch.testing.assert_close(state[f"bert.{name}"], weight, rtol=1e-4, atol=1e-6)
    changed = {name for name, weight in before.items() if not torch.equal(weight, state[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert "narrow.layer.0.qkv.weight" in changed
    assert state["narrow.steps"] > before["narrow.steps"]


def test_training_a_reranker_trains_both_encoders(folders, tmp_path):
    stock, ours = reranker(folders / "stock reranker"), reranker(folders / "reranker")
    train_reranker(stock, tmp_path / "stock")
    trainer = train_reranker(ours, tmp_path / "ours", [BudgetCallback()], logging_steps=1)
    assert_both_learned(ours[0].model, stock[0].model, folders / "reranker")
    assert "divergence" in trainer.state.log_history[0]


def test_a_narrow_encoder_learns_to_rank_beside_a_frozen_reranker(folders, tokenizer, tmp_path):
    ours = reranker(folders / "reranker", config_kwargs={"freeze_full": True})
    full, before = scores_of(ours[0].model, tokenizer, budget=1.0), scores_of(ours[0].model, tokenizer, budget=0.25)
    train_reranker(ours, tmp_path, max_steps=30, learning_rate=1e-2, optim="adamw_torch")
    assert np.array_equal(scores_of(ours[0].model, tokenizer, budget=1.0), full)
    after = scores_of(ours[0].model, tokenizer, budget=0.25)
    assert np.abs(after - full).mean() < 0.5 * np.abs(before - full).mean()


@pytest.mark.parametrize("matryoshka", [False, True], ids=["plain", "matryoshka"])
def test_training_an_encoder_trains_both_encoders(matryoshka, folders, tmp_path):
    def wrap(model, loss):
        return MatryoshkaLoss(model, loss, [16, 8, 4]) if matryoshka else loss

    stock, ours = encoder(folders / "stock encoder"), encoder(folders / "encoder")
    train_encoder(stock, tmp_path / "stock", wrap)
    train_encoder(ours, tmp_path / "ours", wrap)
    assert_both_learned(ours[0].model, stock[0].model, folders / "encoder")


def test_a_loss_wrapped_in_matryoshka_trains_the_narrow_encoder_once(folders):
    """Its gradient is that of the divergence, however many prefixes of the embedding the loss looks at."""
    gradients = []
    for dims in ([16], [16, 8, 4]):
        model = encoder(folders / "encoder").train()
        loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), dims)
        features = [model.preprocess(texts) for texts in (TEXTS, TEXTS[::-1])]
        loss(features, None).backward()
        gradients.append(model[0].model.narrow.layer[0].qkv.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_a_loss_with_a_gradient_cache_trains_the_full_encoder_whatever_the_looks(folders):
    """It encodes without gradients first, and looks are for inference."""
    gradients = []
    for kind, options in (
        (MultipleNegativesRankingLoss, {}),
        (CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}),
    ):
        model = encoder(folders / "encoder", config_kwargs={"looks": [0.25]}).train()
        features = [model.preprocess(texts) for texts in (TEXTS, TEXTS[::-1])]
        kind(model, **options)(features, None).backward()
        gradients.append(model[0].model.base_model.encoder.layer[0].attention.self.query.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_callback_leaves_the_looks_of_a_classifier_whose_batches_are_texts(tokenizer, tmp_path):
    stock_folder("bert", tmp_path / "stock")
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path / "stock", **TINY)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    ours = reranker(tmp_path / "ours")
    rows = Dataset.from_dict({
        "premise": [pair[0] for pair in PAIRS], "hypothesis": [pair[1] for pair in PAIRS], "label": [0, 1, 2, 0],
    })  # fmt: skip
    args = arguments_for(CrossEncoderTrainingArguments, tmp_path / "out")
    CrossEncoderTrainer(
        ours, args, train_dataset=rows, eval_dataset=rows, loss=CrossEntropyLoss(ours), callbacks=[BudgetCallback()]
    ).train()
    assert ours[0].model.is_trained()
    assert ours[0].model.config.looks is None


@pytest.mark.slow
def test_a_process_encodes_as_this_one(folders):
    model = encoder(folders / "encoder")
    model.module_kwargs = {"0": ["budget"]}
    pool = model.start_multi_process_pool(["cpu"])
    try:
        embeddings = model.encode(TEXTS, pool=pool, budget=0.25)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(embeddings, model.encode(TEXTS, budget=0.25), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True], ids=["one process", "two"])
def test_folders_serve_where_the_package_is_not_installed(pool, folders, tmp_path):
    ours, scorer = encoder(folders / "encoder"), reranker(folders / "reranker")
    ours.module_kwargs = {"0": ["budget"]}
    for name, model in (("encoder", ours), ("reranker", scorer)):
        model.save_pretrained(str(tmp_path / name))
    task = {"do": "embed", "texts": TEXTS, "pairs": PAIRS, "pool": pool}
    task |= {name: str(tmp_path / name) for name in ("encoder", "reranker")}
    process = start(task, tmp_path / "process")
    report, _ = finish(process, tmp_path / "process")
    assert not report["importable"]
    assert "trust_remote_code" in report["refusal"]
    assert all(name.startswith("transformers_modules") for name in report["classes"])
    torch.testing.assert_close(report["scores"], torch.from_numpy(scorer.predict(PAIRS)), rtol=0, atol=1e-6)
    assert [row["corpus_id"] for row in report["ranking"]] == [
        row["corpus_id"] for row in scorer.rank(PAIRS[0][0], [passage for _, passage in PAIRS])
    ]
    for name, options in (("full", {}), ("narrow", {"budget": 0.25})):
        torch.testing.assert_close(report[name], torch.from_numpy(ours.encode(TEXTS, **options)), rtol=0, atol=1e-5)
