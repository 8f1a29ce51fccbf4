"""Configuration of BudgetFormer: a BERT-family encoder's own fields and those of its routers, side by side."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .backbones import BACKBONES


EXECUTOR_CHOICES = ("auto", "sparse", "masked")

# Of a decoder's configuration nothing applies here; identity belongs to the model that is built, not to its origin.
_NOT_ADOPTED = ("model_type", "architectures", "transformers_version", "auto_map", "use_cache", "_name_or_path")


def _checked(allowed: str, accepts: Callable[[Any], bool], default: Any) -> Any:
    """A dataclass field that refuses what does not satisfy `accepts`; the error names value and allowed range."""

    def validate(value: Any) -> None:
        if not accepts(value):
            raise ValueError(f"expected {allowed}, got {value!r}")

    return validated_field(validate, default=default)


def is_share(value: Any) -> bool:
    """Whether `value` is a share of the heads: a float in (0, 1]. Integers are refused, they look like head counts."""
    return isinstance(value, float) and 0.0 < value <= 1.0


def _is_number(value: Any, low: float, high: float = math.inf, above: bool = False) -> bool:
    return math.isfinite(value) and (low < value if above else low <= value) and value <= high


def _share(default: float | None) -> Any:
    return _checked("None or a share of the heads, a float in (0, 1]", lambda v: v is None or is_share(v), default)


def _fraction(default: float) -> Any:
    return _checked("a number in [0, 1]", lambda v: _is_number(v, 0, 1), default)


def _not_negative(default: float) -> Any:
    return _checked("a finite number >= 0", lambda v: _is_number(v, 0), default)


def _positive(default: float) -> Any:
    return _checked("a finite number > 0", lambda v: _is_number(v, 0, above=True), default)


def _count(default: int, least: int = 1) -> Any:
    return _checked(f"an integer >= {least}", lambda v: v >= least, default)


@strict
class BudgetFormerConfig(PreTrainedConfig):
    """Configuration of [`BudgetFormerModel`] and [`BudgetFormerForSequenceClassification`].

    The backbone's fields keep their names and meaning from `BertConfig` and `RobertaConfig`. `from_pretrained` on a
    plain BERT or RoBERTa checkpoint, and [`from_backbone_config`], adopt them. The remaining fields belong to the
    routers. "Share" means a fraction of all attention heads, (0, 1].

    Args:
        backbone_model_type: Architecture of the encoder, a key of `backbones.BACKBONES`: "bert" or "roberta".
        head_budget: Share of the heads every input gets unless a call asks for another, or None for the budget the
            model chooses itself. Default None.
        target_head_budget: Mean share the model's own budget is trained towards; None keeps it within [0.1, 0.9]
            only, as the paper does. Default 0.5.
        budget_sampling: Fraction in [0, 1] of the training batches that run at a requested budget, drawn
            from [1/heads, 1] and low more often than high, rather than at the model's own. Without it a checkpoint
            collapses at budgets it was not trained at. Default 0.75.
        budget_loss_weight: Weight >= 0 of the budget terms of the loss. Default 5.
        need_scale: How far budgets follow the input, >= 0: logits that an input gets for each standard deviation its
            predicted cost of a low budget lies above the mean. 0 gives all inputs about the same. Default 1.
        distillation_weight: Share in [0, 1] of the training loss that is the divergence from `teacher_logits`, where
            these are given; the rest is the task's. Default 1.
        gate_type: "hard" (gates are 0 or 1 in training and inference, gradients pass straight through) or "soft"
            (as in the paper: all heads weighted in training, the ceil(budget * heads) best run at inference).
            Default "hard".
        router_hidden_size: Units >= 1 of the hidden layer of each budget controller. Default 64.
        router_lr_multiplier: How many times larger an optimiser step the routers take than the rest of the model, > 0.
            Routers start from scratch and need a rate of about 2e-3. Default 40, for a Trainer at 5e-5.
        executor: How closed heads are treated at inference: "auto" (skipped where that is faster), "sparse" (always
            skipped), or "masked" (computed and multiplied by zero: the reference). Training and recorded attentions
            compute every head whichever is set. Default "auto".
        exploration_steps: Number >= 0 of training forward passes from exploration to exploitation, that is until
            the noise on the scores is gone and their temperature low. With gradient accumulation a pass is a
            micro-batch. Default 500.
        static_heads: For each layer the heads that are left of it, a rising list of indices, for a model that was cut
            down to them (see `tools.baselines.prune`): it has no routers, and all of its heads always run. None: all
            heads, and routers. Default None.

    Raises:
        StrictDataclassFieldValidationError: A field's value is not allowed; names the field, the value and the range.
        StrictDataclassClassValidationError: Two fields contradict each other.

    Sources: budgets, bounds and gates are arXiv 2604.22583; the equalised rate of the routers follows Karras et al.
    2018 (arXiv 1710.10196).
    """

    model_type = "budgetformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["head_budget", "head_gates", "aux_loss"]
    # The stock layers ask for these; a decoder cannot be adopted.
    is_decoder: ClassVar[bool] = False
    add_cross_attention: ClassVar[bool] = False

    backbone_model_type: str = _checked(f"one of {sorted(BACKBONES)}", lambda v: v in BACKBONES, "bert")
    vocab_size: int = _count(30522)
    hidden_size: int = _count(768)
    num_hidden_layers: int = _count(12)
    num_attention_heads: int = _count(12)
    intermediate_size: int = _count(3072)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = _fraction(0.1)
    attention_probs_dropout_prob: float | int = _fraction(0.1)
    max_position_embeddings: int = _count(512)
    type_vocab_size: int = _count(2)
    initializer_range: float | int = _not_negative(0.02)
    layer_norm_eps: float | int = _positive(1e-12)
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = _checked(
        "None or a number in [0, 1]", lambda v: v is None or _is_number(v, 0, 1), None
    )
    tie_word_embeddings: bool = True

    head_budget: float | int | None = _share(None)
    target_head_budget: float | int | None = _share(0.5)
    budget_sampling: float | int = _fraction(0.75)
    budget_loss_weight: float | int = _not_negative(5.0)
    need_scale: float | int = _not_negative(1.0)
    distillation_weight: float | int = _fraction(1.0)
    gate_type: str = _checked("'hard' or 'soft'", lambda v: v in ("hard", "soft"), "hard")
    router_hidden_size: int = _count(64)
    router_lr_multiplier: float | int = _positive(40.0)
    exploration_steps: int = _count(500, least=0)
    executor: str = _checked(f"one of {list(EXECUTOR_CHOICES)}", lambda v: v in EXECUTOR_CHOICES, "auto")
    static_heads: list[list[int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"model_type must be {self.model_type!r}, got {kwargs['model_type']!r}: to build on another model's "
                "configuration, call BudgetFormerConfig.from_backbone_config(config)."
            )
        for name in ("is_decoder", "add_cross_attention"):
            if kwargs.pop(name, False):
                raise ValueError(f"{name} must be False, got True: BudgetFormer is an encoder.")
        super().__post_init__(**kwargs)

    def validate_head_size(self) -> None:
        """Heads must share the hidden size equally."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be divisible by num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )

    def validate_static_heads(self) -> None:
        """Every layer keeps at least one of its heads."""
        if self.static_heads is None:
            return
        heads = range(self.num_attention_heads)
        good = [x and all(h in heads for h in x) and x == sorted(set(x)) for x in self.static_heads]
        if len(good) != self.num_hidden_layers or not all(good):
            raise ValueError(
                f"static_heads must hold, for each of {self.num_hidden_layers} layers, a rising list of at least one "
                f"head in [0, {self.num_attention_heads}), got {self.static_heads}."
            )

    @classmethod
    def from_backbone_config(cls, config: PreTrainedConfig | dict[str, Any], **kwargs: Any) -> "BudgetFormerConfig":
        """Builds a configuration around a plain BERT or RoBERTa one.

        Args:
            config: The stock configuration, or its dictionary with a `model_type`.
            **kwargs: Fields of this class to set, router fields usually.

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
        dropped = {*_NOT_ADOPTED, *({"id2label", "label2id"} - config_dict.keys())}  # labels only if it names them
        adopted = {key: value for key, value in adopted.items() if key not in dropped}
        if "num_labels" in config_dict:
            adopted["num_labels"] = config_dict["num_labels"]
        return {**adopted, "model_type": cls.model_type, "backbone_model_type": model_type}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As upstream, but the dictionary of a plain BERT or RoBERTa checkpoint comes back as one of this class."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Checkpoints of 2019 name no type: the caller may.
        config_dict.setdefault("model_type", kwargs.get("backbone_model_type"))
        if config_dict["model_type"] != cls.model_type:
            config_dict = cls._adopt(config_dict)
        return config_dict, kwargs


__all__ = ["BudgetFormerConfig"]
