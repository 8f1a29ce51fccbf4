"""Situations from outside that once went wrong: replicas, split devices, dropout at inference, what tokenizers add."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import batch_of, budgetformer, stock_classifier, stock_config
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.tools.narrowing import cut


LENGTHS = [5, 12, 9, 2]
KINDS = {
    "look": budgetformer,
    "frozen": lambda kind: budgetformer(kind, freeze_full=True),
    "layer": lambda kind: budgetformer(kind, router="layer"),
    "cut": lambda kind: cut(budgetformer(kind), 0.25),
}


def replicate(network):
    """What `nn.DataParallel` runs on each of several devices: modules without parameters, tensors in their place."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in copies.items():
        for name, child in module.named_children():
            setattr(replica, name, copies[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter * 1.0)  # not a leaf
        for name, buffer in module.named_buffers(recurse=False):
            replica._buffers[name] = buffer
    return copies[network]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_runs_and_learns_as_the_model_does(kind, backbone_type):
    """Trainer wraps a model in `nn.DataParallel` where it finds several GPUs."""
    model = KINDS[kind](backbone_type)
    batch = batch_of(LENGTHS, backbone_type)
    labels = torch.tensor([0, 1, 2, 0])
    assert not list(replicate(model).parameters())
    for budget in (None, 0.25):
        expected = model(**batch, budget=budget)
        outputs = replicate(model)(**batch, budget=budget)
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.budget, expected.budget)
    model.train()
    gradients = []
    for network in (model, copy.deepcopy(model)):
        run = network if network is model else replicate(network)
        torch.manual_seed(0)
        run(**batch, labels=labels).loss.backward()
        gradients.append({name: x.grad for name, x in network.named_parameters() if x.requires_grad})
        if network.narrow is not None:
            assert network.narrow.steps.item() >= 1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def place(module, device):
    """As accelerate's `device_map` does: the hooks move tensors, lists, tuples and dictionaries, nothing else."""
    module.to(device)
    for part in module.modules():
        add_hook_to_module(part, AlignDevicesHook(execution_device=device))


@pytest.mark.parametrize("executor", ["auto", "masked"])
@pytest.mark.parametrize(("budget", "recorded"), [(1.0, None), (1.0, True), (0.25, None)])
def test_layers_may_lie_on_several_devices(budget, recorded, executor, backbone_type):
    """Whatever meets on two devices raises; `meta` is the second one that every machine has."""
    model = budgetformer(backbone_type)
    for layers in (model.base_model.encoder.layer, model.narrow.layer):
        for layer, device in zip(layers, ["cpu", "meta", "meta"], strict=True):
            place(layer, device)
    for head in (model.base_model.pooler, model.classifier, model.narrow.pooler, model.narrow.head):
        if head is not None:
            place(head, "meta")
    batch = batch_of(LENGTHS, backbone_type)
    with torch.no_grad():
        outputs = model(**batch, budget=budget, executor=executor, output_hidden_states=recorded)
    assert outputs.logits.device.type == "meta"
    assert outputs.logits.shape == (4, 3)
    assert outputs.budget.shape == (4,)


def test_modules_of_the_full_model_have_the_stock_names_and_kinds(backbone_type):
    """Or what reaches for `model.dropout` or a projection by its name finds nothing."""
    model, stock = budgetformer(backbone_type), stock_classifier(backbone_type)
    for name, module in stock.named_modules():
        counterpart = model.get_submodule(name)
        if not list(module.children()):
            assert type(counterpart) is type(module), name
    ours = dict(model.named_modules()).keys() - dict(stock.named_modules()).keys()
    assert all(name.split(".")[0] == "narrow" for name in ours)
    assert not any(isinstance(x, nn.Linear) and type(x) is not nn.Linear for x in model.modules())
    assert not any(
        isinstance(x, nn.Linear) and type(x) is not nn.Linear
        for x in budgetformer(backbone_type, router="layer").modules()
    )


def test_dropout_at_inference_is_the_stock_models(backbone_type):
    """MC dropout, and `model.dropout.p = ...`."""
    stock = stock_classifier(backbone_type)
    model = budgetformer(backbone_type)
    model.load_state_dict(stock.state_dict(), strict=False)
    batch = batch_of(LENGTHS, backbone_type)
    plain = model(**batch, budget=1.0).logits
    for network in (stock, model):
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.4
                module.train()
    torch.manual_seed(0)
    expected = stock(**batch).logits
    torch.manual_seed(0)
    assert torch.equal(model(**batch, budget=1.0, executor="masked").logits, expected)
    packed = [model(**batch, budget=1.0).logits for _ in range(2)]
    assert not torch.allclose(packed[0], packed[1])
    assert not torch.allclose(packed[0], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_what_tokenizers_and_collators_add_is_ignored(kind, tokenizer, texts):
    model = KINDS[kind]("bert")
    given = tokenizer(
        list(texts["text"][:4]), padding=True, return_tensors="pt", truncation=True, max_length=8,
        return_special_tokens_mask=True, return_overflowing_tokens=True, return_length=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    assert {"special_tokens_mask", "overflow_to_sample_mapping", "length", "offset_mapping"} <= set(given)
    needed = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in given}
    assert torch.equal(model(**given).logits, model(**needed).logits)
    if kind == "look":
        encoder = BudgetFormerModel(model.config).eval()
        hidden = encoder(**needed).last_hidden_state
        assert torch.equal(encoder(**given).last_hidden_state, hidden)


@pytest.mark.parametrize("name", ["budgets", "executer", "label", "teacher_logit", "output_head_gate"])
def test_a_misspelt_option_of_ours_is_refused(name, backbone_type):
    with pytest.raises(TypeError, match=f"unexpected keyword arguments \\['{name}'\\]"):
        budgetformer(backbone_type)(**batch_of(LENGTHS, backbone_type), **{name: 0.5})


def count_flops(network, batch, **arguments):
    with FlopCounterMode(display=False) as counter:
        outputs = network(**batch, **arguments)
    return counter.get_total_flops(), outputs


def test_an_example_that_forgets_no_grad_spares_what_it_says(backbone_type):
    """Gradients are on in every notebook: what closed units would cost is spared all the same."""
    model, batch = budgetformer(backbone_type, narrow_budget=0.5), batch_of([20] * 8, backbone_type)
    model.config.confidence = [0.0]  # nothing is doubted
    whole, _ = count_flops(stock_classifier(backbone_type), batch)
    for arguments in ({"budget": 0.25}, {}):
        spent, outputs = count_flops(model, batch, **arguments)
        assert outputs.logits.requires_grad
        assert spent < 0.4 * whole
        assert outputs.budget.max() <= 0.25
        with torch.no_grad():
            assert count_flops(model, batch, **arguments)[0] == spent
    # Of the last layer only what the head reads.
    assert 0.7 * whole < count_flops(model, batch, budget=1.0)[0] < whole


def test_a_width_that_heads_do_not_divide_is_refused_when_the_model_is_built(backbone_type):
    """Not by the configuration: the stock one accepts it."""
    stock = stock_config(backbone_type, hidden_size=18)
    config = BudgetFormerConfig.from_backbone_config(stock)
    for build in (BudgetFormerModel, BudgetFormerForSequenceClassification):
        with pytest.raises(ValueError, match=r"multiple of"):
            build(config)


@pytest.mark.parametrize("executor", ["auto", "masked"])
@pytest.mark.parametrize("layers", [[0, 2], [-1], [1, 3], True])
def test_hidden_states_of_chosen_layers_are_the_stock_models(layers, executor, backbone_type):
    stock = stock_classifier(backbone_type)
    model = budgetformer(backbone_type)
    model.load_state_dict(stock.state_dict(), strict=False)
    batch = batch_of(LENGTHS, backbone_type)
    encoder = BudgetFormerModel(model.config).eval()
    encoder.load_state_dict(model.state_dict(), strict=False)
    expected = stock(**batch, output_hidden_states=layers).hidden_states
    real = batch["attention_mask"].bool()
    for states in (
        model(**batch, output_hidden_states=layers, executor=executor).hidden_states,
        model(**batch, output_hidden_states=layers, executor=executor, budget=1.0).hidden_states,
        encoder(**batch, output_hidden_states=layers, executor=executor).hidden_states,
        model.train()(**batch, output_hidden_states=layers, executor=executor).hidden_states,
    ):
        assert [x is None for x in states] == [x is None for x in expected]
        for one, other in zip(states, expected, strict=True):
            if one is not None:
                torch.testing.assert_close(one[real], other[real], rtol=1e-4, atol=1e-5)
    model.eval()


def test_a_routed_layers_hidden_states_may_be_chosen_too(backbone_type):
    model, batch = budgetformer(backbone_type, router="layer"), batch_of(LENGTHS, backbone_type)
    whole = model(**batch, output_hidden_states=True).hidden_states
    states = model(**batch, output_hidden_states=[0, 2]).hidden_states
    assert [x is None for x in states] == [False, True, False, True]
    torch.testing.assert_close(states[2], whole[2])


BAD = {
    "budget of 0": {"budget": 0.0},
    "budget of an integer": {"budget": 1},
    "budget that needs margins": {"budget": 0.5},
    "budgets of another batch": {"budget": torch.tensor([0.5, 0.5])},
    "labels out of range": {"labels": torch.tensor([0, 1, 2, 3])},
    "teacher of other labels": {"teacher_logits": torch.zeros(4, 5)},
    "executor": {"executor": "sparse"},
    "mask of another shape": {"attention_mask": torch.ones(4, 3)},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_refused_call_leaves_nothing_half_changed(bad, training, backbone_type):
    model = budgetformer(backbone_type).train(training)
    given = {**batch_of(LENGTHS, backbone_type), "labels": torch.tensor([0, 1, 2, 0]), **BAD[bad]}
    state = copy.deepcopy(model.state_dict())
    config, log, random = model.config.to_dict(), dict(model.training_log), torch.get_rng_state()
    with pytest.raises(ValueError, match="|".join(name for name in BAD[bad])):
        model(**given)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.training_log == log
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training is training
