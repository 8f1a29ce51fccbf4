"""Terms of the training loss beside the task's, as pure functions, and how they join it."""

import math
from typing import Any

import torch
from torch.nn import functional as F


def budget_hinge(mean_budget: torch.Tensor, budget_min: float, budget_max: float) -> torch.Tensor:
    """Distance of the mean budget from [budget_min, budget_max]; zero inside (arXiv 2604.22583).

    Args:
        mean_budget: Scalar, a share of the heads.
        budget_min: Lower bound, a share.
        budget_max: Upper bound, a share.
    """
    return F.relu(budget_min - mean_budget) + F.relu(mean_budget - budget_max)


def budget_distance(mean_budget: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared distance of the mean budget to the one asked for; a mean over the batch, so that inputs may differ.

    Args:
        mean_budget: Scalar, a share of the heads.
        target: Scalar, a share of the heads.
    """
    return (mean_budget - target).square()


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
