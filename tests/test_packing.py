"""Padding leaves a batch and comes back; attention stays within each sequence."""

import pytest
import torch

from conftest import batch_of, budgetformer
from hf_budgetformer import attention
from hf_budgetformer.attention import attend_packed, attend_padded
from hf_budgetformer.packing import Sequences, find_packing, find_runs
from test_narrow import random_mask


@pytest.mark.parametrize("side", ["right", "left", "holes", "none"])
def test_packing_takes_every_kept_token_once_and_puts_it_back(side):
    generator = torch.Generator().manual_seed(3)
    mask = random_mask(6, 9, generator, side)
    mask = torch.ones(6, 9, dtype=torch.long) if mask is None else mask
    packing = find_packing(mask, (6, 9), mask.device)
    kept = mask.bool().clone()
    kept[:, 0] = True
    values = torch.arange(54.0).view(6, 9, 1) + 1
    packed = packing.pack(values)
    assert len(packed) == sum(packing.sequences.lengths) == kept.sum() == len(packing.owners)
    assert torch.equal(packing.pad(packed), values * kept[:, :, None])
    rows = torch.arange(6)
    assert torch.equal(packing.unsort(packing.sort(rows)), rows)
    assert torch.equal(packing.sort(rows).index_select(0, packing.owners), (packed[:, 0].long() - 1) // 9)
    whole = len(packing.sequences.lengths) - packing.sequences.padded_first
    assert packing.sequences.lengths[:whole] == sorted(packing.sequences.lengths[:whole], reverse=True)
    assert packing.sequences.padded_first == (mask[:, 0] == 0).sum()


def test_a_batch_without_padding_is_not_copied():
    values = torch.randn(2, 3, 4)
    for mask in (None, torch.ones(2, 3)):
        packing = find_packing(mask, (2, 3), values.device)
        assert packing.indices is None
        assert packing.pack(values).data_ptr() == values.data_ptr()
        assert packing.pad(packing.pack(values)).shape == values.shape


def test_runs_are_neighbours_of_one_length():
    assert find_runs([5, 5, 3, 5]) == [(2, 5), (1, 3), (1, 5)]


@pytest.mark.parametrize("side", ["right", "left", "holes", "none"])
@torch.no_grad()
def test_attention_of_packed_sequences_is_that_of_the_padded_batch(side):
    mask = random_mask(6, 9, torch.Generator().manual_seed(3), side)
    packing = find_packing(mask, (6, 9), torch.device("cpu"))
    parts = torch.randn(3, 6, 9, 2, 8).unbind(0)
    expected = attend_padded(parts, mask)
    got = packing.pad(attend_packed([packing.pack(part) for part in parts], packing.sequences))
    real = torch.ones(6, 9, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@torch.no_grad()
def test_the_packed_full_encoder_equals_the_padded_one(backbone_type, side):
    model, mask = budgetformer(backbone_type), random_mask(5, 12, torch.Generator().manual_seed(0), side)
    ids = batch_of([12] * 5, backbone_type)["input_ids"].masked_fill(mask == 0, model.config.pad_token_id)
    given, hidden = {"input_ids": ids, "attention_mask": mask}, {}
    for executor in ("masked", "auto"):
        embedded = model.embed(given, executor=executor)
        hidden[executor] = embedded.batch.pad(model.encode_full(embedded))
    torch.testing.assert_close(hidden["auto"][mask.bool()], hidden["masked"][mask.bool()], rtol=1e-5, atol=1e-5)
    assert not hidden["auto"][:, 1:][mask[:, 1:] == 0].any()  # padded with zeros, but for the first position


def test_gradients_of_a_packed_training_step_equal_the_padded_ones(backbone_type):
    model, batch = budgetformer(backbone_type).train(), batch_of([9, 4, 12, 1, 9], backbone_type)
    gradients = {}
    for executor in ("masked", "auto"):
        model.zero_grad()
        model.narrow.steps.fill_(3)
        model(**batch, labels=torch.tensor([0, 1, 2, 0, 1]), executor=executor).loss.backward()
        gradients[executor] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, gradient in gradients["masked"].items():
        torch.testing.assert_close(gradients["auto"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_variable_length_attention_is_called_with_the_bounds_of_each_sequence(monkeypatch):
    """The kernel needs a GPU; what it is given does not."""

    def reference(query, key, value, bounds, key_bounds, longest, longest_key, window_size):
        assert window_size == (-1, -1)  # everything
        assert torch.equal(bounds, key_bounds)
        assert bounds.dtype == torch.int32
        assert bounds.diff().max() == longest == longest_key
        spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        parts = [attend_packed([x[a:b] for x in (query, key, value)], Sequences([b - a])) for a, b in spans]
        return torch.cat(parts).unflatten(-1, (2, 8))

    parts, lengths = torch.randn(3, 12, 2, 8).unbind(0), [5, 3, 3, 1]
    bounds = torch.tensor([0, 5, 8, 11, 12], dtype=torch.int32)
    expected = attend_packed(parts, Sequences(lengths, 0, bounds))
    served = iter([True])
    monkeypatch.setattr(attention, "_flash_serves", lambda query: next(served, False))
    monkeypatch.setattr(attention, "varlen_attn", reference)
    torch.testing.assert_close(attend_packed(parts, Sequences(lengths, 0, bounds)), expected)
    assert next(served, None) is None
