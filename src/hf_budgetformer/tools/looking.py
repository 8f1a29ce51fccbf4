"""Looks taken one by one, so that rows of many batches that one look doubts share full batches of the next."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..budgets import FULL_LOOK, Plan, confidence, has_confidence, plan_budget, plan_looks
from .batching import batches_by_length


def plan_call(model: Any, budget: float | None) -> Plan:
    """The looks that a call takes; a budget of None is a plain call.

    Raises:
        ValueError: The model cannot spend that budget.
    """
    if budget is None and model.config.looks is None and not (model.is_trained() and has_confidence(model.config)):
        return Plan((FULL_LOOK,))
    order = model.narrow.order
    return plan_looks(model.config, order) if budget is None else plan_budget(model.config, order, budget)


def plan_deferred(model: Any, budget: float | None = None) -> Plan | None:
    """The looks of a call that has several, which can be taken one by one.

    Args:
        model: A classifier, stock or BudgetFormer.
        budget: As in `forward`, a float; None: a plain call.

    Returns:
        None: the model is called as it is, for it looks once, or its layers have routers.

    Raises:
        ValueError: The model cannot spend that budget.
    """
    config = model.config
    if config.model_type != "budgetformer" or config.router == "layer" or not config.full_encoder:
        return None
    # A regression cannot be doubted, and what is recorded is of the full encoder: the call itself sees to both.
    if not has_confidence(config) or config.output_hidden_states or config.output_attentions:
        return None
    plan = plan_call(model, budget)
    return plan if len(plan.looks) > 1 else None


class Seen(NamedTuple):
    """What one look made of a batch, on the CPU.

    Args:
        logits: (B, num_labels), float32.
        cost: (B,), float32, share of the full model's work that this look took.
        doubted: (B,), bool: whether the next look is to answer.
    """

    logits: torch.Tensor
    cost: torch.Tensor
    doubted: torch.Tensor


@torch.no_grad()
def take_look(model: Any, plan: Plan, number: int, batch: BatchEncoding) -> Seen:
    """One look at a batch, and no other.

    Args:
        model: A BudgetFormer classifier in eval mode.
        plan: As `plan_deferred` gives it.
        number: Of the look in the plan, from 0.
        batch: Tensors (B, L) as the tokenizer pads them.
    """
    # A look that opens nothing costs nothing, which is no budget.
    budget = max(plan.looks[number].cost, sys.float_info.epsilon)
    out = model(**batch.to(model.device), budget=budget)
    if number < len(plan.thresholds):
        doubted = confidence(out.logits, model.config.problem_type) < plan.thresholds[number]
    else:
        doubted = torch.zeros(len(out.logits), dtype=torch.bool)
    return Seen(out.logits.float().cpu(), out.budget.cpu(), doubted.cpu())


class Answers(NamedTuple):
    """Final answers of some rows, on the CPU.

    Args:
        places: (b,), int64, positions of the rows.
        logits: (b, num_labels), float32.
        spent: (b,), float32, share of the full model's work, all looks together; 1 for a stock model.
    """

    places: np.ndarray
    logits: torch.Tensor
    spent: torch.Tensor


def answer_rows(
    model: Any,
    rows: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    budget: float | None = None,
) -> Iterator[Answers]:
    """What the model's own call answers; each look is at all rows that are left, before the next one begins.

    Of a batch of 32 some three rows are doubted, and a batch of three costs more for each row than a full one. Here
    they wait, as token ids, and are batched by length anew: all batches of a look are full but for its last.

    Args:
        model: A classifier in eval mode, stock or BudgetFormer.
        rows: As `batching.tokenized` gives them; all are held until the last is answered.
        tokenizer: Of the model.
        batch_size: Rows at a time, >= 1.
        budget: As in `forward`, a float; None: a plain call.

    Yields:
        Each row once, as soon as its answer is final.

    Raises:
        ValueError: The model cannot spend that budget.
    """
    plan = plan_deferred(model, budget)
    if plan is None:
        yield from _answer_at_once(model, rows, tokenizer, batch_size, budget)
        return
    spent = torch.zeros(len(rows["input_ids"]))
    left = np.arange(len(spent))
    for number in range(len(plan.looks)):
        waiting = {name: [values[row] for row in left] for name, values in rows.items()}
        doubted = [left[:0]]
        for places, batch in batches_by_length(waiting, tokenizer, batch_size):
            places = left[places]
            seen = take_look(model, plan, number, batch)
            spent[places] += seen.cost
            final = ~seen.doubted
            sure = places[final.numpy()]
            if len(sure):
                yield Answers(sure, seen.logits[final], spent[sure])
            doubted.append(places[seen.doubted.numpy()])
        left = np.concatenate(doubted)


def _answer_at_once(
    model: Any,
    rows: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    budget: float | None,
) -> Iterator[Answers]:
    options = {} if budget is None else {"budget": budget}
    for places, batch in batches_by_length(rows, tokenizer, batch_size):
        with torch.no_grad():
            out = model(**batch.to(model.device), **options)
        spent = out.budget.cpu() if model.config.model_type == "budgetformer" else torch.ones(len(places))
        yield Answers(places, out.logits.float().cpu(), spent)


__all__ = ["Answers", "Seen", "answer_rows", "plan_call", "plan_deferred", "take_look"]
