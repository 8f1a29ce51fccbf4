"""Packing and the sparse executors against the masked reference: outputs, gradients, and what they really compute."""

import copy
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import create_bidirectional_mask

from conftest import VOCABULARY, batch_of, budgetformer, stock_config
from hf_budgetformer import BudgetFormerConfig, attention
from hf_budgetformer.attention import (
    EXECUTORS,
    GatedSelfAttention,
    OpenHeads,
    attend_all_heads,
    attend_by_group,
    attend_by_pair,
    choose_executor,
)
from hf_budgetformer.packing import find_packing, find_runs


HEADS = 6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def layer():
    """Self-attention and output projection of 6 heads of 4, in eval mode."""
    torch.manual_seed(0)
    config = BudgetFormerConfig(hidden_size=24, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    return GatedSelfAttention(config).eval(), torch.nn.Linear(24, 24)


def masked_reference(layer, hidden, mask, gates):
    """The reference in float32 whatever the type: (B, L, D)."""
    attention, output = (copy.deepcopy(part).float() for part in layer)
    hidden = hidden.float()
    full = create_bidirectional_mask(config=attention.config, inputs_embeds=hidden, attention_mask=mask)
    return output(attention(hidden, full, gates=gates)[0])


def run_executors(layer, hidden, mask, gates):
    """What each executor makes of a padded batch, unpacked again; and which tokens were kept."""
    packing = find_packing(mask, hidden.shape[:2], hidden.device)
    sorted_gates = packing.sort(gates)
    open_heads = OpenHeads(sorted_gates.tolist())
    chosen = {"all_heads": sorted_gates, "by_group": open_heads, "by_pair": open_heads}
    packed = packing.pack(hidden)
    kept = mask.bool().clone()
    kept[:, 0] = True
    return {name: packing.unpack(run(*layer, packed, packing, chosen[name])) for name, run in EXECUTORS.items()}, kept


def random_gates(rows, generator, same=False, heads=HEADS):
    counts = torch.randint(1, heads + 1, (rows, 1), generator=generator)
    ranks = torch.rand(rows, heads, generator=generator).argsort(-1)
    gates = (ranks < counts).float()
    return gates[:1].expand(rows, -1).contiguous() if same else gates


def random_mask(rows, length, generator, side):
    if side == "none":
        return torch.ones(rows, length, dtype=torch.long)
    if side == "holes":
        mask = (torch.rand(rows, length, generator=generator) < 0.6).long()
        mask[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = 1
        return mask
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return mask if side == "right" else mask.flip(-1)


def check_against_the_reference(layer, cases, seed):
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    layers = {dtype: tuple(copy.deepcopy(part).to(dtype) for part in layer) for dtype in TOLERANCE}
    for _ in range(cases):
        rows, length = chance.choice([1, 2, 3, 5, 8]), chance.choice([1, 2, 3, 7, 16])
        dtype = chance.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        mask = random_mask(rows, length, generator, chance.choice(["right", "left", "holes", "none"]))
        gates = random_gates(rows, generator, same=chance.random() < 0.2)
        if chance.random() < 0.3:  # some inputs agree
            gates = gates[torch.randint(rows, (rows,), generator=generator)]
        hidden = torch.randn(rows, length, 24, generator=generator).to(dtype)
        reference = masked_reference(layers[dtype], hidden, mask, gates)
        results, kept = run_executors(layers[dtype], hidden, mask, gates)
        for name, result in results.items():
            error = (result.float() - reference)[kept].abs().max().item()
            assert error <= TOLERANCE[dtype], (name, error, mask, gates)
            assert not result[~kept].any(), name


@torch.no_grad()
def test_every_executor_equals_the_masked_reference_on_any_batch(layer):
    """Contract 2: lengths, gates, number types, padding left, right, in the middle, none."""
    check_against_the_reference(layer, 2_000, seed=0)


@pytest.mark.slow
@torch.no_grad()
def test_every_executor_equals_the_masked_reference_on_ten_thousand_batches(layer):
    check_against_the_reference(layer, 10_000, seed=1)


@pytest.mark.parametrize(
    ("lengths", "gates"),
    [
        ([16] + [1] * 15, None),
        ([1] * 8, None),
        ([5, 9, 2], "same"),
        ([5, 9, 2, 9, 5, 9], "none_the_same"),
        ([5, 9, 2], "one"),
        ([5, 9, 2], "all"),
        ([7], None),
    ],
)
@torch.no_grad()
def test_hostile_batches(layer, lengths, gates):
    generator, rows = torch.Generator().manual_seed(0), len(lengths)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    gates = {
        None: random_gates(rows, generator),
        "same": random_gates(rows, generator, same=True),
        "none_the_same": torch.eye(HEADS),
        "one": torch.eye(HEADS)[[0, 0, 5]],
        "all": torch.ones(rows, HEADS),
    }[gates]
    hidden = torch.randn(rows, max(lengths), 24)
    results, kept = run_executors(layer, hidden, mask, gates)
    for result in results.values():
        torch.testing.assert_close(
            result[kept], masked_reference(layer, hidden, mask, gates)[kept], rtol=1e-5, atol=1e-5
        )


# Packing


@pytest.mark.parametrize("side", ["right", "left", "holes", "none"])
def test_packing_takes_every_kept_token_once_and_puts_it_back(side):
    generator = torch.Generator().manual_seed(3)
    mask = random_mask(6, 9, generator, side)
    packing = find_packing(mask, (6, 9), mask.device)
    kept = mask.bool().clone()
    kept[:, 0] = True
    values = torch.arange(54.0).view(6, 9, 1) + 1
    packed = packing.pack(values)
    assert len(packed) == sum(packing.lengths) == kept.sum() == len(packing.owners)
    assert torch.equal(packing.unpack(packed), values * kept[:, :, None])
    rows = torch.arange(6)
    assert torch.equal(packing.unsort(packing.sort(rows)), rows)
    assert torch.equal(packing.sort(rows).index_select(0, packing.owners), (packed[:, 0].long() - 1) // 9)
    whole = len(packing.lengths) - packing.padded_first
    assert packing.lengths[:whole] == sorted(packing.lengths[:whole], reverse=True)
    assert packing.padded_first == (mask[:, 0] == 0).sum()


def test_a_batch_without_padding_is_not_copied():
    values = torch.randn(2, 3, 4)
    for mask in (None, torch.ones(2, 3)):
        packing = find_packing(mask, (2, 3), values.device)
        assert packing.indices is None
        assert packing.pack(values).data_ptr() == values.data_ptr()
        assert packing.unpack(packing.pack(values)).shape == values.shape


def test_runs_are_neighbours_of_one_length():
    assert find_runs([5, 5, 3, 5]) == [(2, 5), (1, 3), (1, 5)]


# The whole model


def padded_batch(backbone_type, side):
    batch = batch_of([9, 4, 12, 1, 9], backbone_type, "left" if side == "left" else "right")
    if side == "holes":
        batch["attention_mask"][0, 3:5] = 0
        batch["attention_mask"][2, 0] = 0
    return batch


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("head_budget", [None, 0.25, 0.5, 1.0])
@torch.no_grad()
def test_the_packed_model_equals_the_masked_one(backbone_type, side, head_budget):
    model, batch = budgetformer(backbone_type), padded_batch(backbone_type, side)
    asked = {**batch, "head_budget": head_budget, "output_head_gates": True}
    expected = model(**asked, executor="masked")
    for executor in ("auto", "sparse"):
        got = model(**asked, executor=executor)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.head_gates, expected.head_gates)
        assert torch.equal(got.head_budget, expected.head_budget)


@torch.no_grad()
def test_recorded_hidden_states_come_back_padded_with_zeros(backbone_type):
    model, batch = budgetformer(backbone_type), padded_batch(backbone_type, "right")
    real = batch["attention_mask"].bool()
    expected = model(**batch, output_hidden_states=True, executor="masked").hidden_states
    got = model(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[real], other[real], rtol=1e-5, atol=1e-5)
        assert not one[~real].any()


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_gradients_of_a_packed_training_step_equal_the_padded_ones(backbone_type, side):
    original, batch = budgetformer(backbone_type), padded_batch(backbone_type, side)
    gradients = {}
    for executor in ("masked", "auto"):
        model = copy.deepcopy(original).train()
        torch.manual_seed(5)
        # Half of four heads, exactly: no head is marginal, so that no chance decides in an order of its own.
        model(**batch, labels=torch.tensor([0, 1, 2, 0, 1]), head_budget=1.0, executor=executor).loss.backward()
        gradients[executor] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["masked"].items():
        torch.testing.assert_close(gradients["auto"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_router_gradients_flow_through_the_packed_path_as_through_the_padded_one(layer):
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(4, 7, generator, "right")
    weights = torch.randn(4, 7, 24, generator=generator) * mask[:, :, None]
    results = []
    for packed in (False, True):
        gates = random_gates(4, torch.Generator().manual_seed(1)).requires_grad_()
        hidden = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if packed:
            packing = find_packing(mask, (4, 7), hidden.device)
            result = packing.unpack(attend_all_heads(*layer, packing.pack(hidden), packing, packing.sort(gates)))
        else:
            full = create_bidirectional_mask(config=layer[0].config, inputs_embeds=hidden, attention_mask=mask)
            result = layer[1](layer[0](hidden, full, gates=gates)[0])
        results.append(torch.autograd.grad((result * weights).sum(), [gates, hidden]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


# What runs


@pytest.fixture
def ran(monkeypatch):
    """Names of the executors that ran, in order."""
    names = []

    def spy(name, run):
        def spied(*arguments):
            names.append(name)
            return run(*arguments)

        return spied

    for name, run in list(EXECUTORS.items()):
        monkeypatch.setitem(EXECUTORS, name, spy(name, run))
    monkeypatch.setattr(attention, "attend_all_heads", EXECUTORS["all_heads"])
    return names


def test_all_heads_open_runs_the_dense_path_without_gates(ran, monkeypatch):
    model = budgetformer("bert")
    with torch.no_grad():
        model(**batch_of([5, 3]), head_budget=1.0)
    assert ran == ["all_heads"] * 3


def test_gradients_run_every_head(ran):
    model = budgetformer("bert")
    model(**batch_of([5, 3]), head_budget=0.25)
    model.train()
    with torch.no_grad():
        model(**batch_of([5, 3]), head_budget=0.25, executor="sparse")
    assert ran == ["all_heads"] * 6


def test_evaluation_under_autocast_equals_the_masked_path(backbone_type, ran):
    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**batch, head_budget=0.4, executor="sparse")
        expected = model(**batch, head_budget=0.4, executor="masked")
    assert set(ran) == {"all_heads"}
    torch.testing.assert_close(got.logits, expected.logits, rtol=3e-2, atol=3e-2)


def test_an_adapter_on_a_projection_is_not_passed_over(backbone_type):
    """As of peft: the module is replaced, its weight is that of the base layer."""

    class Adapted(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1.5 * hidden[..., :1]

    model, batch = budgetformer(backbone_type), batch_of([9, 4, 6], backbone_type)
    for layer in model.base_model.encoder.layer:
        layer.attention.self.value.__class__ = Adapted
    with torch.no_grad():
        got = model(**batch, head_budget=0.5, executor="sparse")
        expected = model(**batch, head_budget=0.5, executor="masked")
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_sparse_never_computes_a_closed_head(ran):
    with torch.no_grad():
        budgetformer("bert")(**batch_of([5, 3]), head_budget=0.25, executor="sparse")
    assert len(ran) == 3
    assert "all_heads" not in ran


@pytest.mark.parametrize("asked", [{"executor": "masked"}, {"output_attentions": True}])
def test_the_masked_path_runs_no_packed_executor(ran, asked):
    model = budgetformer("bert")
    if "output_attentions" in asked:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**batch_of([5, 3]), head_budget=0.25, **asked)
    assert ran == []


@pytest.mark.parametrize(
    ("rows", "length", "open_heads", "same", "chosen"),
    [
        (1, 512, 3, True, {"by_group"}),
        (16, 128, 3, True, {"by_group"}),
        (8, 512, 3, False, {"by_group"}),
        (32, 32, 3, False, {"by_pair"}),
        (32, 32, 11, False, {"all_heads"}),
        (32, 16, 10, False, {"all_heads"}),
    ],
)
def test_each_branch_of_the_chooser_is_reached(rows, length, open_heads, same, chosen):
    ranks = torch.rand(rows, 12, generator=torch.Generator().manual_seed(0)).argsort(-1)
    gates = (ranks < open_heads).float()
    gates = gates[:1].expand(rows, -1).contiguous() if same else gates
    assert choose_executor([length] * rows, OpenHeads(gates.tolist()), 12, 32, threads=2) in chosen


def flops_of(run):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("run", [attend_by_group, attend_by_pair])
def test_closed_heads_cost_nothing(layer, run):
    """Contract 4 for the attention block: work falls with the sum over inputs of open heads times tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [16, 12, 12, 5, 1]
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    hidden = torch.randn(5, 16, 24)
    for _ in range(10):
        gates = random_gates(5, generator)
        packing = find_packing(mask, (5, 16), hidden.device)
        open_heads = OpenHeads(gates.tolist())
        counted = flops_of(lambda: run(*layer, packing.pack(hidden), packing, open_heads))  # noqa: B023
        pairs = sum(k * n for k, n in zip(gates.sum(-1).tolist(), lengths, strict=True))
        squares = sum(k * n * n for k, n in zip(gates.sum(-1).tolist(), lengths, strict=True))
        assert counted == pytest.approx(2 * 4 * 4 * 24 * pairs + 4 * 4 * squares, rel=1e-6)


def test_variable_length_attention_is_called_with_the_bounds_of_each_sequence(monkeypatch):
    """The kernel needs a GPU; what it is given does not."""

    def reference(query, key, value, bounds, key_bounds, longest, longest_key):
        assert torch.equal(bounds, key_bounds)
        assert bounds.dtype == torch.int32
        assert bounds.diff().max() == longest == longest_key
        spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return torch.cat([attention.attend([x[a:b] for x in (query, key, value)], [b - a]) for a, b in spans])

    parts, lengths = torch.randn(3, 12, 2, 8).unbind(0), [5, 3, 3, 1]
    expected = attention.attend(parts, lengths)
    served = iter([True])
    monkeypatch.setattr(attention, "_flash_serves", lambda query: next(served, False))
    monkeypatch.setattr(attention, "varlen_attn", reference)
    torch.testing.assert_close(attention.attend(parts, lengths), expected)
    assert next(served, None) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_executors_agree_on_cuda(dtype):
    torch.manual_seed(0)
    config = BudgetFormerConfig.from_backbone_config(stock_config("bert", hidden_size=64, num_attention_heads=4))
    config._attn_implementation = "sdpa"
    layer = (GatedSelfAttention(config).eval().to("cuda", dtype), torch.nn.Linear(64, 64).to("cuda", dtype))
    hidden = torch.randn(5, 16, 64, device="cuda", dtype=dtype)
    mask = (torch.arange(16) < torch.tensor([16, 9, 9, 3, 1])[:, None]).long().cuda()
    gates = random_gates(5, torch.Generator().manual_seed(0), heads=4).cuda()
    results, kept = run_executors(layer, hidden, mask, gates)
    for result in results.values():
        torch.testing.assert_close(result[kept], results["all_heads"][kept], rtol=1e-2, atol=1e-2)


def test_exporting_takes_the_masked_path():
    """Selecting tokens by value cannot be traced."""
    model = budgetformer("bert")
    exported = torch.export.export(model, (torch.randint(5, VOCABULARY, (2, 6)),), strict=False)
    ids = torch.randint(5, VOCABULARY, (2, 6))
    torch.testing.assert_close(exported.module()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
