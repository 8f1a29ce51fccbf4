"""Configuration of BudgetFormer: a BERT-family encoder's own fields and those of its routers, side by side."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .backbones import BACKBONES


EXECUTOR_CHOICES = ("auto", "masked")
# Far more than anyone builds. A damaged file that asks for a billion would take all time or memory before it fails.
_MOST_PARTS = 2**12  # of layers, heads of a layer, blocks of a layer
_MOST_WIDTH = 2**20  # of what a weight is wide or long, but for the vocabulary, which is only a size
_MOST_LABELS = 2**20
# Fields of version 0.1, and what to write instead.
_GONE = {
    "head_budget": 'looks=[share] with router="layer", or budget= on a call',
    "target_head_budget": 'target_budget with router="layer"',
    "static_heads": "hf_budgetformer.tools.narrowing.cut(model, budget)",
}

# Of a decoder's configuration nothing applies here; identity belongs to the model that is built, not to its origin.
_NOT_ADOPTED = ("model_type", "architectures", "transformers_version", "auto_map", "use_cache", "_name_or_path")


def _refuse_gone(fields: dict[str, Any]) -> None:
    for name in _GONE.keys() & fields.keys():
        raise ValueError(
            f"{name} is a field of hf_budgetformer 0.1, got {fields[name]!r}: write {_GONE[name]} instead. A "
            "checkpoint of 0.1 is trained anew from its backbone, which the stock class loads from its folder."
        )


def _checked(allowed: str, accepts: Callable[[Any], bool], default: Any) -> Any:
    """A dataclass field that refuses what does not satisfy `accepts`; the error names value and allowed range."""

    def validate(value: Any) -> None:
        if not accepts(value):
            raise ValueError(f"expected {allowed}, got {value!r}")

    return validated_field(validate, default=default)


def is_share(value: Any) -> bool:
    """Whether `value` is a share, a float in (0, 1]. Integers are refused, they look like counts."""
    return isinstance(value, float) and 0.0 < value <= 1.0


def _is_number(value: Any, low: float, high: float = math.inf, above: bool = False) -> bool:
    return math.isfinite(value) and (low < value if above else low <= value) and value <= high


def _share(default: float | None) -> Any:
    return _checked("None or a share, a float in (0, 1]", lambda v: v is None or is_share(v), default)


def _fraction(default: float) -> Any:
    return _checked("a number in [0, 1]", lambda v: _is_number(v, 0, 1), default)


def _not_negative(default: float) -> Any:
    return _checked("a finite number >= 0", lambda v: _is_number(v, 0), default)


def _positive(default: float) -> Any:
    return _checked("a finite number > 0", lambda v: _is_number(v, 0, above=True), default)


def _count(default: int, least: int = 1, most: float = math.inf) -> Any:
    allowed = f"an integer >= {least}" if most == math.inf else f"an integer >= {least} and <= {most}"
    return _checked(allowed, lambda v: least <= v <= most, default)


@strict
class BudgetFormerConfig(PreTrainedConfig):
    """Configuration of [`BudgetFormerModel`] and [`BudgetFormerForSequenceClassification`].

    The backbone's fields keep their names and meaning from `BertConfig` and `RobertaConfig`. `from_pretrained` on a
    plain checkpoint of a supported backbone, and [`from_backbone_config`], adopt them. The remaining fields are ours. A
    *budget* is a share of the full encoder's work, (0, 1].

    Args:
        backbone_model_type: Architecture of the encoder, a key of `backbones.BACKBONES`: "bert", "roberta" and so on.
        router: What gives each input its budget: "look", a first look by the narrow encoder, or "layer", the paper's
            routers in every layer, which gate heads alone. Default "look".
        narrow_budget: Largest budget of the narrow encoder, in (0, 1]. Default 1/4.
        feed_forward_blocks: Blocks that the neurons of a layer open in, >= 1. None: as many as heads.
        opening_order: In which order the units of the narrow encoder open as the budget grows: numbers of sublayers,
            one for each unit, 2 n for a head and 2 n + 1 for a block of neurons of layer n. None: heads at three times
            the pace of neurons, all layers alike.
        reference_length: Tokens >= 1 of the input whose FLOPs are counted as the work of a unit. Default 128.
        looks: Rising budgets, one after the other, that a plain call at inference spends, each on the inputs that the
            one before left in doubt; 1.0 is the full encoder. None: once the narrow encoder has been trained (1/12, 1),
            before that the full encoder alone. With `router="layer"` at most one: the share of the heads asked for.
        confidence: A threshold in [0, 1] after each look but the last: answers less sure are doubted. None: 0.8.
        margins: How sure the first look of a mean budget is on texts like the user's: `{"budget": its budget,
            "quantiles": evenly spaced quantiles of the confidence}`; see `tools.tuning.calibrate_margins`.
        promise: What looks and confidence were calibrated to keep, and on how many rows, as `tools.tuning.tune` writes
            it. Training voids it, and so do other looks.
        ranking: Of a reranker: `budgets` of its two looks and how many of the best candidates to `keep` for the second,
            as `tools.reranking.tune_ranking` writes it. Training voids it.
        freeze_full: Whether the full encoder and its head stay as they are in training, and run without dropout.
        full_encoder: False for a model that was cut to its narrow encoder, see `tools.narrowing.cut`. Default True.
        distillation_weight: Where a model learns from `teacher_logits` and labels (one that was cut, or with routers in
            its layers): share in [0, 1] of the loss that is the divergence from the teacher. Default 1.
        executor: "auto" (padding removed, closed units skipped) or "masked" (padded, everything computed, closed units
            multiplied by zero: the reference). Default "auto".
        attention_window: For long inputs: how many tokens, an even number >= 2, a token sees, half of them on either
            side; and the first one, which sees all and is seen by all (Beltagy et al. 2020, arXiv 2004.05150). Both
            encoders then differ from the stock class's, which sees everything, and are trained together. None:
            everything.
        target_budget: With `router="layer"`, as are all that follow: mean share of heads the model's own budget is
            trained towards; None keeps it within [0.1, 0.9] only, as the paper does. Default 0.5.
        budget_sampling: Fraction in [0, 1] of the training batches that run at a requested budget, drawn from
            [1/heads, 1] and low more often than high, rather than at the model's own. Default 0.75.
        budget_loss_weight: Weight >= 0 of the budget terms of the loss. Default 5.
        need_scale: How far budgets follow the input, >= 0: logits that an input gets for each standard deviation its
            predicted cost of a low budget lies above the mean. 0 gives all inputs about the same. Default 1.
        gate_type: "hard" (gates are 0 or 1 in training and inference, gradients pass straight through) or "soft"
            (as in the paper: all heads weighted in training, the ceil(budget * heads) best run at inference).
        router_hidden_size: Units >= 1 of the hidden layer of each budget controller. Default 64.
        router_lr_multiplier: How many times larger an optimiser step the routers take than the rest of the model, > 0.
            They start from scratch and need a rate of about 2e-3. Default 40, for a Trainer at 5e-5.
        exploration_steps: Number >= 0 of training forward passes from exploration to exploitation, that is until
            the noise on the scores is gone and their temperature low. Default 500.

    Raises:
        StrictDataclassFieldValidationError: A field's value is not allowed; names the field, the value and the range.
        StrictDataclassClassValidationError: Two fields contradict each other.

    Sources: the fields of `router="layer"` are arXiv 2604.22583; the equalised rate of the routers follows Karras et
    al. 2018 (arXiv 1710.10196).
    """

    model_type = "budgetformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["budget", "head_gates"]
    # The stock layers ask for these; a decoder cannot be adopted.
    is_decoder: ClassVar[bool] = False
    add_cross_attention: ClassVar[bool] = False

    backbone_model_type: str = _checked(f"one of {sorted(BACKBONES)}", lambda v: v in BACKBONES, "bert")
    vocab_size: int = _count(30522)
    hidden_size: int = _count(768, most=_MOST_WIDTH)
    num_hidden_layers: int = _count(12, most=_MOST_PARTS)
    num_attention_heads: int = _count(12, most=_MOST_PARTS)
    intermediate_size: int = _count(3072, most=_MOST_WIDTH)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = _fraction(0.1)
    attention_probs_dropout_prob: float | int = _fraction(0.1)
    max_position_embeddings: int = _count(512, most=_MOST_WIDTH)
    type_vocab_size: int = _count(2, most=_MOST_WIDTH)
    initializer_range: float | int = _not_negative(0.02)
    layer_norm_eps: float | int = _positive(1e-12)
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = _checked(
        "None or a number in [0, 1]", lambda v: v is None or _is_number(v, 0, 1), None
    )
    tie_word_embeddings: bool = True

    router: str = _checked("'look' or 'layer'", lambda v: v in ("look", "layer"), "look")
    narrow_budget: float | int = _checked("a float in (0, 1]", is_share, 0.25)
    feed_forward_blocks: int | None = _checked(
        f"None or an integer >= 1 and <= {_MOST_PARTS}", lambda v: v is None or 1 <= v <= _MOST_PARTS, None
    )
    opening_order: list[int] | None = None
    reference_length: int = _count(128)
    looks: list[float | int] | tuple[float | int, ...] | None = None
    confidence: list[float | int] | tuple[float | int, ...] | None = None
    margins: dict[str, Any] | None = None
    promise: dict[str, Any] | None = None
    ranking: dict[str, Any] | None = None
    freeze_full: bool = False
    full_encoder: bool = True
    distillation_weight: float | int = _fraction(1.0)
    executor: str = _checked(f"one of {list(EXECUTOR_CHOICES)}", lambda v: v in EXECUTOR_CHOICES, "auto")
    attention_window: int | None = _checked(
        "None or an even integer >= 2", lambda v: v is None or (v >= 2 and v % 2 == 0), None
    )

    target_budget: float | int | None = _share(0.5)
    budget_sampling: float | int = _fraction(0.75)
    budget_loss_weight: float | int = _not_negative(5.0)
    need_scale: float | int = _not_negative(1.0)
    gate_type: str = _checked("'hard' or 'soft'", lambda v: v in ("hard", "soft"), "hard")
    router_hidden_size: int = _count(64, most=_MOST_WIDTH)
    router_lr_multiplier: float | int = _positive(40.0)
    exploration_steps: int = _count(500, least=0)

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type must be {self.model_type!r}, got {kwargs['model_type']!r}: to build on another model's "
                "configuration, call BudgetFormerConfig.from_backbone_config(config)."
            )
        for name in ("is_decoder", "add_cross_attention"):
            if kwargs.pop(name, False):
                raise ValueError(f"{name} must be False, got True: BudgetFormer is an encoder.")
        _refuse_gone(kwargs)
        labels = kwargs.get("num_labels")
        if labels is not None and not (isinstance(labels, int) and 0 <= labels <= _MOST_LABELS):
            raise ValueError(f"num_labels must be an integer in [0, {_MOST_LABELS}], got {labels!r}.")
        for name in BACKBONES[self.backbone_model_type].fields.values():  # see `to_dict`
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As upstream; fields that the stock class calls otherwise are there twice, so that it loads our folders."""
        fields: dict[str, Any] = super().to_dict()
        return {**fields, **{x: fields[name] for name, x in BACKBONES[self.backbone_model_type].fields.items()}}

    def validate_opening_order(self) -> None:
        """The order names sublayers that there are, and no more units than they have."""
        order, heads = self.opening_order, self.num_attention_heads
        if self.feed_forward_blocks is not None and self.feed_forward_blocks > self.intermediate_size:
            raise ValueError(
                f"feed_forward_blocks must be at most intermediate_size={self.intermediate_size}, got "
                f"{self.feed_forward_blocks}."
            )
        if order is None:
            return
        blocks = self.feed_forward_blocks or min(heads, self.intermediate_size)
        known = set(order) <= set(range(2 * self.num_hidden_layers))
        if not order or not known or any(order.count(x) > (blocks if x % 2 else heads) for x in set(order)):
            raise ValueError(
                f"opening_order must hold numbers from 0 to {2 * self.num_hidden_layers - 1}, an even one at most "
                f"{heads} times and an odd one at most {blocks} times, got {order}."
            )

    def validate_attention_window(self) -> None:
        """A window is for encoders that see everything."""
        fixed = BACKBONES[self.backbone_model_type].rotary is not None or self.router == "layer"
        if self.attention_window is not None and fixed:
            raise ValueError(
                f"attention_window must be None with router='layer', and for a backbone of type "
                f"{self.backbone_model_type!r} if its layers have windows of their own, got {self.attention_window}."
            )

    def validate_looks(self) -> None:
        """Looks rise, within what there is to look with; one threshold less than looks."""
        looks, confidence = self.looks, self.confidence
        most = 2 if looks is None else len(looks)
        if looks is not None:
            rising = all(a < b for a, b in pairwise(looks))
            if not looks or not all(_is_number(x, 0, 1, above=True) for x in looks) or not rising:
                raise ValueError(f"looks must be None or rising numbers in (0, 1], got {looks}.")
            narrow = looks[:-1] if looks[-1] == 1.0 and self.full_encoder else looks
            if self.router == "look" and any(float(budget) > float(self.narrow_budget) for budget in narrow):
                raise ValueError(
                    f"looks must be at most narrow_budget={self.narrow_budget}, but for a last one of 1.0, got {looks}."
                )
            if self.router == "layer" and len(looks) > 1:
                raise ValueError(f"looks must hold one share of the heads with router='layer', got {looks}.")
        if confidence is not None and (len(confidence) != most - 1 or not all(_is_number(x, 0, 1) for x in confidence)):
            raise ValueError(
                f"confidence must hold {most - 1} numbers in [0, 1], one less than looks, got {confidence}."
            )

    def validate_margins(self) -> None:
        """Margins name the look that they are of."""
        margins = self.margins
        if margins is None:
            return
        quantiles: Any = margins.get("quantiles")
        budget: Any = margins.get("budget")
        if not isinstance(quantiles, list) or len(quantiles) < 2 or not is_share(budget) or budget > self.narrow_budget:
            raise ValueError(
                f"margins must hold a 'budget' of at most narrow_budget={self.narrow_budget} and two 'quantiles' or "
                f"more, got {margins}."
            )

    def validate_promise(self) -> None:
        """A promise says what it is of."""
        promise = self.promise
        names = {"risk", "level", "confidence", "rows", "looks", "thresholds", "bound", "lost", "doubted"}
        if promise is not None and not (names <= promise.keys() and promise["rows"] >= 1):
            raise ValueError(f"promise must hold {sorted(names)}, as tools.tuning.tune writes it, got {promise}.")

    def validate_ranking(self) -> None:
        """A ranking says what to do."""
        ranking = self.ranking
        if ranking is not None and not {"budgets", "keep"} <= ranking.keys():
            raise ValueError(
                f"ranking must hold 'budgets' and 'keep', as tools.reranking.tune_ranking writes it, got {ranking}."
            )

    @classmethod
    def from_backbone_config(cls, config: PreTrainedConfig | dict[str, Any], **kwargs: Any) -> "BudgetFormerConfig":
        """Builds a configuration around that of a supported backbone.

        Args:
            config: The stock configuration, or its dictionary with a `model_type`.
            **kwargs: Fields of this class to set.

        Raises:
            ValueError: The model type is not supported, or the configuration is a decoder's.
        """
        config_dict = config if isinstance(config, dict) else config.to_dict()
        return cls(**{**cls._adopt(config_dict), **kwargs})

    @classmethod
    def _adopt(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        model_type = config_dict.get("model_type")
        if model_type not in BACKBONES:
            raise ValueError(
                f"BudgetFormer cannot be built on a model of type {model_type!r}: supported are {sorted(BACKBONES)}."
            )
        # Through the stock class, so that its defaults and its handling of old files apply.
        adopted = CONFIG_MAPPING[model_type].from_dict(dict(config_dict)).to_dict()
        ours = {stock: name for name, stock in BACKBONES[model_type].fields.items()}
        adopted = {ours.get(key, key): value for key, value in adopted.items()}
        dropped = {*_NOT_ADOPTED, *({"id2label", "label2id"} - config_dict.keys())}  # labels only if it names them
        adopted = {key: value for key, value in adopted.items() if key not in dropped}
        if "num_labels" in config_dict:
            adopted["num_labels"] = config_dict["num_labels"]
        return {**adopted, "model_type": cls.model_type, "backbone_model_type": model_type}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As upstream, but the dictionary of a plain checkpoint comes back as one of this class."""
        _refuse_gone(kwargs)
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Checkpoints of 2019 name no type: the caller may.
        config_dict.setdefault("model_type", kwargs.get("backbone_model_type"))
        if config_dict["model_type"] != cls.model_type:
            config_dict = cls._adopt(config_dict)
        return config_dict, kwargs


__all__ = ["BudgetFormerConfig"]
