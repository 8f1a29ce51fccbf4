"""The configuration: what it adopts, what it refuses, what survives a round trip."""

import json
import logging

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, GPT2Config

from conftest import STOCK, stock_config, stock_folder
from hf_budgetformer import BudgetFormerConfig


def test_to_dict_and_back_is_the_identity(backbone_type):
    config = BudgetFormerConfig.from_backbone_config(
        stock_config(backbone_type, classifier_dropout=0.3), looks=[0.1, 0.2], target_budget=None
    )
    again = BudgetFormerConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert (again.looks, again.target_budget, again.classifier_dropout) == ([0.1, 0.2], None, 0.3)


def test_save_and_load_through_auto_config(backbone_type, tmp_path):
    config = BudgetFormerConfig.from_backbone_config(stock_config(backbone_type), need_scale=0.7)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is BudgetFormerConfig
    assert again.need_scale == 0.7
    assert again.backbone_model_type == backbone_type


def test_a_plain_config_is_adopted_with_all_its_fields_and_no_warning(backbone_type, tmp_path, caplog):
    stock = stock_config(
        backbone_type, hidden_act="relu", layer_norm_eps=1e-3, num_labels=2, id2label={0: "no", 1: "yes"}
    )
    stock.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        config = BudgetFormerConfig.from_pretrained(tmp_path, narrow_budget=0.5)
    logging.getLogger("transformers").propagate = False
    assert not caplog.records
    assert config.model_type == "budgetformer"
    assert config.backbone_model_type == backbone_type
    assert config.narrow_budget == 0.5
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                  "layer_norm_eps", "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id",
                  "type_vocab_size", "id2label", "label2id"):  # fmt: skip
        assert getattr(config, field) == getattr(stock, field), field


def test_a_checkpoint_of_2019_that_names_no_model_type_can_be_named(tmp_path):
    stock_folder("bert", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="bert"):
        BudgetFormerConfig.from_pretrained(tmp_path)
    assert BudgetFormerConfig.from_pretrained(tmp_path, backbone_model_type="bert").hidden_size == 16


BAD_FIELDS = [
    ("backbone_model_type", "gpt2", "'bert', 'camembert'"),
    ("gate_type", "medium", "'hard' or 'soft'"),
    ("executor", "fast", "'auto', 'masked'"),
    ("narrow_budget", 0.0, r"\(0, 1\]"),
    ("narrow_budget", 1.5, r"\(0, 1\]"),
    ("narrow_budget", float("nan"), r"\(0, 1\]"),
    ("router", "best", "'look' or 'layer'"),
    ("feed_forward_blocks", 0, ">= 1"),
    ("reference_length", 0, ">= 1"),
    ("target_budget", -0.5, r"\(0, 1\]"),
    ("budget_sampling", 2.0, r"\[0, 1\]"),
    ("budget_loss_weight", -1.0, ">= 0"),
    ("need_scale", float("inf"), ">= 0"),
    ("distillation_weight", 1.1, r"\[0, 1\]"),
    ("router_hidden_size", 0, ">= 1"),
    ("router_lr_multiplier", 0.0, "> 0"),
    ("exploration_steps", -1, ">= 0"),
    ("num_hidden_layers", 0, ">= 1"),
    ("hidden_dropout_prob", 1.5, r"\[0, 1\]"),
    ("layer_norm_eps", 0.0, "> 0"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_name_value_and_range(field, value, allowed):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){field}.*{allowed}.*got {value!r}"):
        BudgetFormerConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"looks": [0.2, 0.1]}, r"looks.*rising.*\[0.2, 0.1\]"),
        ({"looks": []}, "looks.*rising"),
        ({"looks": [1, 2]}, "looks.*rising numbers"),
        ({"looks": [0.5, 1.0]}, r"looks.*narrow_budget=0.25.*\[0.5, 1.0\]"),
        ({"looks": [0.1, 1.0], "confidence": [0.5, 0.6]}, r"confidence must hold 1 numbers.*\[0.5, 0.6\]"),
        ({"confidence": [1.5]}, r"confidence.*\[0, 1\].*\[1.5\]"),
        ({"looks": [0.1, 0.2], "router": "layer"}, "looks.*router='layer'"),
        ({"looks": [0.1, 1.0], "full_encoder": False}, "looks.*narrow_budget"),
        ({"opening_order": [24]}, r"opening_order.*from 0 to 23.*\[24\]"),
        ({"opening_order": [0] * 13}, "opening_order.*12 times"),
        ({"feed_forward_blocks": 4000}, "feed_forward_blocks.*intermediate_size=3072.*4000"),
        ({"margins": {"budget": 0.9, "quantiles": [0.0, 1.0]}}, "margins.*narrow_budget=0.25"),
        ({"margins": {}}, "margins.*quantiles"),
        ({"promise": {"risk": "disagreement", "level": 0.01}}, r"promise must hold \['bound', .* got"),
        ({"ranking": {"keep": 10}}, r"ranking must hold 'budgets' and 'keep'.* got \{'keep': 10\}"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, named):
    with pytest.raises(StrictDataclassClassValidationError, match=f"(?s){named}"):
        BudgetFormerConfig(**fields)


def test_an_assignment_is_checked_too():
    config = BudgetFormerConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="narrow_budget"):
        config.narrow_budget = 7.0
    assert config.narrow_budget == 0.25


def test_an_unsupported_backbone_lists_the_supported(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    for build in (BudgetFormerConfig.from_backbone_config, lambda _: BudgetFormerConfig.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"'gpt2'.*\['bert', .*'roberta'"):
            build(GPT2Config())


def test_a_decoder_is_refused():
    with pytest.raises(ValueError, match="is_decoder must be False"):
        BudgetFormerConfig.from_backbone_config(STOCK["bert"][0](is_decoder=True))


def test_the_constructor_does_not_take_another_models_dictionary():
    with pytest.raises(ValueError, match="from_backbone_config"):
        BudgetFormerConfig(**stock_config("bert").to_dict())


@pytest.mark.parametrize("field", ["head_budget", "target_head_budget", "static_heads"])
def test_fields_of_version_0_1_say_what_to_write_instead(field):
    with pytest.raises(ValueError, match=f"{field} is a field of hf_budgetformer 0.1.*write .* instead"):
        BudgetFormerConfig(**{field: 0.5})


def test_every_field_of_ours_is_documented():
    documented = BudgetFormerConfig.__doc__.split("Args:")[1]
    for field in BudgetFormerConfig().to_dict().keys() - stock_config("bert").to_dict().keys():
        assert f"        {field}: " in documented, field
