"""What closed heads save: FLOPs counted part by part, and the measured bound on the time they can save."""

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..packing import find_packing


PARTS = ("embeddings", "projections", "core", "feed_forward", "router", "head")


@dataclass(frozen=True)
class FlopsProfile:
    """FLOPs of one batch by part, 2 for each multiply-add; only matrix products count, as in `FlopCounterMode`.

    Attributes:
        sparse: Of this model without padding and closed heads; keys are `PARTS`. "projections" are query, key, value
            and output, "core" the scores and the weighted sum, "head" the pooler and the classifier.
        backbone: Of the unmodified backbone on the same batch, padding included.
        head_share: Mean share of heads that ran.
        token_share: Share of the padded batch that is kept.
    """

    sparse: dict[str, int]
    backbone: dict[str, int]
    head_share: float
    token_share: float

    @property
    def ratio(self) -> float:
        """FLOPs of this model over those of the backbone."""
        return sum(self.sparse.values()) / sum(self.backbone.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        rows = [(part, self.sparse[part], self.backbone[part]) for part in PARTS]
        rows.append(("total", sum(self.sparse.values()), sum(self.backbone.values())))
        lines = [f"{'GFLOPs':<14}{'this model':>12}{'backbone':>12}{'share':>8}"]
        for part, ours, stock in rows:
            share = f"{ours / stock:>8.1%}" if stock else f"{'-':>8}"
            lines.append(f"{part:<14}{ours / 1e9:>12.4f}{stock / 1e9:>12.4f}{share}")
        return "\n".join([*lines, f"heads run {self.head_share:.1%}, tokens kept {self.token_share:.1%}"])


@dataclass(frozen=True)
class SpeedCeiling:
    """Medians, in seconds, of the packed model with all heads and of what no closed head can spare it.

    Attributes:
        all_heads: With all heads open.
        unavoidable: Without any attention or routing: embeddings, packing, feed-forward, norms and head.
    """

    all_heads: float
    unavoidable: float

    @property
    def ratio(self) -> float:
        """How many times faster closing heads alone can make the packed model at the very most."""
        return self.all_heads / self.unavoidable


def _checked_inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any, torch.Tensor]:
    """The batch without labels, the encoder, and the token ids or embeddings; raises ValueError."""
    encoder: Any = getattr(model, "base_model", None)
    if not hasattr(encoder, "own_budget"):
        raise ValueError(f"model must be a BudgetFormer model, got {type(model).__name__}.")
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode: call model.eval() first.")
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a mapping as a tokenizer returns it, got {type(batch).__name__}.")
    inputs = {name: value for name, value in batch.items() if name != "labels" and value is not None}
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        raise ValueError(
            "batch must hold input_ids or inputs_embeds as a tensor (B, L, ...), got keys "
            f"{sorted(inputs)}: call the tokenizer with return_tensors='pt'."
        )
    return inputs, encoder, tokens


def profile(
    model: nn.Module, batch: Mapping[str, Any], head_budget: float | torch.Tensor | None = None
) -> FlopsProfile:
    """Counts FLOPs for the heads the routers choose on `batch`; runs the model once.

    The count is of the sparse executors (`executor="sparse"`); "auto" may compute more where that is faster.

    Args:
        model: A BudgetFormer model in eval mode.
        batch: `input_ids` (B, L) or `inputs_embeds` (B, L, D), with `attention_mask` (B, L) and the rest of what
            `forward` takes; labels are ignored.
        head_budget: As in `forward`.

    Raises:
        ValueError: An argument is not of that kind.
    """
    inputs, encoder, tokens = _checked_inputs(model, batch)
    with torch.no_grad():
        gates = model(**inputs, head_budget=head_budget, output_head_gates=True).head_gates  # (B, layers, H)
    rows, length = tokens.shape[:2]
    packing = find_packing(inputs.get("attention_mask"), (rows, length), tokens.device)
    lengths = torch.tensor(packing.lengths)
    keys = lengths.clone()
    if packing.padded_first:
        keys[-packing.padded_first :] -= 1
    counts = packing.sort(gates.sum(-1).round().long()).cpu()  # (B, layers), open heads

    config = encoder.config
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    size, kept = width // heads, int(lengths.sum())
    opened = counts.sum(-1)
    asked = config.head_budget if head_budget is None else head_budget
    routed = not config.static_heads and (asked is None or not bool((torch.as_tensor(asked) == 1.0).all()))
    feed_forward = 4 * layers * width * config.intermediate_size
    controller = config.router_hidden_size * (width + 1)
    # Beyond the layers every matrix is applied once to each input: to its pooled or its first token.
    outside = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layer." not in name]
    head = 2 * rows * sum(module.weight.numel() for module in outside)
    return FlopsProfile(
        sparse={
            "embeddings": 0,
            "projections": 8 * width * size * int((opened * lengths).sum()),
            "core": 4 * size * int((opened * lengths * keys).sum()),
            "feed_forward": feed_forward * kept,
            "router": 2 * rows * layers * (controller + width * heads) * routed,
            "head": head,
        },
        backbone={
            "embeddings": 0,
            "projections": 8 * layers * width * width * rows * length,
            "core": 4 * layers * width * rows * length * length,
            "feed_forward": feed_forward * rows * length,
            "router": 0,
            "head": head,
        },
        head_share=gates.float().mean().item(),
        token_share=kept / (rows * length),
    )


def speed_ceiling(model: nn.Module, batch: Mapping[str, Any], repeats: int = 7) -> SpeedCeiling:
    """Measures how much time closing heads could save at most: all of attention, and nothing else.

    Args:
        model: A BudgetFormer model in eval mode, on the sdpa attention implementation.
        batch: As in `profile`.
        repeats: Timed runs of each of the two, taken in turn after one to warm up; the median counts.

    Raises:
        ValueError: An argument is not of that kind.
    """
    inputs, encoder, tokens = _checked_inputs(model, batch)
    if encoder.config._attn_implementation != "sdpa":
        raise ValueError(f"model must use the sdpa attention, got {encoder.config._attn_implementation!r}.")
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be an integer >= 1, got {repeats!r}.")

    def run() -> float:
        start = time.perf_counter()
        model(**inputs, head_budget=1.0, executor="auto")
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # Where the layers found it, for a model loaded from the Hub brings its own code.
    module = inspect.getmodule(type(encoder.encoder.layer[0]))
    skip: Callable[..., torch.Tensor] = lambda attention, output, hidden, *rest: hidden  # noqa: E731
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(repeats + 1):
            times[0].append(run())
            with mock.patch.object(module, "gated_attention", skip):
                times[1].append(run())
    return SpeedCeiling(*(statistics.median(samples[1:]) for samples in times))


__all__ = ["FlopsProfile", "SpeedCeiling", "profile", "speed_ceiling"]
