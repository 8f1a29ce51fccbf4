"""Terms of the training loss beside the task's, as pure functions, and how they join it."""

import math
from typing import Any

import torch
from torch.nn import functional as F


# Of the mean budget where it has no target, and the weight of the entropy term with soft gates: the paper's bounds, and
# a value it does not give.
BUDGET_BOUNDS = (0.1, 0.9)
ENTROPY_WEIGHT = 0.01


def budget_hinge(mean_budget: torch.Tensor) -> torch.Tensor:
    """Distance of the mean budget, a scalar share, from `BUDGET_BOUNDS`; zero inside (arXiv 2604.22583)."""
    least, most = BUDGET_BOUNDS
    return F.relu(least - mean_budget) + F.relu(mean_budget - most)


def budget_distance(mean_budget: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared distance of the logarithms of the mean budget and the one asked for, so relative to what is asked.

    Of a mean over the batch, so that inputs may differ.

    Args:
        mean_budget: Scalar, a share of the heads.
        target: Scalar, a share of the heads.
    """
    return (mean_budget.log() - target.log()).square()


def teacher_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, problem_type: str) -> torch.Tensor:
    """How far each input's prediction is from a teacher's.

    Args:
        logits: (B, labels).
        teacher_logits: (B, labels).
        problem_type: As in a configuration: of one label of many the Kullback-Leibler divergence, of several labels
            the sum of their binary ones, in nats; of a regression the mean squared difference.

    Returns:
        (B,), at least float32, >= 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, teacher_logits = logits.to(dtype), teacher_logits.to(dtype)
    if problem_type == "regression":
        return (logits - teacher_logits).square().mean(-1)
    if problem_type == "multi_label_classification":
        logits, teacher_logits = (torch.stack([x, torch.zeros_like(x)], -1) for x in (logits, teacher_logits))
        return _divergence(logits, teacher_logits).sum(-1)
    return _divergence(logits, teacher_logits)


def _divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    expected = teacher_logits.log_softmax(-1)
    return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).clamp(min=0.0)


def hidden_divergence(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far hidden states point from those of another encoder: mean of 1 - cosine. (..., D) each -> scalar."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (1.0 - F.cosine_similarity(hidden.to(dtype), target.to(dtype), dim=-1)).mean()


def task_cost(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """Loss of each input: what stands in for a teacher's divergence where there is none. (B, labels) -> (B,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "regression":
        return (logits - labels.view_as(logits)).square().mean(-1)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(-1)
    return F.cross_entropy(logits, labels.view(-1), reduction="none")  # 0 where a label is ignored


def need_loss(need: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted need, told what the present budget really cost each input.

    The inputs of a training batch share their budget, so what differs is the inputs' own: the logarithm of the cost,
    standardised within the batch.

    Args:
        need: (B, layers), what each layer's controller predicts.
        cost: (B,) >= 0, a constant here: `teacher_divergence` or `task_cost`.

    Returns:
        Scalar; with a single input nothing can be compared, and need is drawn to 0.
    """
    target = (cost.detach() + 1e-3).log()
    target = target - target.mean()
    if len(target) > 1:
        target = target / (target.std() + 1e-6)
    return (need - target[:, None]).square().mean()


def score_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the relevance distribution softmax(scores), in [0, 1]: 1 is uniform over the heads.

    Args:
        scores: (..., H), float.
    """
    if scores.shape[-1] == 1:
        return scores.sum() * 0.0
    log_relevance = scores.log_softmax(-1)
    return -(log_relevance.exp() * log_relevance).sum(-1).mean() / math.log(scores.shape[-1])


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_like = torch.ones_like(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.loss_like


def attach_loss(tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Returns `tensor` unchanged, such that whatever is later computed from it also trains `loss`, at weight one.

    For losses computed outside the model: a Trainer with label smoothing or a `compute_loss_func` takes the labels
    away, so that no loss of ours could reach it otherwise. The outer loss's own scale is unknown here: under gradient
    accumulation the attached term is not divided by the number of micro-batches, and a float16 gradient scaler does
    not scale it.

    Args:
        tensor: Any shape, part of a graph.
        loss: Scalar.
    """
    return _AttachLoss.apply(tensor, loss)
