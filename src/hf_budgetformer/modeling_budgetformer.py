"""BudgetFormer: BERT-family encoders that choose, for each input and layer, how many attention heads run and which."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertLayer, BertPooler
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import GatedSelfAttention, gated_attention
from .backbones import BACKBONES, max_input_length
from .configuration_budgetformer import EXECUTOR_CHOICES, BudgetFormerConfig, is_share
from .losses import (
    ENTROPY_WEIGHT,
    attach_loss,
    budget_distance,
    budget_hinge,
    need_loss,
    score_entropy,
    task_cost,
    teacher_divergence,
)
from .packing import Packing, find_packing
from .routing import (
    ExplorationSchedule,
    GateLinear,
    HeadRouter,
    OwnBudget,
    Routing,
    budget_to_logit,
    least_budget,
    pool_packed_tokens,
    pool_tokens,
)


# Sent along by Trainer, pipelines and decorators; none of them changes what an encoder computes.
_UNUSED_KWARGS = frozenset({"num_items_in_batch", "output_attentions", "output_hidden_states", "use_cache"})


# Tokens the feed-forward layers take at a time at inference, so that what lies between the two stays in the cache: 5 to
# 10% faster on a CPU than all at once, and less memory.
_CHUNK_TOKENS = 1024


@dataclass
class BudgetFormerModelOutput(BaseModelOutputWithPooling):
    """Stock encoder output, and what the routers did.

    Args:
        head_budget: (B,), float: share of all heads that each input really used, the mean of its gates.
        head_gates: (B, layers, H), float, on request: 1 for an open head, 0 for a closed one.
        aux_loss: Scalar, while training: the routers' terms of the loss, weighted.
        need: (B, layers), float, while training: what each layer predicts a low budget to cost each input, in
            standard deviations.
    """

    head_budget: torch.Tensor | None = None
    head_gates: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    need: torch.Tensor | None = None


@dataclass
class BudgetFormerClassifierOutput(SequenceClassifierOutput):
    """Stock classifier output, and what the routers did; `loss` includes `aux_loss` while training.

    Args:
        head_budget: (B,), float: share of all heads that each input really used, the mean of its gates.
        head_gates: (B, layers, H), float, on request: 1 for an open head, 0 for a closed one.
        aux_loss: Scalar, while training: the routers' terms of the loss, weighted.
    """

    head_budget: torch.Tensor | None = None
    head_gates: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def _values_are_known() -> bool:
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _check_inputs(
    config: BudgetFormerConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    unknown: dict[str, Any],
) -> tuple[int, int]:
    """Raises on input that the encoder would not survive or would ignore; returns batch size and length."""
    if unknown.pop("head_mask", None) is not None:
        raise TypeError("head_mask no longer exists in transformers 5: pass head_budget, the share of heads to run.")
    unexpected = sorted(unknown.keys() - _UNUSED_KWARGS)
    if unexpected:
        raise TypeError(f"unexpected keyword arguments {unexpected}: see the signature of forward.")
    given = {name: x for name, x in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)) if x is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {list(given) or 'neither'}.")
    [(name, tensor)] = given.items()
    batch, length = tensor.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"{name} must hold at least one input of at least one token, got shape {tuple(tensor.shape)}.")
    longest = max_input_length(config)
    if position_ids is None and length > longest:
        raise ValueError(
            f"{name} must be at most {longest} tokens long (config.max_position_embeddings), got {length}: tokenize "
            f"with truncation=True, max_length={longest}."
        )
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must have shape ({batch}, {length}), one value per token, got "
            f"{tuple(attention_mask.shape)}."
        )
    return batch, length


def _check_head_budget(head_budget: float | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """Returns the requested shares as (B,) float; raises ValueError naming value and range."""
    allowed = f"head_budget must be a share of the heads, a float in (0, 1] or a float tensor of shape ({batch},)"
    if not isinstance(head_budget, torch.Tensor):
        if not is_share(head_budget):
            raise ValueError(f"{allowed}, got {head_budget!r}.")
        return torch.full((batch,), head_budget, device=device)
    if not head_budget.is_floating_point() or head_budget.shape != (batch,):
        raise ValueError(f"{allowed}, got a {head_budget.dtype} tensor of shape {tuple(head_budget.shape)}.")
    if _values_are_known() and not ((head_budget > 0) & (head_budget <= 1)).all():
        raise ValueError(f"{allowed}, got {head_budget}.")
    return head_budget.to(device, torch.promote_types(head_budget.dtype, torch.float32))


class BudgetFormerPreTrainedModel(PreTrainedModel):
    """What all BudgetFormer models share: weights' names, initialisation, saving and loading."""

    config: BudgetFormerConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # Without it Trainer leaves the loss undivided under gradient accumulation, since forward takes **kwargs.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["BertEmbeddings", "RobertaEmbeddings", "BudgetFormerLayer"]

    def __init__(self, config: BudgetFormerConfig) -> None:
        # By name, for a configuration loaded from the Hub is of another module than this one.
        if getattr(config, "model_type", None) != BudgetFormerConfig.model_type:
            raise TypeError(
                f"config must be a BudgetFormerConfig, got {type(config).__name__}: build one with "
                "BudgetFormerConfig.from_backbone_config(config)."
            )
        config.validate()
        super().__init__(config)
        # The loader asks the instance: stock checkpoints of either architecture then match without renaming.
        self.base_model_prefix = BACKBONES[config.backbone_model_type].prefix

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GateLinear):
            init.normal_(module.weight, std=module.initial_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, OwnBudget):
            init.constant_(module.bias, module.initial / module.multiplier)
        elif isinstance(module, ExplorationSchedule):
            init.zeros_(module.steps)
        else:
            super()._init_weights(module)
            if isinstance(module, BACKBONES[self.config.backbone_model_type].embeddings):
                positions, types = module.get_buffer("position_ids"), module.get_buffer("token_type_ids")
                init.copy_(positions, torch.arange(positions.shape[-1]).expand((1, -1)))
                init.zeros_(types)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As upstream; takes BudgetFormer checkpoints and plain ones of a supported backbone, by Hub id or folder.

        Fields of [`BudgetFormerConfig`] may be given as keyword arguments.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Names of old checkpoints are brought up to date once. Upstream would write the old ones again, which
        # Trainer, whose resuming renames nothing, then skips in silence.
        model._weight_conversions = []
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream; the folder also holds this code, so that it loads where the package is not installed."""
        # Upstream names only the class that is saved. Entries that still point to a repository are replaced too.
        self.config.auto_map = {
            "AutoConfig": "configuration_budgetformer.BudgetFormerConfig",
            "AutoModel": "modeling_budgetformer.BudgetFormerModel",
            "AutoModelForSequenceClassification": "modeling_budgetformer.BudgetFormerForSequenceClassification",
        }
        kind = type(self)
        # Sharding makes a class of torch's on top; the code to save is that of the class below.
        self.__class__ = next(below for below in kind.__mro__ if not below.__module__.startswith("torch."))
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = kind


@dataclass(frozen=True)
class PaddedLayout:
    """What a padded batch needs beside its hidden states.

    Args:
        attention_mask: As the attention implementation wants it.
        token_mask: (B, L), 1 for real tokens.
    """

    attention_mask: torch.Tensor | None
    token_mask: torch.Tensor


class BudgetFormerLayer(BertLayer):
    """Stock transformer layer whose attention is gated by a router of its own, or cut down to its static heads."""

    def __init__(self, config: BudgetFormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.heads = config.num_attention_heads
        self.static_heads = None if config.static_heads is None else config.static_heads[layer_idx]
        self.attention.self = GatedSelfAttention(config, layer_idx=layer_idx)
        self.router = HeadRouter(config) if self.static_heads is None else None
        if self.static_heads is not None:
            output = self.attention.output
            output.dense = self.attention.self.keep_heads(len(self.static_heads), output.dense)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: "PaddedLayout | Packing",
        executor: str,
        budget_logit: torch.Tensor | None,
        temperature: torch.Tensor | float,
        noise: torch.Tensor | float,
        carry: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Routes, attends and feeds forward. Keeps nothing: under gradient checkpointing it runs twice.

        Args:
            hidden_states: (B, L, D), or packed (T, D).
            layout: The batch's masks, or its packing.
            executor: Of a packed batch, see `gated_attention`.
            budget_logit: (B,), the budget asked for; None: all heads, and nothing is routed.
            temperature: Scalar.
            noise: Scalar.
            carry: (B,), see `Routing`.

        Returns:
            hidden states as they came, and the fields of a `Routing`.
        """
        output = self.attention.output
        routing = self._route(hidden_states, layout, budget_logit, temperature, noise, carry)
        gates = routing.gates if self.static_heads is None else None
        if isinstance(layout, Packing):
            projected = gated_attention(self.attention.self, output.dense, hidden_states, layout, gates, executor)
            attended = output.LayerNorm(output.dropout(projected) + hidden_states)
            return self._feed_forward_packed(attended), *routing
        context, _ = self.attention.self(hidden_states, layout.attention_mask, gates=gates)
        fed_forward = apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, output(context, hidden_states)
        )
        return fed_forward, *routing

    def _route(
        self,
        hidden_states: torch.Tensor,
        layout: "PaddedLayout | Packing",
        budget_logit: torch.Tensor | None,
        temperature: torch.Tensor | float,
        noise: torch.Tensor | float,
        carry: torch.Tensor,
    ) -> Routing:
        if self.router is None or budget_logit is None:
            kept = range(self.heads) if self.static_heads is None else self.static_heads
            gates = carry.new_zeros(carry.shape[0], self.heads)
            gates[:, kept] = 1.0
            return Routing(gates, gates.mean(-1), gates, carry, carry)
        if isinstance(layout, Packing):
            pooled = pool_packed_tokens(hidden_states, layout)
        else:
            pooled = pool_tokens(hidden_states, layout.token_mask)
        routing: Routing = self.router(pooled, budget_logit, carry, temperature, noise)
        return routing

    def _feed_forward_packed(self, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or len(hidden) <= _CHUNK_TOKENS:
            return self.feed_forward_chunk(hidden)
        return torch.cat([self.feed_forward_chunk(chunk) for chunk in hidden.split(_CHUNK_TOKENS)])


class BudgetFormerEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: BudgetFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BudgetFormerLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(self, hidden_states: torch.Tensor, *shared: Any, carry: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Hidden states (B, L, D) or (T, D), whatever every layer takes beside them, and the first layer's carry (B,).

        Returns:
            hidden states as they came, and the layers' routings, stacked: gates (B, layers, H), budget (B, layers)...
        """
        routed = []
        for layer in self.layer:
            hidden_states, *parts = layer(hidden_states, *shared, carry)
            routed.append(Routing(*parts))
            carry = routed[-1].carry
        return hidden_states, Routing(*(torch.stack(parts, dim=1) for parts in zip(*routed, strict=True)))


class BudgetFormerModel(BudgetFormerPreTrainedModel):
    """Encoder of a BERT-family checkpoint with a head router in every layer (arXiv 2604.22583).

    Args:
        config: The configuration.
        add_pooling_layer: Whether to build the pooler, as in the stock classes.

    Attributes:
        training_log: Scalars of the last training forward pass, detached, by name: what `BudgetCallback` logs.
    """

    _can_record_outputs = {"hidden_states": BudgetFormerLayer, "attentions": GatedSelfAttention}

    def __init__(self, config: BudgetFormerConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings: Any = BACKBONES[config.backbone_model_type].embeddings(config)
        self.encoder = BudgetFormerEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        static = config.static_heads is not None
        self.own_budget: Any = None if static else OwnBudget(config)
        self.exploration: Any = None if static else ExplorationSchedule(config)
        self.training_log: dict[str, torch.Tensor] = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings."""
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        head_budget: float | torch.Tensor | None = None,
        output_head_gates: bool = False,
        executor: str | None = None,
        **kwargs: Any,
    ) -> BudgetFormerModelOutput:
        """Encodes a batch, running only the heads the routers open.

        Args:
            input_ids: (B, L), int64; or else `inputs_embeds`.
            attention_mask: (B, L), 1 for real tokens and 0 for padding, on whichever side; None: no padding.
            token_type_ids: (B, L), int64.
            position_ids: (B, L), int64.
            inputs_embeds: (B, L, D), float.
            head_budget: Share of all heads asked for, a float in (0, 1] or a float tensor (B,); it is spread over the
                layers as the routers see fit. None: `config.head_budget`, or else the model's own.
            output_head_gates: Whether to return `head_gates`.
            executor: "auto", "sparse" or "masked", see [`BudgetFormerConfig`]; None: `config.executor`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in the stock classes.

        Raises:
            ValueError: An argument's shape or value is not allowed.
            TypeError: An argument does not exist.
        """
        batch, length = _check_inputs(self.config, input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        executor = self._check_executor(executor)
        if head_budget is None:
            head_budget = self.config.head_budget
        if head_budget is not None and self.own_budget is None:
            raise ValueError(f"head_budget must be None, the heads of this model are static; got {head_budget!r}.")
        requested = None if head_budget is None else _check_head_budget(head_budget, batch, self.device)

        hidden_states = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        packing = None
        if executor != "masked" and self._can_pack(kwargs):
            packing = find_packing(attention_mask, (batch, length), hidden_states.device)
        outputs = self._encode(hidden_states, attention_mask, packing, executor, requested, **kwargs)
        if packing is not None and outputs.hidden_states is not None:
            outputs.hidden_states = tuple(x if x.dim() == 3 else packing.unpack(x) for x in outputs.hidden_states)
        outputs.head_gates = outputs.head_gates if output_head_gates else None
        return outputs

    def _check_executor(self, executor: str | None) -> str:
        if executor is None:
            return self.config.executor
        if executor not in EXECUTOR_CHOICES:
            raise ValueError(f"executor must be one of {list(EXECUTOR_CHOICES)}, got {executor!r}.")
        return executor

    def _can_pack(self, asked: dict[str, Any]) -> bool:
        recorded = asked.get("output_attentions", getattr(self.config, "output_attentions", False))
        return _values_are_known() and self.config._attn_implementation == "sdpa" and not recorded

    @capture_outputs
    def _encode(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packing: Packing | None,
        executor: str,
        requested: torch.Tensor | None,
        **kwargs: Any,
    ) -> BudgetFormerModelOutput:
        batch, length = hidden_states.shape[:2]
        learning = self.training and torch.is_grad_enabled() and self.own_budget is not None
        budget_logit, target, sampled = self._ask(requested, batch)
        temperature, noise = (1.0, 0.0) if self.exploration is None else self.exploration()
        carry = hidden_states.new_full((batch,), 0.5, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        if self.training:
            carry = torch.rand_like(carry)
        layout: PaddedLayout | Packing
        if packing is None:
            token_mask = hidden_states.new_ones(batch, length) if attention_mask is None else attention_mask
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
            layout = PaddedLayout(mask, token_mask)
        else:
            layout, hidden_states, carry = packing, packing.pack(hidden_states), packing.sort(carry)
            budget_logit = None if budget_logit is None else packing.sort(budget_logit)
        hidden_states, routing = self.encoder(
            hidden_states, layout, executor, budget_logit, temperature, noise, carry=carry
        )
        gates, need = routing.gates, routing.need
        if packing is not None:
            hidden_states, gates, need = packing.unpack(hidden_states), packing.unsort(gates), packing.unsort(need)
        aux_loss = self._aux_loss(routing, target, sampled) if learning else None
        return BudgetFormerModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
            head_budget=gates.detach().mean((1, 2)),
            head_gates=gates,
            aux_loss=aux_loss,
            need=need if learning else None,
        )

    def _ask(
        self, requested: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The budget to aim for: a logit (B,), the mean share (1,) to train towards, whether it is a request (1,).

        The logit is None where all heads run and nothing is learned: there is nothing to route.
        """
        if self.own_budget is None:
            everything = torch.ones(1, device=self.device)
            return None, everything, everything.bool()
        own, least = self.own_budget(), least_budget(self.config)
        if requested is not None:
            mean, everything = requested.mean(0, keepdim=True), torch.ones_like(own).bool()
            if not self.training and _values_are_known() and bool((requested == 1.0).all()):
                return None, mean, everything
            # The own budget stays in the graph, or distributed training would wait for its gradient.
            return budget_to_logit(requested, least) + 0.0 * own, mean, everything
        target = torch.full_like(own, self.config.target_head_budget or 0.0)
        if not self.training:
            return own.expand(batch), target, torch.zeros_like(own).bool()
        draw, which = torch.rand(2, 1, device=own.device, dtype=own.dtype)
        sampled = which < self.config.budget_sampling
        # In (1/H, 1], most of all low: starting from a trained backbone, it is there that there is most to learn.
        share = self.config.num_attention_heads ** -draw.sqrt()
        logit = torch.where(sampled, budget_to_logit(share, least), own)
        return logit.expand(batch), torch.where(sampled, share, target), sampled

    def _aux_loss(self, routing: Routing, target: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        config, exploration = self.config, self.exploration
        spent, entropy, progress = routing.budget.mean(), score_entropy(routing.scores), exploration.progress()
        if config.target_head_budget is None:
            budget_loss = torch.where(sampled, budget_distance(spent, target.clamp(min=1e-6)), budget_hinge(spent))
        else:
            budget_loss = budget_distance(spent, target)
        budget_loss = budget_loss.mean()
        self.training_log = {
            "budget": spent.detach(),
            "budget_loss": budget_loss.detach(),
            "entropy": entropy.detach(),
            "temperature": exploration()[0].detach(),
            "progress": progress.detach(),
            **{f"heads/layer_{n:02}": x for n, x in enumerate(routing.gates.detach().mean((0, 2)))},
        }
        exploration.steps += 1
        aux_loss = config.budget_loss_weight * budget_loss + 0.0 * routing.need.sum()  # in the graph, whoever trains it
        if config.gate_type == "soft":  # the paper's: rewarded while exploring, penalised while exploiting
            aux_loss = aux_loss + ENTROPY_WEIGHT * (2.0 * progress - 1.0) * entropy
        return aux_loss


class BudgetFormerForSequenceClassification(BudgetFormerPreTrainedModel):
    """BudgetFormer with the backbone's own classification head: labels for whole inputs, or a regression.

    The head and its parameters' names are those of the stock class, so that checkpoints go both ways.
    """

    def __init__(self, config: BudgetFormerConfig) -> None:
        super().__init__(config)
        self.num_labels: Any = config.num_labels  # typed as optional upstream
        backbone = BACKBONES[config.backbone_model_type]
        setattr(self, backbone.prefix, BudgetFormerModel(config, add_pooling_layer=backbone.reads_pooler))
        self.classifier = backbone.classifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
        head_budget: float | torch.Tensor | None = None,
        output_head_gates: bool = False,
        executor: str | None = None,
        **kwargs: Any,
    ) -> BudgetFormerClassifierOutput:
        """Classifies a batch; arguments and errors as in [`BudgetFormerModel.forward`], and labels.

        Args:
            input_ids: (B, L), int64; or else `inputs_embeds`.
            attention_mask: (B, L), 1 for real tokens and 0 for padding; None: no padding.
            token_type_ids: (B, L), int64.
            position_ids: (B, L), int64.
            inputs_embeds: (B, L, D), float.
            labels: As in the stock classes: (B,) int64 in [0, num_labels) for one label per input (-100 is ignored),
                (B, num_labels) float for several, (B,) float for a regression with num_labels=1.
            teacher_logits: (B, num_labels), float: what another model, usually the fine-tuned backbone, says of these
                inputs (see `tools.training.add_teacher_logits`). While training, `config.distillation_weight` of the
                loss is the divergence from them; ignored at inference.
            head_budget: Share of all heads asked for, a float in (0, 1] or a float tensor (B,).
            output_head_gates: Whether to return `head_gates`.
            executor: "auto", "sparse" or "masked", see [`BudgetFormerConfig`]; None: `config.executor`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in the stock classes.
        """
        if labels is not None:
            self._check_labels(labels)
        encoder: Any = self.base_model
        outputs = encoder(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            head_budget=head_budget,
            output_head_gates=output_head_gates,
            executor=executor,
            return_dict=True,
            **kwargs,
        )
        if teacher_logits is not None:
            self._check_teacher_logits(teacher_logits, len(outputs.last_hidden_state))
        reads_pooler = BACKBONES[self.config.backbone_model_type].reads_pooler
        logits = self.classifier(outputs.pooler_output if reads_pooler else outputs.last_hidden_state)

        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        aux_loss = outputs.aux_loss
        if self.training and torch.is_grad_enabled():
            loss, aux_loss = self._training_loss(loss, aux_loss, logits, labels, teacher_logits, outputs.need)
            if loss is None and aux_loss is not None:
                logits = attach_loss(logits, aux_loss)
        return BudgetFormerClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            head_budget=outputs.head_budget,
            head_gates=outputs.head_gates,
            aux_loss=aux_loss,
        )

    def _training_loss(
        self,
        loss: torch.Tensor | None,
        aux_loss: torch.Tensor | None,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        teacher_logits: torch.Tensor | None,
        need: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss with all its terms, None without labels, and the terms that are not the task's."""
        encoder: Any = self.base_model
        log = encoder.training_log
        problem_type = self.config.problem_type or ("regression" if self.num_labels == 1 else "")
        if loss is not None:
            log["task_loss"] = loss.detach()
        cost = None if labels is None else task_cost(logits.detach(), labels, problem_type)
        if teacher_logits is not None:
            cost = teacher_divergence(logits, teacher_logits, problem_type)
            log["distillation_loss"] = cost.detach().mean()
            distilled = self.config.distillation_weight * cost.mean()
            aux_loss = distilled if aux_loss is None else aux_loss + distilled
            loss = None if loss is None else (1.0 - self.config.distillation_weight) * loss
        if need is not None and cost is not None and self.config.need_scale:
            regression = need_loss(need, cost)
            log["need_loss"] = regression.detach()
            aux_loss = regression if aux_loss is None else aux_loss + regression
        return loss if loss is None or aux_loss is None else loss + aux_loss, aux_loss

    def _check_teacher_logits(self, teacher_logits: torch.Tensor, batch: int) -> None:
        if teacher_logits.shape != (batch, self.num_labels) or not teacher_logits.is_floating_point():
            raise ValueError(
                f"teacher_logits must be a float tensor of shape ({batch}, {self.num_labels}), one value for each "
                f"input and label, got {teacher_logits.dtype} of shape {tuple(teacher_logits.shape)}."
            )

    def _check_labels(self, labels: torch.Tensor) -> None:
        one_of_many = self.num_labels > 1 and labels.dtype in (torch.int64, torch.int32)
        if not one_of_many or self.config.problem_type not in (None, "single_label_classification"):
            return
        if _values_are_known() and not (((labels >= 0) & (labels < self.num_labels)) | (labels == -100)).all():
            raise ValueError(
                f"labels must be in [0, {self.num_labels}) or -100 to be ignored, got {labels.tolist()}: set "
                "num_labels when loading the model."
            )


__all__ = [
    "BudgetFormerForSequenceClassification",
    "BudgetFormerModel",
    "BudgetFormerPreTrainedModel",
]
