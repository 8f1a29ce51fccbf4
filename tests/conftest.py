"""Tiny models and a tokenizer, built offline; the same for every test."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    set_seed,
)
from transformers.utils import logging

from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification


BACKBONE_TYPES = ["bert", "roberta"]
STOCK = {
    "bert": (BertConfig, BertModel, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaModel, RobertaForSequenceClassification),
}
VOCABULARY = 40
LONGEST = 32

logging.disable_progress_bar()
torch.set_num_threads(1)  # faster than two for models this small
# Fills every torch.empty with NaN, so that reading memory nobody wrote fails.
torch.use_deterministic_algorithms(True)
warnings.filterwarnings("ignore", message=".*TF32.*")


def pytest_collection_finish():
    """Spares the garbage collector what was imported: each Trainer asks for a full collection, of half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)


def stock_config(backbone_type, **fields):
    """A tiny configuration of the stock class: 3 layers, 4 heads, no dropout unless asked for."""
    tiny = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": LONGEST + (2 if backbone_type == "roberta" else 0),
        "pad_token_id": 1 if backbone_type == "roberta" else 0,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return STOCK[backbone_type][0](**{**tiny, **fields})


def stock_classifier(backbone_type, **fields):
    """A tiny stock classifier, in eval mode."""
    return STOCK[backbone_type][2](stock_config(backbone_type, **fields)).eval()


def stock_folder(backbone_type, folder: Path, **fields) -> Path:
    """A tiny stock classifier saved to `folder`."""
    stock_classifier(backbone_type, **fields).save_pretrained(folder)
    return folder


def equal_shares(layers=3, heads=4):
    """Opening order of the tiny models, whose units are too coarse for the default one: all sublayers at one pace."""
    return list(range(2 * layers)) * heads


def budgetformer(backbone_type, stir=True, trained=True, **fields):
    """A tiny BudgetFormer classifier of random weights, in eval mode.

    Its narrow encoder, a copy of the most important units that opens by `equal_shares`, counts as trained; stirred, the
    routers that `router="layer"` has answer each input differently.
    """
    if fields.get("router") != "layer":
        size = (fields.get("num_hidden_layers", 3), fields.get("num_attention_heads", 4))
        fields = {"opening_order": equal_shares(*size), **fields}
    config = BudgetFormerConfig.from_backbone_config(stock_config(backbone_type), **fields)
    model = BudgetFormerForSequenceClassification(config).eval()
    if trained and model.narrow is not None:
        model.narrow.steps.fill_(1)
    if stir:
        stir_routers(model)
    return model


def stir_routers(model):
    """Gives the routers of `router="layer"` weights that make budgets and scores differ widely between inputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                spread = 0.01 if ".need." in name else 0.4  # so that need does not drive all to its limits
                parameter.copy_(noise * spread / model.config.router_lr_multiplier)
    return model


def batch_of(lengths, backbone_type="bert", side="right", seed=0):
    """input_ids and attention_mask of random tokens, padded on `side`."""
    generator = torch.Generator().manual_seed(seed)
    pad = stock_config(backbone_type).pad_token_id
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), pad)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=BACKBONE_TYPES)
def backbone_type(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """Whitespace words w0..w34 and the special tokens of BERT; at most LONGEST tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(VOCABULARY - 5))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LONGEST,
    )


@pytest.fixture(scope="session")
def texts():
    """64 texts of 3 to 18 words and their labels 0..2: the label is the sort of word they are made of."""
    generator = torch.Generator().manual_seed(0)
    rows = {"text": [], "label": []}
    for number in range(64):
        label = number % 3
        length = int(torch.randint(3, 19, (1,), generator=generator))
        words = torch.randint(0, 10, (length,), generator=generator) + 10 * label
        rows["text"].append(" ".join(f"w{word}" for word in words.tolist()))
        rows["label"].append(label)
    return Dataset.from_dict(rows)


@pytest.fixture(scope="session")
def tokenized(texts, tokenizer):
    """`texts` as Trainer wants them, without padding."""
    return texts.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")
