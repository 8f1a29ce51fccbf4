"""BudgetFormer: a BERT-family encoder, unchanged, and a narrow one beside it that answers the easy inputs."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention import EVERYTHING, Reach, packed_kind
from .backbones import BACKBONES, LayerNames, max_input_length, stock_config
from .budgets import FULL_LOOK, Look, Plan, confidence, has_confidence, plan_budget, plan_looks, problem_type
from .configuration_budgetformer import EXECUTOR_CHOICES, BudgetFormerConfig, is_share
from .losses import attach_loss, hidden_divergence, teacher_divergence
from .narrow import Importance, NarrowEncoder, copy_parameters
from .packing import PackedBatch, PaddedBatch, find_packing
from .positions import extend_positions
from .relevance import RoutedEncoder, Routing


logger = logging.get_logger(__name__)

# What tokenizers, collators, Trainer, pipelines and decorators send along; none of it changes what an encoder computes.
_IGNORED = frozenset({
    "length", "num_items_in_batch", "num_truncated_tokens", "offset_mapping", "output_attentions",
    "output_hidden_states", "overflow_to_sample_mapping", "overflowing_tokens", "special_tokens_mask", "use_cache",
})  # fmt: skip
_GONE = {
    "head_mask": "head_mask no longer exists in transformers 5: pass budget, the share of the work to do.",
    "head_budget": "head_budget is of hf_budgetformer 0.1: write budget=, the share of the full encoder's work.",
}

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


@dataclass
class BudgetFormerModelOutput(BaseModelOutputWithPooling):
    """Stock encoder output, and what was spent.

    Args:
        budget: (B,), float: share of the full encoder's work that each input took, all its looks together; with
            `router="layer"` the share of the heads that ran.
        head_gates: (B, layers, H), float, on request, with `router="layer"`: 1 for an open head, 0 for a closed one.
        loss: While training with `config.freeze_full`, the narrow encoder's divergence from the full one, a scalar.
    """

    budget: torch.Tensor | None = None
    head_gates: torch.Tensor | None = None
    loss: torch.Tensor | None = None


@dataclass
class BudgetFormerClassifierOutput(SequenceClassifierOutput):
    """Stock classifier output, and what was spent, as in `BudgetFormerModelOutput`."""

    budget: torch.Tensor | None = None
    head_gates: torch.Tensor | None = None


@dataclass
class BudgetFormerTokenClassifierOutput(TokenClassifierOutput):
    """Stock output of a token classifier, and what was spent, as in `BudgetFormerModelOutput`."""

    budget: torch.Tensor | None = None


@dataclass
class BudgetFormerMultipleChoiceOutput(MultipleChoiceModelOutput):
    """Stock output of a choice, and what was spent, as in `BudgetFormerModelOutput`."""

    budget: torch.Tensor | None = None


@dataclass
class BudgetFormerQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """Stock output of spans, and what was spent, as in `BudgetFormerModelOutput`."""

    budget: torch.Tensor | None = None


@dataclass
class Embedded:
    """A batch behind the embeddings.

    Args:
        hidden: Hidden states, packed (T, D) or padded (B, L, D).
        batch: How they lie.
        rows: How many inputs are answered; each is `choices` sequences, one after the other.
        mask: (B, L) as it was given, or None.
        positions: Of the tokens, (T,) or (1 or B, L) int64, where layers need them; else None.
        masked: Whether closed units are to be computed and multiplied by zero.
        choices: Sequences of an input.
    """

    hidden: torch.Tensor
    batch: PackedBatch | PaddedBatch
    rows: int
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    masked: bool = False
    choices: int = 1

    def select(self, rows: torch.Tensor) -> "Embedded":
        """The inputs `rows` (b,) int64, distinct, alone."""
        count, rows = len(rows), rows.to(self.hidden.device)
        if self.choices > 1:
            rows = (rows[:, None] * self.choices + torch.arange(self.choices, device=rows.device)).flatten()
        hidden, batch = self.batch.select(self.hidden, rows)
        positions = self.positions
        if positions is not None and (positions.dim() == 1 or len(positions) > 1):
            positions, _ = self.batch.select(positions, rows)
        mask = None if self.mask is None else self.mask[rows.to(self.mask.device)]
        return Embedded(hidden, batch, count, mask, positions, self.masked, self.choices)

    def detach(self) -> "Embedded":
        """Cut off from the embeddings' gradient."""
        return replace(self, hidden=self.hidden.detach())


class _Answered:
    """A model whose encoder has answered already: what the stock class's forward does with it is what stands behind.

    Args:
        model: Whose parts and configuration are used.
        outputs: What the encoder says.
        parts: Modules in place of the model's, by name.
    """

    def __init__(self, model: Any, outputs: BaseModelOutputWithPooling, parts: Mapping[str, nn.Module]) -> None:
        self._model = model
        vars(self).update(parts)
        setattr(self, model.base_model_prefix, lambda *_, **__: outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _values_are_known() -> bool:
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _check_inputs(
    config: BudgetFormerConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    unknown: dict[str, Any],
) -> None:
    """Raises on input that the encoder would not survive or would ignore."""
    for name in _GONE.keys() & unknown.keys():
        if unknown.pop(name) is not None:
            raise TypeError(_GONE[name])
    unexpected = sorted(unknown.keys() - _IGNORED)
    if unexpected:
        raise TypeError(f"unexpected keyword arguments {unexpected}: see the signature of forward.")
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {got}.")
    name, tensor = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    batch, length = tensor.shape[:2]  # type: ignore[union-attr]
    if batch == 0 or length == 0:
        raise ValueError(f"{name} must hold at least one input of at least one token, got {batch} of {length}.")
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


def _check_budget(budget: Any, batch: int) -> None:
    """Raises ValueError naming value and range."""
    if not isinstance(budget, torch.Tensor):
        if is_share(budget):
            return
        got = repr(budget)
    elif not budget.is_floating_point() or budget.shape != (batch,):
        got = f"a {budget.dtype} tensor of shape {tuple(budget.shape)}"
    elif _values_are_known() and not ((budget > 0) & (budget <= 1)).all():
        got = str(budget)
    else:
        return
    raise ValueError(f"budget must be a float in (0, 1] or a float tensor of shape ({batch},), got {got}.")


class BudgetFormerPreTrainedModel(PreTrainedModel):
    """What all BudgetFormer models share: the stock parts, birth of the narrow encoder, saving, loading, looks."""

    config: BudgetFormerConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # Without it Trainer leaves the loss undivided under gradient accumulation, since forward takes **kwargs.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["RoutedLayer", "NarrowLayer"]
    # Of a task, by their configuration.
    stock_classes: ClassVar[Mapping[Any, Any]] = MODEL_MAPPING

    narrow: NarrowEncoder | None

    def __init__(self, config: BudgetFormerConfig, **kwargs: Any) -> None:
        # By name, for a configuration loaded from the Hub is of another module than this one.
        if getattr(config, "model_type", None) != BudgetFormerConfig.model_type:
            raise TypeError(
                f"config must be a BudgetFormerConfig, got {type(config).__name__}: build one with "
                "BudgetFormerConfig.from_backbone_config(config)."
            )
        config.validate()
        if not config.full_encoder and config.router == "layer":
            raise ValueError("full_encoder must be True with router='layer', got False.")
        super().__init__(config)
        self.backbone = BACKBONES[config.backbone_model_type]
        if config.router == "layer" and self.backbone.names != LayerNames():
            raise ValueError(
                f"router must be 'look' for a backbone of type {config.backbone_model_type!r}, got 'layer': the "
                "paper's routers are built into BERT's layers."
            )
        self.training_log: dict[str, torch.Tensor] = {}
        self._adopt(**kwargs)
        self.post_init()
        if self.narrow is not None and config.full_encoder and not self.narrow.steps.is_meta:
            self.init_narrow()
        self._freeze()

    def _adopt(self, **kwargs: Any) -> None:
        """Takes over the parts of the stock model, under their names, and builds the narrow encoder."""
        config, backbone = self.config, self.backbone
        # Where layers are of several types, an encoder without any is refused.
        bare = {"num_hidden_layers": 0 if backbone.rotary is None else 1}
        stock: Any = self._build_stock(kwargs, **({} if config.full_encoder else bare))
        self.stock_class = type(stock)
        # The loader asks the instance: stock checkpoints of any architecture then match without renaming.
        prefix = self.base_model_prefix = stock.base_model_prefix
        base = getattr(stock, prefix, stock)
        parts = dict(stock.named_children()) if config.full_encoder and base is not stock else {prefix: base}
        for name, part in parts.items():
            setattr(self, name, part)
        if not config.full_encoder:
            for name in dict(base.named_children()).keys() - {*backbone.embeddings, backbone.rotary}:
                setattr(base, name, None)
            if backbone.rotary:
                rotary = type(getattr(base, backbone.rotary))(config=stock_config(config))
                setattr(base, backbone.rotary, rotary)
        elif config.router == "layer":
            base.encoder = RoutedEncoder(config)
        else:
            for layer in self.full_layers():
                kind: Any = type(layer)
                layer.__class__ = packed_kind(kind, config.backbone_model_type, config.num_attention_heads)
        self.narrow = None
        if config.router == "look":
            # Its head is the stock one, made without an encoder.
            least: Any = dict.fromkeys(name for name in vars(config) if name.endswith("_token_id"))
            least |= {"vocab_size": 1, "pad_token_id": 0, "max_position_embeddings": 1, "type_vocab_size": 1}
            small: Any = self._build_stock(kwargs, **bare, **least)
            pooler = getattr(getattr(small, prefix, small), "pooler", None)
            head = {name: part for name, part in small.named_children() if name != prefix}
            self.narrow = NarrowEncoder(config, pooler, None if base is stock else head)

    def _build_stock(self, kwargs: dict[str, Any], **changes: Any) -> Any:
        stock = stock_config(self.config, **changes)
        kind = self.stock_classes[type(stock)]
        known = inspect.signature(kind.__init__).parameters
        return kind(stock, **{name: value for name, value in kwargs.items() if name in known})

    def full_layers(self) -> Any:
        """The full encoder's layers."""
        return attrgetter(self.backbone.layers)(self.base_model)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NarrowEncoder):
            init.zeros_(module.steps)
        else:  # those of the stock parts initialise their own
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        base: Any = self.base_model
        return base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings."""
        base: Any = self.base_model
        base.set_input_embeddings(value)

    def get_position_embeddings(self) -> nn.Embedding | tuple[nn.Embedding]:
        """The position table.

        Raises:
            ValueError: The backbone has none, for its positions are rotations.
        """
        if self.backbone.rotary is not None:
            raise ValueError(f"a backbone of type {self.config.backbone_model_type!r} has no position table.")
        embeddings: Any = getattr(self.base_model, self.backbone.embeddings[0])
        table: nn.Embedding = embeddings.position_embeddings
        return table

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Makes room for longer inputs, see [`positions.extend_positions`]."""
        extend_positions(self, new_num_position_embeddings)

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, max_position_embeddings: int | None = None, **kwargs: Any
    ) -> Any:
        """As upstream; takes BudgetFormer checkpoints and plain ones of a supported backbone, by Hub id or folder.

        A plain checkpoint's narrow encoder is born from it: a copy of its most important units, by the norms of their
        weights. Fields of [`BudgetFormerConfig`] may be given as keyword arguments; `max_position_embeddings` extends
        or cuts the position table, see [`positions.extend_positions`].

        Raises:
            ValueError: The checkpoint is one of hf_budgetformer 0.1, or its files are damaged.
        """
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except (SafetensorError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(
                f"pretrained_model_name_or_path must be a checkpoint, got {args[:1]}, whose config.json or weights are "
                f"damaged: {error!r:.500}"
            ) from error
        model, report = loaded
        # Names of old checkpoints are brought up to date once. Upstream would write the old ones again, which
        # Trainer, whose resuming renames nothing, then skips in silence.
        model._weight_conversions = []
        if any(".router." in name or "own_budget" in name for name in report["unexpected_keys"]):
            raise ValueError(
                "pretrained_model_name_or_path is a checkpoint of hf_budgetformer 0.1, whose routers this version does "
                f"not run, got {args[:1]}: load its backbone with the stock class, save it, and load that here."
            )
        lost = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        if model.narrow is not None:
            layers = sum(name.startswith("narrow.layer.") for name in lost)
            if layers == sum(name.startswith("layer.") for name, _ in model.narrow.named_parameters()):
                model.init_narrow()
            elif any(name.startswith(("narrow.pooler.", "narrow.head.")) for name in lost):
                model.copy_head()
        if max_position_embeddings is not None:
            model.resize_position_embeddings(max_position_embeddings)
        model._freeze()
        return (model, report) if output_loading_info else model

    def init_narrow(self, importance: Sequence[Importance] | None = None) -> None:
        """Makes the narrow encoder a copy of the full encoder's most important units, as if it had never been trained.

        Args:
            importance: Of each layer's units; None: by the norms of their weights.

        Raises:
            ValueError: The model has no narrow encoder beside a full one.
        """
        if self.narrow is None or not self.config.full_encoder:
            raise ValueError("model must have a narrow encoder beside a full one (router='look', not cut).")
        self.narrow.copy_units(self.full_layers(), self.backbone.names, importance)
        self.narrow.steps.zero_()
        self.copy_head()

    def copy_head(self) -> None:
        """Copies what stands behind the full encoder's layers: last norm, pooler and head, where there are any."""
        narrow, base, norm = self.narrow, self.base_model, self.backbone.final_norm
        pairs: list[tuple[Any, Any]] = [(narrow.pooler, getattr(base, "pooler", None))]  # type: ignore[union-attr]
        pairs += [(part, getattr(self, name)) for name, part in narrow.head_parts().items()]  # type: ignore[union-attr]
        if norm is not None:
            pairs.append((narrow.norm, getattr(base, norm)))  # type: ignore[union-attr]
        for copy, full in pairs:
            if copy is not None:
                copy_parameters(copy, full)

    def _full_parts(self) -> list[nn.Module]:
        """The full encoder and its head."""
        return [part for name, part in self.named_children() if name != "narrow"]

    def _freeze(self) -> None:
        if self.config.freeze_full and self.narrow is not None and self.config.full_encoder:
            for part in self._full_parts():
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        """As upstream; a frozen full encoder stays without dropout."""
        super().train(mode)
        if mode and self.config.freeze_full and self.narrow is not None and self.config.full_encoder:
            for part in self._full_parts():
                part.train(False)
        return self

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream; the folder also holds this code, so that it loads where the package is not installed."""
        # Upstream names only the class that is saved. Entries that still point to a repository are replaced too.
        self.config.auto_map = {
            "AutoConfig": "configuration_budgetformer.BudgetFormerConfig",
            "AutoModel": "modeling_budgetformer.BudgetFormerModel",
            **{f"AutoModelFor{task}": f"modeling_budgetformer.BudgetFormerFor{task}" for task in TASKS},
        }
        kind = type(self)
        # Sharding makes a class of torch's on top; the code to save is that of the class below.
        self.__class__ = next(below for below in kind.__mro__ if not below.__module__.startswith("torch."))
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = kind

    def is_trained(self) -> bool:
        """Whether the narrow encoder has been trained, by at least a step."""
        return self.narrow is not None and (not self.config.full_encoder or bool(self.narrow.steps > 0))

    # Deciding

    def _check_executor(self, executor: str | None) -> str:
        if executor is None:
            return self.config.executor
        if executor not in EXECUTOR_CHOICES:
            raise ValueError(f"executor must be one of {list(EXECUTOR_CHOICES)}, got {executor!r}.")
        return executor

    def _plan_call(self, recorded: bool) -> Plan:
        """The looks of a plain call."""
        config, narrow = self.config, self.narrow
        if narrow is None:
            return Plan((FULL_LOOK,))
        if not config.full_encoder:
            return Plan((narrow.order.look(config.looks[0]) if config.looks else narrow.widest,))
        if recorded or not _values_are_known():  # of the full encoder; and a graph has no room for doubt
            return Plan((FULL_LOOK,))
        if self.training:  # losses with a gradient cache encode without gradients first, what they then train
            return Plan((FULL_LOOK,))
        if config.looks is None:
            if not self.is_trained():
                logger.warning_once(
                    "The narrow encoder has not been trained yet: a plain call runs the full model alone. Train it, or "
                    "ask for a budget, or set config.looks."
                )
                return Plan((FULL_LOOK,))
            if not has_confidence(config):
                return Plan((FULL_LOOK,))
        plan = plan_looks(config, narrow.order)
        if len(plan.looks) > 1 and not has_confidence(config):
            raise ValueError(
                f"looks must hold one budget for a model whose answers cannot be doubted, got {config.looks}."
            )
        self._warn_untrained(plan)
        return plan

    def _warn_untrained(self, plan: Plan) -> None:
        narrow = plan.looks[0].counts is not None
        if narrow and _values_are_known() and not self.training and not self.is_trained():
            logger.warning_once("The narrow encoder answers, and has not been trained yet: its answers are rough.")

    def _plan(self, budget: float | torch.Tensor | None, recorded: bool) -> Plan | list[Plan]:
        """One plan for all inputs, or one for each."""
        if budget is None:
            return self._plan_call(recorded)
        if self.narrow is None:
            raise ValueError(f"budget must be None, this model has no narrow encoder, got {budget!r}.")
        if not isinstance(budget, torch.Tensor):
            plan = plan_budget(self.config, self.narrow.order, budget)
            self._warn_untrained(plan)
            return plan
        if not _values_are_known():
            raise ValueError("budget must be a float while a graph is made, got a tensor.")
        plans = {share: plan_budget(self.config, self.narrow.order, share) for share in set(budget.tolist())}
        for plan in plans.values():
            self._warn_untrained(plan)
        return [plans[share] for share in budget.tolist()]

    # Running

    def embed(
        self,
        given: Mapping[str, Any],
        budget: Any = None,
        executor: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        choices: int = 1,
    ) -> Embedded:
        """Checks the arguments of `forward`, embeds, and takes padding away where nothing stands against it.

        Args:
            given: `input_ids`, `attention_mask` and so on, as `forward` takes them, (B, L) each.
            budget: As `forward` takes it.
            executor: As `forward` takes it.
            kwargs: Further arguments of `forward`.
            choices: How many of the B sequences, one after the other, are an input.
        """
        given, kwargs = dict(given), dict(kwargs or {})
        mask = given.pop("attention_mask", None)
        input_ids, position_ids, inputs_embeds = (given.get(x) for x in ("input_ids", "position_ids", "inputs_embeds"))
        _check_inputs(self.config, input_ids, mask, position_ids, inputs_embeds, kwargs)
        tokens: Any = inputs_embeds if input_ids is None else input_ids
        rows = tokens.shape[0] // choices
        if budget is not None:
            _check_budget(budget, rows)
        masked = self._check_executor(executor) == "masked"
        stock_attention = self.config._attn_implementation == "sdpa" and not self.recorded(kwargs, "output_attentions")
        if masked or not stock_attention or not _values_are_known():
            batch: PaddedBatch | PackedBatch = PaddedBatch(mask)
            places = position_ids
            if self.backbone.rotary and places is None:
                places = torch.arange(tokens.shape[1], device=tokens.device)[None]
            return Embedded(self._embed_tokens(given), batch, rows, mask, places, masked, choices)
        packing = find_packing(mask, tuple(tokens.shape[:2]), tokens.device)
        if position_ids is None:  # they count from the start of each input, wherever its padding is
            given["position_ids"] = self._positions(tokens, input_ids is None)
        # As one long input, so that padding is not embedded either.
        packed = {
            name: None if x is None else packing.pack(x.expand(*tokens.shape[:2], *x.shape[2:]))[None]
            for name, x in given.items()
        }
        hidden = self._embed_tokens(packed)[0]
        places = packed["position_ids"][0] if self.backbone.rotary else None  # type: ignore[index]
        return Embedded(hidden, packing, rows, mask, places, choices=choices)

    def _embed_tokens(self, given: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        backbone, base = self.backbone, self.base_model
        left_out = {"token_type_ids": not backbone.token_types, "position_ids": backbone.rotary is not None}
        hidden: Any = {name: x for name, x in given.items() if not left_out.get(name)}
        for index, name in enumerate(backbone.embeddings):
            module: Any = getattr(base, name, None)
            if module is not None:
                hidden = module(hidden) if index else module(**hidden)
        return hidden

    def _positions(self, tokens: torch.Tensor, embedded: bool) -> torch.Tensor:
        """Position numbers as the stock embeddings give them, (1, L) or (B, L) int64, of ids or embedded tokens."""
        first = 0
        if self.backbone.positions_follow_padding:
            base: Any = self.base_model
            padding: int = base.embeddings.padding_idx  # Trainer may change the configuration's
            if not embedded:
                real = (tokens != padding).long()
                return real.cumsum(1) * real + padding
            first = padding + 1
        return torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]

    def recorded(self, kwargs: dict[str, Any], name: str) -> bool:
        """Whether `output_attentions` or `output_hidden_states` is asked for; a list of layers counts."""
        requested = kwargs.get(name)
        return bool(getattr(self.config, name, False) if requested is None else requested is not False)

    def recordings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What is to be recorded of the full encoder, as its forward takes it; empty if nothing is."""
        names = [name for name in ("output_hidden_states", "output_attentions") if self.recorded(kwargs, name)]
        if names and self.config.attention_window is not None:
            raise ValueError(
                f"{names[0]} must be False with attention_window: what is recorded is the stock encoder's."
            )
        return {name: kwargs.get(name) or True for name in names}

    def refuse_recording(self, kwargs: dict[str, Any]) -> None:
        """Raises ValueError where hidden states or attentions are asked for and the narrow encoder runs."""
        for name in self.recordings(kwargs):
            raise ValueError(f"{name} are the full encoder's: leave budget out, or ask for 1.0.")

    def stock_inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """Of the arguments of `forward`, those that the stock class takes."""
        skipped = () if self.backbone.token_types else ("token_type_ids",)
        return {name: x for name, x in given.items() if x is not None and name not in skipped}

    def _reaches(self, embedded: Embedded) -> list[Reach]:
        """Of each layer."""
        config: Any = self.config
        if self.backbone.rotary is None:
            window = config.attention_window
            reach = EVERYTHING if window is None else Reach(None, window // 2, first_is_global=True)
            return [reach] * config.num_hidden_layers
        packed = isinstance(embedded.batch, PackedBatch)
        positions: Any = embedded.positions[None] if packed else embedded.positions  # type: ignore[index]
        rotary, reaches = getattr(self.base_model, self.backbone.rotary), {}
        for kind in sorted(set(config.layer_types)):
            turned = rotary(embedded.hidden, positions, kind)
            cos, sin = (x[0] for x in turned) if packed else turned
            reaches[kind] = Reach((cos, sin), config.local_attention // 2 if kind == "sliding_attention" else None)
        return [reaches[kind] for kind in config.layer_types]

    def encode_full(self, embedded: Embedded, first: bool = False) -> torch.Tensor:
        """Hidden states of the full encoder, as they lie.

        Args:
            embedded: The batch.
            first: Whether only the first position of each input is needed, (B, D). A packed batch's last layer runs
                for these alone then; a padded one goes the stock way.
        """
        hidden, batch, base = embedded.hidden, embedded.batch, self.base_model
        layers, reaches = self.full_layers(), self._reaches(embedded)
        if isinstance(batch, PackedBatch):
            for layer, reach in zip(layers, reaches, strict=True):
                last = first and layer is layers[-1]
                hidden = layer(hidden, sequences=batch.sequences, reach=reach, first=last)
        else:
            config: Any = base.config
            make = {"config": config, "inputs_embeds": hidden, "attention_mask": batch.mask}
            everything = create_bidirectional_mask(**make)
            near = None
            if self.backbone.rotary:
                near = create_bidirectional_sliding_window_mask(**make)
            elif self.config.attention_window is not None:
                near = create_bidirectional_mask(**make, and_mask_function=reaches[0].mask_function())
            for layer, reach in zip(layers, reaches, strict=True):
                turned = {} if reach.rotary is None else {"position_embeddings": reach.rotary}
                hidden = layer(hidden, attention_mask=everything if reach.window is None else near, **turned)
        if first:
            hidden = batch.unsort(hidden)
        norm = self.backbone.final_norm
        return hidden if norm is None else getattr(base, norm)(hidden)

    def encode_narrow(self, embedded: Embedded, look: Look, first: bool = False) -> torch.Tensor:
        """Hidden states of the narrow encoder, as they lie.

        Args:
            embedded: The batch.
            look: What is open.
            first: Whether only the first position of each input is needed, (B, D). The last layer then runs for these
                alone, unless closed units are masked.
        """
        narrow: Any = self.narrow
        alone = first and not embedded.masked
        hidden: torch.Tensor = narrow(
            embedded.hidden, embedded.batch, look.counts, embedded.masked, self._reaches(embedded), alone
        )
        return embedded.batch.unsort(hidden) if first else hidden

    def run_routed(
        self, embedded: Embedded, budget: float | torch.Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[BudgetFormerModelOutput, Routing, torch.Tensor | None]:
        """With the paper's routers: the outputs, what the routers said, and their terms of the loss."""
        requested: Any = self.config.looks[0] if budget is None and self.config.looks else budget
        if isinstance(requested, torch.Tensor):
            requested = requested.to(embedded.hidden.device, torch.promote_types(requested.dtype, torch.float32))
        elif requested is not None:
            requested = torch.full((embedded.rows,), requested, device=embedded.hidden.device)
        hidden, batch, base, mask = embedded.hidden, embedded.batch, self.base_model, None
        if isinstance(batch, PaddedBatch):
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=batch.mask)
        known = _values_are_known()
        encoded = base.encoder(hidden, batch, mask, requested, known, **self.recordings(kwargs))  # type: ignore[operator]
        states = encoded.hidden_states
        if states is not None:
            states = tuple(x if x is None or x.dim() == 3 else batch.pad(x) for x in states)
        gates = encoded.routing.gates
        pooler: Any = base.pooler
        outputs = BudgetFormerModelOutput(
            last_hidden_state=batch.pad(encoded.last_hidden_state),
            pooler_output=None if pooler is None else pooler(batch.first(encoded.last_hidden_state)[:, None]),
            hidden_states=states,
            attentions=encoded.attentions,
            budget=gates.detach().mean((1, 2)),
            head_gates=gates,
        )
        return outputs, encoded.routing, encoded.loss


class BudgetFormerModel(BudgetFormerPreTrainedModel):
    """A stock encoder and a narrow one beside it.

    Hidden states cannot be doubted: a budget is here at most `config.narrow_budget`, or 1. A plain call runs the full
    encoder, unless `config.looks` says one budget.

    Args:
        config: The configuration.
        add_pooling_layer: Whether to build the pooler, as in the stock classes that have one.
    """

    def __init__(self, config: BudgetFormerConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        budget: float | torch.Tensor | None = None,
        executor: str | None = None,
        output_head_gates: bool = False,
        **kwargs: Any,
    ) -> BudgetFormerModelOutput:
        """Encodes a batch.

        Where padding was removed, `last_hidden_state` is zero at its places; the stock classes leave numbers there that
        mean nothing.

        Args:
            input_ids: (B, L), int64; or else `inputs_embeds`.
            attention_mask: (B, L), 1 for real tokens and 0 for padding, on whichever side; None: no padding.
            token_type_ids: (B, L), int64; ignored by backbones without segments.
            position_ids: (B, L), int64.
            inputs_embeds: (B, L, D), float.
            budget: Share of the full encoder's work, a float in (0, 1]; with `router="layer"` share of the heads, a
                float or a float tensor (B,). None: see [`BudgetFormerConfig`].
            executor: "auto" or "masked", see [`BudgetFormerConfig`]; None: `config.executor`.
            output_head_gates: Whether to return `head_gates`, with `router="layer"`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in the stock classes.

        Raises:
            ValueError: An argument's shape or value is not allowed.
            TypeError: An argument does not exist.
        """
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        learning = self.training and self.config.full_encoder and torch.is_grad_enabled()
        if self.config.router == "layer":
            outputs, _, loss = self.run_routed(self.embed(given, budget, executor, kwargs), budget, kwargs)
            outputs.head_gates = outputs.head_gates if output_head_gates else None
            return outputs if loss is None else self._attach(outputs, loss)
        if isinstance(budget, torch.Tensor):
            raise ValueError(f"budget must be a float for a model without a head, got a tensor {budget}.")
        embedded = self.embed(given, budget, executor, kwargs)
        plan: Any = self._plan(budget, recorded=False) if budget is not None or self.config.looks else None
        if learning:
            return self._train(embedded, None if budget is None else plan.looks[0], given, kwargs)
        if plan is None:
            plan = self._plan_call(recorded=True)
        if len(plan.looks) > 1:
            raise ValueError(
                f"budget must be at most narrow_budget={self.config.narrow_budget:g}, or 1.0, for a model without a "
                f"head, whose answers cannot be doubted, got {budget!r} with looks {self.config.looks}."
            )
        if plan.looks[0].counts is None:
            return self._run_full(embedded, given, kwargs)
        self.refuse_recording(kwargs)
        hidden = self.encode_narrow(embedded, plan.looks[0])
        return self._output(embedded, hidden, self.narrow.pooler, plan.looks[0].cost)  # type: ignore[union-attr]

    def _output(self, embedded: Embedded, hidden: torch.Tensor, pooler: Any, cost: float) -> BudgetFormerModelOutput:
        return BudgetFormerModelOutput(
            last_hidden_state=embedded.batch.pad(hidden),
            pooler_output=None if pooler is None else pooler(embedded.batch.first(hidden)[:, None]),
            budget=hidden.new_full((embedded.rows,), cost, dtype=torch.float32),
        )

    def _run_full(self, embedded: Embedded, given: dict[str, Any], kwargs: dict[str, Any]) -> BudgetFormerModelOutput:
        base: Any = self.base_model
        recordings = self.recordings(kwargs)
        if not recordings:
            return self._output(embedded, self.encode_full(embedded), getattr(base, "pooler", None), 1.0)
        outputs = base(**self.stock_inputs(given), **recordings)
        names = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
        return BudgetFormerModelOutput(
            **{name: outputs[name] for name in names if name in outputs},  # BERT's cross attentions are empty
            budget=outputs[0].new_ones(embedded.rows, dtype=torch.float32),
        )

    def _train(
        self, embedded: Embedded, look: Look | None, given: dict[str, Any], kwargs: dict[str, Any]
    ) -> BudgetFormerModelOutput:
        """The full encoder's outputs, with the narrow one's term attached to the hidden states."""
        outputs = self._run_full(embedded, given, kwargs)
        if self.narrow is None:
            return outputs
        look = look if look is not None and look.counts is not None else self.narrow.draw()
        hidden = self.encode_narrow(embedded.detach(), look)
        target: Any = outputs.last_hidden_state
        if isinstance(embedded.batch, PackedBatch):
            target = embedded.batch.pack(target)
        divergence = hidden_divergence(hidden, target.detach())
        pooled = self.narrow.pool(embedded.batch.first(hidden))
        if pooled is not None:  # distributed training waits for its gradient too
            divergence = divergence + 0.0 * pooled.sum()
        self.training_log = {"divergence": divergence.detach(), "budget": divergence.new_tensor(look.cost).detach()}
        self.narrow.count_step(hidden)
        if self.config.freeze_full:  # there is nothing else to learn
            outputs.loss = divergence
        return self._attach(outputs, divergence)

    def _attach(self, outputs: BudgetFormerModelOutput, loss: torch.Tensor) -> BudgetFormerModelOutput:
        """Whatever is computed from the outputs trains `loss` too."""
        outputs.last_hidden_state = attach_loss(outputs.last_hidden_state, loss)  # type: ignore[arg-type]
        pooler: Any = getattr(self.base_model, "pooler", None)
        if pooler is not None:
            outputs.pooler_output = pooler(outputs.last_hidden_state)
        return outputs


class BudgetFormerTaskModel(BudgetFormerPreTrainedModel):
    """A stock model of a task, unchanged, and a narrow encoder that answers for it where it is sure of its answer.

    The stock modules and their parameters keep their names, so that checkpoints go both ways; ours are `narrow.*`.
    A task is what follows here; and a `forward` of its own where its labels are called otherwise.
    """

    task: ClassVar[str] = "SequenceClassification"
    output_class: ClassVar[Any] = BudgetFormerClassifierOutput
    # Fields of the output that make up an answer.
    answer_fields: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, config: BudgetFormerConfig) -> None:
        super().__init__(config)
        self.num_labels: Any = config.num_labels  # typed as optional upstream

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        budget: float | torch.Tensor | None = None,
        executor: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers a batch.

        Args:
            input_ids: (B, L), of choices (B, C, L), int64, as all that follow; or else `inputs_embeds`.
            attention_mask: 1 for real tokens and 0 for padding; None: no padding.
            token_type_ids: As `input_ids`.
            position_ids: As `input_ids`.
            inputs_embeds: As `input_ids` and (..., D), float.
            labels: As in the stock class: of tokens (B, L), int64 in [0, num_labels), or -100 to be ignored; of choices
                (B,), int64 in [0, C).
            budget: As in [`BudgetFormerForSequenceClassification`].
            executor: As in [`BudgetFormerForSequenceClassification`].
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in the stock classes.

        Raises:
            ValueError: An argument's shape or value is not allowed.
            TypeError: An argument does not exist.
        """
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        return self._run(given, {"labels": labels}, None, budget, executor, kwargs)

    def reads_all(self) -> bool:
        """Whether the head reads all tokens, rather than the first."""
        return getattr(self.config, "classifier_pooling", "cls") == "mean"

    def doubt(self, answer: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Confidence (b,) of answers (b, ...), of inputs with that mask (b, L)."""
        return confidence(answer, self.config.problem_type)

    def diverge(
        self, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, targets: Mapping[str, Any]
    ) -> torch.Tensor:
        """How far answers are from others, a scalar."""
        return teacher_divergence(answer, target, "single_label_classification").mean()

    def loss_of(self, answer: torch.Tensor, targets: Mapping[str, Any]) -> Any:
        """The task's loss, a scalar; None without labels."""
        if targets["labels"] is None:
            return None
        return F.cross_entropy(answer.view(-1, answer.shape[-1]), targets["labels"].view(-1))

    def _unite(self, outputs: Any) -> torch.Tensor:
        parts = [outputs[name] for name in self.answer_fields]
        return parts[0] if len(parts) == 1 else torch.stack(parts, -1)

    def _output(self, answer: torch.Tensor, **fields: Any) -> Any:
        parts = [answer] if len(self.answer_fields) == 1 else answer.unbind(-1)
        return self.output_class(**dict(zip(self.answer_fields, parts, strict=True)), **fields)

    def _run(
        self,
        given: dict[str, Any],
        targets: dict[str, Any],
        teacher_logits: torch.Tensor | None,
        budget: float | torch.Tensor | None,
        executor: str | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """What every task's `forward` does, with `router="look"`."""
        recordings = self.recordings(kwargs)
        flat, choices = given, 1
        if self.task == "MultipleChoice":
            tokens: Any = given["inputs_embeds"] if given["input_ids"] is None else given["input_ids"]
            choices = tokens.shape[1]
            flat = {name: None if x is None else x.flatten(0, 1) for name, x in given.items()}
        learning = self.training and torch.is_grad_enabled()
        if recordings and budget is None and not learning:
            checked = {name: x for name, x in flat.items() if name != "token_type_ids"}
            _check_inputs(self.config, **checked, unknown=kwargs)
            return self._record(given, targets, recordings)
        embedded = self.embed(flat, budget, executor, kwargs, choices)
        if learning:
            return self._train(embedded, given, budget, targets, teacher_logits, recordings)
        plans = self._plan(budget, recorded=bool(recordings))
        if recordings:
            if plans != Plan((FULL_LOOK,)):
                self.refuse_recording(kwargs)
            return self._record(given, targets, recordings)
        if isinstance(plans, Plan):
            answer, spent = self._look(embedded, plans.looks, plans.thresholds)
        else:
            answer, spent = self._look_in_groups(embedded, plans)
        return self._output(answer, loss=self.loss_of(answer, targets), budget=spent)

    def _record(self, given: dict[str, Any], targets: dict[str, Any], recordings: dict[str, Any]) -> Any:
        """The stock model itself, with what it records."""
        outputs = self.stock_class.forward(self, **self.stock_inputs(given), **targets, return_dict=True, **recordings)
        answer = outputs[self.answer_fields[0]]
        return self.output_class(**outputs, budget=torch.ones(len(answer), device=answer.device))

    def read_answer(
        self,
        embedded: Embedded,
        hidden: torch.Tensor,
        narrow: bool = False,
        targets: Mapping[str, Any] | None = None,
    ) -> Any:
        """What the stock head, or the narrow encoder's copy of it, says of hidden states: the stock class's output.

        Args:
            embedded: The batch.
            hidden: Of its tokens, as they lie; where the head reads no others, of first positions alone, (B, D).
            narrow: Whether they are the narrow encoder's.
            targets: Labels, by the stock class's names.
        """
        narrow_encoder: Any = self.narrow
        reads_all = self.reads_all()
        first = (embedded.batch.first(hidden) if reads_all else hidden)[:, None]  # (B, 1, D)
        pooler = narrow_encoder.pooler if narrow else getattr(self.base_model, "pooler", None)
        outputs = BaseModelOutputWithPooling(
            last_hidden_state=embedded.batch.pad(hidden) if reads_all else first,
            pooler_output=None if pooler is None else pooler(first),
        )
        answered = _Answered(self, outputs, narrow_encoder.head_parts() if narrow else {})
        given: dict[str, Any] = {"attention_mask": embedded.mask if reads_all else None}
        if embedded.choices > 1:  # it counts them
            given["inputs_embeds"] = hidden.new_empty(embedded.rows, embedded.choices, 1, 1)
        return self.stock_class.forward(answered, **given, **(targets or {}), return_dict=True)

    def _answer(self, embedded: Embedded, look: Look) -> torch.Tensor:
        """Answers (b, ...) of one look."""
        narrow = look.counts is not None
        first = not self.reads_all()
        hidden = self.encode_narrow(embedded, look, first) if narrow else self.encode_full(embedded, first)
        return self._unite(self.read_answer(embedded, hidden, narrow))

    def _look(
        self, embedded: Embedded, looks: Sequence[Look], thresholds: Sequence[float | torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (B, ...) and budgets (B,) of looks, each at the inputs that the one before left in doubt."""
        logits = self._answer(embedded, looks[0])
        spent = logits.new_full((embedded.rows,), looks[0].cost, dtype=torch.float32)
        doubted, answer = torch.arange(embedded.rows, device=logits.device), logits
        for look, threshold in zip(looks[1:], thresholds, strict=True):
            if isinstance(threshold, torch.Tensor):
                threshold = threshold.to(logits.device)[doubted]
            rows = (self.doubt(answer, embedded.mask) < threshold).nonzero()[:, 0]
            if not len(rows):
                break
            embedded, doubted = embedded if len(rows) == embedded.rows else embedded.select(rows), doubted[rows]
            answer = self._answer(embedded, look).to(logits.device)
            logits = logits.index_copy(0, doubted, answer)
            spent = spent.index_add(0, doubted, spent.new_full((len(rows),), look.cost))
        return logits, spent

    def _look_in_groups(self, embedded: Embedded, plans: list[Plan]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_look`, with looks of each input's own: those that have the same looks share them."""
        groups: dict[tuple[Look, ...], list[int]] = {}
        for row, plan in enumerate(plans):
            groups.setdefault(plan.looks, []).append(row)
        parts = []
        for looks, members in groups.items():
            thresholds = [
                torch.tensor([plans[row].thresholds[number] for row in members]) for number in range(len(looks) - 1)
            ]
            parts.append(self._look(embedded.select(torch.tensor(members)), looks, thresholds))
        order = torch.tensor([row for members in groups.values() for row in members])
        logits = torch.cat([part for part, _ in parts])
        spent = torch.cat([part for _, part in parts])
        place = order.argsort().to(logits.device)
        return logits[place], spent[place]

    def _train(
        self,
        embedded: Embedded,
        given: dict[str, Any],
        budget: float | torch.Tensor | None,
        targets: dict[str, Any],
        teacher_logits: torch.Tensor | None,
        recordings: dict[str, Any],
    ) -> Any:
        """One step's loss: the full model's, where it runs, and the narrow encoder's."""
        config: Any = self.config
        narrow: Any = self.narrow
        if isinstance(budget, torch.Tensor) or (budget is not None and budget > config.narrow_budget):
            raise ValueError(f"budget must be a float of at most {config.narrow_budget:g} in training, got {budget}.")
        full, loss, states, attentions = None, None, None, None
        runs_full = config.full_encoder and not (config.freeze_full and teacher_logits is not None)
        target = teacher_logits
        if runs_full:
            if recordings:
                outputs: Any = self._record(given, targets, recordings)
            else:
                hidden = self.encode_full(embedded, first=not self.reads_all())
                outputs = self.read_answer(embedded, hidden, targets=targets)
            full, loss = self._unite(outputs), outputs.loss
            states, attentions = outputs.hidden_states, outputs.attentions
            target = full.detach()
        if budget is not None:
            look = narrow.order.look(budget)
        else:
            look = narrow.draw() if config.full_encoder else narrow.widest
        embedded = embedded.detach() if config.full_encoder else embedded
        answer = self._answer(embedded, look)
        if not config.full_encoder:
            loss = self.loss_of(answer, targets)
        log = {"budget": answer.new_tensor(look.cost)}
        if loss is not None:
            log["task_loss"] = loss.detach()
        own_loss = answer.new_zeros(())
        if target is not None:
            divergence = self.diverge(answer, target, embedded.mask, targets)
            log["divergence"] = divergence.detach()
            own_loss = own_loss + divergence
        if not config.full_encoder and target is not None:  # the labels and the teacher share the loss
            own_loss = config.distillation_weight * own_loss
            loss = None if loss is None else (1.0 - config.distillation_weight) * loss
        narrow.count_step(answer)
        self.training_log = log
        if loss is not None:
            loss = loss + own_loss
        elif target is not None and (config.freeze_full or not config.full_encoder):
            loss = own_loss  # rows without labels teach the narrow encoder too
        if states is not None and states[-1] is not None:
            states = (*states[:-1], attach_loss(states[-1], own_loss))
        return self._output(
            attach_loss(answer if full is None else full, own_loss),
            loss=loss,
            hidden_states=states,
            attentions=attentions,
            budget=answer.new_full((embedded.rows,), look.cost + runs_full, dtype=torch.float32),
        )


class BudgetFormerForSequenceClassification(BudgetFormerTaskModel):
    """The stock classifier, unchanged, and a narrow encoder that answers for it where it is sure of its answer."""

    stock_classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

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
        budget: float | torch.Tensor | None = None,
        executor: str | None = None,
        output_head_gates: bool = False,
        **kwargs: Any,
    ) -> BudgetFormerClassifierOutput:
        """Classifies a batch.

        While training, `loss` is the task loss of the full model, exactly the stock class's, plus the divergence of the
        narrow encoder, at one budget a step, from what the full model says. The logits are the full model's, and carry
        the divergence's gradient for a loss that is computed outside.

        Args:
            input_ids: (B, L), int64; or else `inputs_embeds`.
            attention_mask: (B, L), 1 for real tokens and 0 for padding, on whichever side; None: no padding.
            token_type_ids: (B, L), int64.
            position_ids: (B, L), int64.
            inputs_embeds: (B, L, D), float.
            labels: As in the stock classes: (B,) int64 in [0, num_labels) for one label per input (-100 is ignored),
                (B, num_labels) float for several, (B,) float for a regression with num_labels=1.
            teacher_logits: (B, num_labels), float: what the full model, or another one, says of these inputs (see
                `tools.training.add_teacher_logits`). While training with `config.freeze_full` the full model need not
                run then, and logits are the narrow encoder's; a model that was cut, or with routers in its layers,
                learns from them. A full model that learns itself teaches itself, and they are ignored, as at inference.
            budget: Share of the full encoder's work, a float in (0, 1] or a float tensor (B,): up to
                `config.narrow_budget` the narrow encoder answers alone, 1 is the full model alone, and what lies
                between is the mean to spend. With `router="layer"` share of the heads. None: `config.looks`. While
                training: what the narrow encoder trains at, a float.
            executor: "auto" or "masked", see [`BudgetFormerConfig`]; None: `config.executor`.
            output_head_gates: Whether to return `head_gates`, with `router="layer"`.
            **kwargs: `output_hidden_states`, `output_attentions` (of the full encoder, which then runs alone unless a
                budget is asked for), `return_dict`, as in the stock classes.

        Raises:
            ValueError: An argument's shape or value is not allowed.
            TypeError: An argument does not exist.
        """
        if labels is not None:
            self._check_labels(labels)
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        if teacher_logits is not None:
            self._check_teacher_logits(teacher_logits, len(inputs_embeds if input_ids is None else input_ids))  # type: ignore[arg-type]
        if self.config.router == "layer":
            embedded = self.embed(given, budget, executor, kwargs)
            routed = self._classify_routed(embedded, budget, labels, teacher_logits, kwargs)
            routed.head_gates = routed.head_gates if output_head_gates else None
            return routed
        outputs: BudgetFormerClassifierOutput = self._run(
            given, {"labels": labels}, teacher_logits, budget, executor, kwargs
        )
        return outputs

    def diverge(
        self, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, targets: Mapping[str, Any]
    ) -> torch.Tensor:
        """As above, for several labels and regressions too."""
        return teacher_divergence(answer, target, self._problem_type(targets["labels"])).mean()

    def loss_of(self, answer: torch.Tensor, targets: Mapping[str, Any]) -> Any:
        """As above, for several labels and regressions too."""
        if targets["labels"] is None:
            return None
        return self.loss_function(labels=targets["labels"], pooled_logits=answer, config=self.config)

    def _problem_type(self, labels: torch.Tensor | None) -> str:
        if self.config.problem_type is None and labels is not None and self.num_labels > 1:
            return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        return problem_type(self.config)

    def _classify_routed(
        self,
        embedded: Embedded,
        budget: float | torch.Tensor | None,
        labels: torch.Tensor | None,
        teacher_logits: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> BudgetFormerClassifierOutput:
        """With the paper's routers."""
        base: Any = self.base_model
        encoded, routing, routers_loss = self.run_routed(embedded, budget, kwargs)
        answered = self.stock_class.forward(_Answered(self, encoded, {}), labels=labels, return_dict=True)
        logits, loss = answered.logits, answered.loss
        if routers_loss is not None:
            log = base.encoder.training_log
            if loss is not None:
                log["task_loss"] = loss.detach()
            if loss is not None and teacher_logits is not None:
                loss = (1.0 - self.config.distillation_weight) * loss
            kind = self._problem_type(labels)
            added = base.encoder.answer_loss(logits, labels, teacher_logits, routing.need, kind) + routers_loss
            loss = None if loss is None else loss + added
            logits = attach_loss(logits, added)
            self.training_log = log
        return BudgetFormerClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            budget=encoded.budget,
            head_gates=encoded.head_gates,
        )

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


class BudgetFormerForTokenClassification(BudgetFormerTaskModel):
    """The stock token classifier and a narrow encoder beside it: an input is doubted for its least sure token.

    Where padding was removed, logits are those of a zero; the stock classes leave numbers there that mean nothing.
    """

    task = "TokenClassification"
    stock_classes = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    output_class = BudgetFormerTokenClassifierOutput

    def reads_all(self) -> bool:
        """It does."""
        return True

    def doubt(self, answer: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Least margin (b,) between the two best labels of a real token, of logits (b, L, num_labels)."""
        sure = confidence(answer, None)
        return (sure if mask is None else sure.masked_fill(mask == 0, 1.0)).amin(-1)

    def diverge(
        self, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, targets: Mapping[str, Any]
    ) -> torch.Tensor:
        """Mean over real tokens."""
        divergence = teacher_divergence(answer, target, "single_label_classification")
        return divergence.mean() if mask is None else divergence[mask != 0].mean()


class BudgetFormerForQuestionAnswering(BudgetFormerTaskModel):
    """The stock model of spans and a narrow encoder beside it: a span is as sure as both of its ends together.

    Where padding was removed, logits are those of a zero; the stock classes leave numbers there that mean nothing.
    """

    task = "QuestionAnswering"
    stock_classes = MODEL_FOR_QUESTION_ANSWERING_MAPPING
    output_class = BudgetFormerQuestionAnsweringOutput
    answer_fields = ("start_logits", "end_logits")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        budget: float | torch.Tensor | None = None,
        executor: str | None = None,
        **kwargs: Any,
    ) -> BudgetFormerQuestionAnsweringOutput:
        """Finds where the answer to a question starts and ends.

        Args:
            input_ids: (B, L), int64; or else `inputs_embeds`.
            attention_mask: (B, L), 1 for real tokens and 0 for padding; None: no padding.
            token_type_ids: (B, L), int64.
            position_ids: (B, L), int64.
            inputs_embeds: (B, L, D), float.
            start_positions: (B,), int64, of the answer's first token.
            end_positions: (B,), int64, of its last.
            budget: As in [`BudgetFormerForSequenceClassification`].
            executor: As in [`BudgetFormerForSequenceClassification`].
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, as in the stock classes.

        Raises:
            ValueError: An argument's shape or value is not allowed.
            TypeError: An argument does not exist.
        """
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        outputs: BudgetFormerQuestionAnsweringOutput = self._run(
            given, {"start_positions": start_positions, "end_positions": end_positions}, None, budget, executor, kwargs
        )
        return outputs

    def reads_all(self) -> bool:
        """It does."""
        return True

    @staticmethod
    def _over_places(answer: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits of both ends at real tokens: (b, L, 2) -> (b, 2, L)."""
        logits = answer.transpose(1, 2)
        return logits if mask is None else logits.masked_fill((mask == 0)[:, None], torch.finfo(logits.dtype).min)

    def doubt(self, answer: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Product (b,) of both ends' margins between the two best places."""
        logits = F.pad(self._over_places(answer, mask), (0, 1), value=torch.finfo(answer.dtype).min)
        return confidence(logits, None).prod(-1)

    def diverge(
        self, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, targets: Mapping[str, Any]
    ) -> torch.Tensor:
        """Mean over both ends."""
        narrow, full = (self._over_places(x, mask) for x in (answer, target))
        return teacher_divergence(narrow, full, "single_label_classification").mean()

    def loss_of(self, answer: torch.Tensor, targets: Mapping[str, Any]) -> Any:
        """The stock class's."""
        if None in (targets["start_positions"], targets["end_positions"]):
            return None
        return self.loss_function(*answer.unbind(-1), **targets)


class BudgetFormerForMultipleChoice(BudgetFormerTaskModel):
    """The stock model of choices and a narrow encoder beside it: a question is looked at again with all its choices."""

    task = "MultipleChoice"
    stock_classes = MODEL_FOR_MULTIPLE_CHOICE_MAPPING
    output_class = BudgetFormerMultipleChoiceOutput


__all__ = [
    "BudgetFormerForMultipleChoice",
    "BudgetFormerForQuestionAnswering",
    "BudgetFormerForSequenceClassification",
    "BudgetFormerForTokenClassification",
    "BudgetFormerModel",
    "BudgetFormerPreTrainedModel",
]
