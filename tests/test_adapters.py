"""Adapters and quantised weights: what replaces a linear layer is asked, not read."""

import pytest
import torch
from torch import nn
from transformers import set_seed

from conftest import batch_of, budgetformer, stock_folder
from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification
from test_trainer import trainer_for


# What peft 0.21 still asks a model of transformers 5.24.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LENGTHS = [5, 12, 9, 2]
BUDGETS = (1.0, 0.25, 1 / 6)


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@torch.no_grad()
def answers(model, backbone_type, budgets=(*BUDGETS, None)):
    batch = batch_of(LENGTHS, backbone_type)
    return [model(**batch, budget=budget).logits for budget in budgets]


def assert_same(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def stir(adapted):
    """Adapters start as nothing: as if they had been trained."""
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


@pytest.mark.parametrize("router", ["look", "layer"])
def test_a_merged_adapter_answers_as_the_adapter_did(router, peft, backbone_type):
    """Merging reads `W x + b` into every `nn.Linear`, and its like: nothing else may be one."""
    model = budgetformer(backbone_type, router=router)
    plain = answers(model, backbone_type)
    adapted = stir(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))).eval()
    expected = answers(adapted, backbone_type)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(plain, expected, strict=True))
    batch = batch_of(LENGTHS, backbone_type)
    masked = [adapted(**batch, budget=budget, executor="masked").logits for budget in (*BUDGETS, None)]
    assert_same(masked, expected)
    assert_same(answers(adapted.merge_and_unload(), backbone_type), expected)


@pytest.mark.parametrize("callbacks", [[], [BudgetCallback()]], ids=["plain", "ordered"])
def test_a_saved_adapter_answers_as_it_did_when_loaded(callbacks, peft, backbone_type, tokenizer, tokenized, tmp_path):
    folder = stock_folder(backbone_type, tmp_path / "stock")
    load = BudgetFormerForSequenceClassification.from_pretrained
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], modules_to_save=["narrow"])
    adapted = peft.get_peft_model(load(folder), config)
    before = [x.clone() for x in answers(adapted.eval(), backbone_type)]
    trainer_for(
        adapted, tmp_path / "out", tokenizer, tokenized, callbacks=list(callbacks), learning_rate=1e-2,
        label_names=["labels"],
    ).train()  # fmt: skip
    expected = answers(adapted.eval(), backbone_type)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(before, expected, strict=True))
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert again.is_trained()
    assert_same(answers(again, backbone_type), expected)
    assert_same(answers(again.merge_and_unload(), backbone_type), expected)


def test_the_callback_leaves_frozen_parameters_alone(peft, tokenizer, tokenized, tmp_path):
    """An adapter does not save them: loaded again it would answer differently."""
    model = budgetformer("bert", trained=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    before = {name: x.clone() for name, x in adapted.state_dict().items() if "narrow" in name}
    trainer_for(
        adapted, tmp_path, tokenizer, tokenized, callbacks=[BudgetCallback()], max_steps=2, label_names=["labels"]
    ).train()
    assert {name for name, x in before.items() if not torch.equal(adapted.state_dict()[name], x)} == set()
    assert not model.is_trained()


def halve_outputs(module, args, output):
    return 0.5 * output


class Doubled(nn.Linear):
    """A linear layer whose forward is more than `W x + b`."""

    def forward(self, hidden):
        return 2.0 * super().forward(hidden)


def replace_linears(model, make):
    """Every linear layer of the narrow encoder replaced by what `make` makes of it."""
    for layer in model.narrow.layer:
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.Linear):
                setattr(layer, name, make(module))


def doubled(linear):
    other = Doubled(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def hooked(linear):
    linear.register_forward_hook(halve_outputs)
    return linear


def parametrised(linear):
    return torch.nn.utils.parametrizations.weight_norm(linear)


@pytest.mark.parametrize("make", [doubled, hooked, parametrised], ids=lambda make: make.__name__)
def test_a_linear_layer_that_does_more_is_asked_for_what_it_does(make, backbone_type):
    model, batch = budgetformer(backbone_type), batch_of(LENGTHS, backbone_type)
    before = answers(model, backbone_type)
    replace_linears(model, make)
    for budget in (0.25, 1 / 6):
        expected = model(**batch, budget=budget, executor="masked").logits
        torch.testing.assert_close(model(**batch, budget=budget).logits, expected, rtol=1e-4, atol=1e-5)
    if make is parametrised:  # which changes nothing yet
        assert_same(answers(model, backbone_type), before)
    else:
        assert not torch.allclose(answers(model, backbone_type)[1], before[1], atol=1e-3)


@pytest.mark.parametrize("router", ["look", "layer"])
def test_int8_weights_of_torchao_answer_about_the_same(router, backbone_type):
    quantization = pytest.importorskip("torchao.quantization")
    set_seed(1)
    model = budgetformer(backbone_type, router=router)
    expected = answers(model, backbone_type)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.base_model.encoder.layer[0].attention.self.query.weight) is not nn.Parameter
    for one, other in zip(answers(model, backbone_type), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)
        assert not torch.equal(one, other)
