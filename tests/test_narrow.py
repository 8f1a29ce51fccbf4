"""The narrow encoder: packed views against the masked reference, outputs and gradients; birth from the full encoder."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from conftest import BACKBONE_TYPES, VOCABULARY, batch_of, budgetformer, stock_config
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification
from hf_budgetformer.backbones import BACKBONES, LayerNames
from hf_budgetformer.narrow import Importance, NarrowLayer, first_outputs, from_first_inputs, is_plain
from hf_budgetformer.packing import PaddedBatch, find_packing


# Of the largest logit; in bfloat16 five steps between numbers around 1, for one in ten thousand batches takes three.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
KINDS = {
    "norm_after": {},
    "norm_first": {"norm_first": True},
    "gated": {"names": LayerNames(gate="gate")},
    "norm_first_gated_without_biases": {"norm_first": True, "names": LayerNames(gate="gate")},
}


def narrow_layer(kind, heads=4, neurons=24):
    biases = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), not kind.endswith("without_biases"))
    config = BudgetFormerConfig.from_backbone_config(stock_config("bert"), **biases)
    layer = NarrowLayer(config, replace(BACKBONES["bert"], **KINDS[kind]), heads, neurons)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.3)
    return layer.eval()


def random_mask(rows, length, generator, side):
    if side == "none":
        return None
    if side == "holes":
        mask = (torch.rand(rows, length, generator=generator) < 0.6).long()
        mask[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = 1
        return mask
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return mask if side == "right" else mask.flip(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "neurons"), [(4, 24), (2, 7), (1, 24), (0, 5), (3, 0), (0, 0)])
def test_views_equal_the_masked_reference_outputs_and_gradients(kind, heads, neurons):
    """Contract 2, one layer of every kind: packed and padded, with whole sublayers closed."""
    layer = narrow_layer(kind)
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(5, 9, generator, "right")
    hidden = torch.randn(5, 9, 16, generator=generator)
    batch = find_packing(mask, (5, 9), hidden.device)
    results = {}
    for way in ("packed", "padded", "masked"):
        layer.zero_grad()
        given = hidden.clone().requires_grad_()
        if way == "packed":
            output = batch.pad(layer(batch.pack(given), batch.layout, heads, neurons))
        else:
            output = layer(given, mask, heads, neurons, masked=way == "masked")
        (output * mask[:, :, None]).square().sum().backward()
        gradients = {name: x.grad for name, x in layer.named_parameters() if x.grad is not None and x.grad.any()}
        results[way] = (output.detach() * mask[:, :, None], given.grad * mask[:, :, None], gradients)
    expected = results.pop("masked")
    for way, (output, gradient, gradients) in results.items():
        torch.testing.assert_close(output, expected[0], rtol=1e-5, atol=1e-5, msg=way)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-4, msg=way)
        assert gradients.keys() == expected[2].keys(), way
        for name, value in gradients.items():
            torch.testing.assert_close(value, expected[2][name], rtol=1e-4, atol=1e-3, msg=f"{way} {name}")


def check_models_against_the_reference(cases, seed):
    """Random batches: lengths, padding sides, budgets, one for all and one for each, and number types."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    models = {}
    for backbone_type in BACKBONE_TYPES:
        model = budgetformer(backbone_type, narrow_budget=0.75)
        for dtype in TOLERANCE:
            models[backbone_type, dtype] = copy.deepcopy(model).to(dtype)
    for _ in range(cases):
        backbone_type = chance.choice(BACKBONE_TYPES)
        dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16])
        model = models[backbone_type, dtype]
        rows, length = chance.choice([1, 2, 3, 5, 8]), chance.choice([1, 2, 3, 7, 16])
        mask = random_mask(rows, length, generator, chance.choice(["right", "left", "holes", "none"]))
        ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
        if mask is not None:
            ids[mask == 0] = model.config.pad_token_id
        budget = chance.choice([chance.uniform(0.05, 0.75), 1.0])
        if chance.random() < 0.5:
            budget = torch.rand(rows, generator=generator) * 0.7 + 0.05
            budget[torch.rand(rows, generator=generator) < 0.3] = 1.0
        inputs = {"input_ids": ids, "attention_mask": mask, "budget": budget}
        got, expected = model(**inputs), model(**inputs, executor="masked")
        error = (got.logits.float() - expected.logits.float()).abs().max().item()
        scale = max(1.0, expected.logits.float().abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, (error, backbone_type, dtype, mask, budget)
        assert torch.equal(got.budget, expected.budget)


@torch.no_grad()
def test_any_batch_at_any_budgets_equals_the_masked_reference():
    check_models_against_the_reference(400, seed=0)


@pytest.mark.slow
@torch.no_grad()
def test_ten_thousand_batches_at_any_budgets_equal_the_masked_reference():
    check_models_against_the_reference(10_000, seed=1)


@torch.no_grad()
def test_feed_forward_in_chunks_equals_all_at_once(monkeypatch):
    layer, hidden = narrow_layer("norm_after"), torch.randn(50, 16)
    batch = find_packing(None, (5, 10), hidden.device)
    expected = layer(hidden, batch.layout, 2, 12)
    monkeypatch.setattr("hf_budgetformer.attention.CHUNK_VALUES", 7 * 12)
    torch.testing.assert_close(layer(hidden, batch.layout, 2, 12), expected)


# Linear layers that are more than W x + b


def wrapped(linear, kind):
    if kind == "hook":
        linear.register_forward_hook(lambda module, given, output: output * 2.0)
    elif kind == "subclass":

        class Doubled(torch.nn.Linear):
            def forward(self, hidden):
                return 2.0 * super().forward(hidden)

        linear.__class__ = Doubled
    elif kind == "replaced forward":
        plain = linear.forward
        linear.forward = lambda hidden: 2.0 * plain(hidden)
    elif kind == "parametrisation":

        class Twice(torch.nn.Module):
            def forward(self, weight):
                return 2.0 * weight

        torch.nn.utils.parametrize.register_parametrization(linear, "weight", Twice())
        torch.nn.utils.parametrize.register_parametrization(linear, "bias", Twice())
    return linear


@pytest.mark.parametrize("kind", ["hook", "subclass", "replaced forward", "parametrisation"])
@torch.no_grad()
def test_a_linear_layer_that_does_more_goes_through_its_own_forward(kind):
    """Fault D."""
    plain, hidden = torch.nn.Linear(6, 8), torch.randn(5, 6)
    assert is_plain(plain)
    expected = 2.0 * plain(hidden)[:, :3]
    linear = wrapped(copy.deepcopy(plain), kind)
    assert not is_plain(linear)
    torch.testing.assert_close(first_outputs(linear, hidden, 3), expected)
    expected = 2.0 * plain(torch.cat([hidden[:, :2], torch.zeros(5, 4)], dim=1))
    torch.testing.assert_close(from_first_inputs(linear, hidden[:, :2]), expected)


# Birth


@pytest.mark.parametrize("executor", ["auto", "masked"])
@torch.no_grad()
def test_at_full_width_it_is_the_full_encoder(backbone_type, executor):
    """Contract 3: every unit, whatever order they are stored in."""
    model = budgetformer(backbone_type, narrow_budget=1.0)
    order = torch.Generator().manual_seed(0)
    model.init_narrow([Importance(torch.rand(4, generator=order), torch.rand(24, generator=order)) for _ in range(3)])
    ids, mask = batch_of([7, 12, 1, 4], backbone_type).values()
    embedded = model.embed({"input_ids": ids, "attention_mask": mask}, executor=executor)
    answer = model._answer(embedded, model.narrow.widest)
    expected = model(ids, mask, budget=1.0, executor=executor).logits
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_most_important_units_are_born_first(backbone_type):
    model = budgetformer(backbone_type, narrow_budget=0.5)
    full, narrow = model.base_model.encoder.layer[1], model.narrow.layer[1]
    importance = [Importance(torch.arange(4.0), -torch.arange(24.0)) for _ in range(3)]
    model.init_narrow(importance)
    query, key, value = narrow.qkv.weight.view(2, 3, 4, 16).unbind(1)
    attention = full.attention.self
    for part, stock in ((query, attention.query), (key, attention.key), (value, attention.value)):
        assert torch.equal(part, stock.weight.view(4, 4, 16)[[3, 2]])
    assert torch.equal(narrow.up.weight, full.intermediate.dense.weight[:12])
    assert torch.equal(narrow.down.weight, full.output.dense.weight[:, :12])
    assert torch.equal(narrow.down.bias, full.output.dense.bias)
    assert torch.equal(narrow.attention_norm.weight, full.attention.output.LayerNorm.weight)


@torch.no_grad()
def test_by_weight_norms_units_that_do_nothing_come_last(backbone_type, tmp_path):
    """On load: a plain checkpoint's narrow encoder holds the units of the largest weights."""
    stock = budgetformer(backbone_type)
    for layer in stock.base_model.encoder.layer:
        layer.attention.output.dense.weight[:, :8] = 0.0  # heads 0 and 1
        layer.output.dense.weight[:, 6:] = 0.0
    stock.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    plain = {name: x for name, x in weights.items() if not name.startswith("narrow.")}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, narrow_budget=0.5)
    assert not model.is_trained()
    for layer, full in zip(model.narrow.layer, model.base_model.encoder.layer, strict=True):
        assert layer.attention_output.weight.abs().sum(0).all()
        assert torch.equal(
            layer.down.weight.abs().sum(0).sort().values, full.output.dense.weight.abs().sum(0).sort().values[-12:]
        )


def test_drawn_budgets_depend_on_the_step_alone(backbone_type):
    """So a resumed training draws what it would have drawn, and the full encoder's dropout sees no other numbers."""
    model = budgetformer(backbone_type, narrow_budget=0.75)
    state, drawn = torch.random.get_rng_state(), []
    for step in range(40):
        model.narrow.steps.fill_(step)
        drawn.append(model.narrow.draw().cost)
        assert model.narrow.draw().cost == drawn[-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(set(drawn)) == pytest.approx([0.25, 0.5, 0.75])


@torch.no_grad()
def test_rows_can_be_taken_out_of_a_packed_batch():
    """What the second look is given: the doubtful inputs alone, in any order."""
    generator = torch.Generator().manual_seed(3)
    for side in ("right", "left", "holes", "none"):
        mask = random_mask(6, 9, generator, side)
        values = torch.randn(6, 9, 2, generator=generator)
        packed = find_packing(mask, (6, 9), values.device)
        rows = torch.tensor([4, 0, 3])
        hidden, batch = packed.select(packed.pack(values), rows)
        alone, expected = PaddedBatch(mask).select(values, rows)
        packing = find_packing(expected.mask, (3, 9), values.device)
        assert torch.equal(batch.pad(hidden), packing.pad(packing.pack(alone)))
        assert torch.equal(batch.first(hidden), alone[:, 0])
        assert sorted(batch.sequences.lengths) == sorted(packing.sequences.lengths)
        assert batch.sequences.padded_first == packing.sequences.padded_first
