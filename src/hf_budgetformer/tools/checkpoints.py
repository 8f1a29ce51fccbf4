"""Classifiers from anywhere, checked: what kind they are, and whether they are trained."""

import glob
import hashlib
import os
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..backbones import max_input_length
from ..budgets import problem_type
from ..configuration_budgetformer import is_share


def load_config(checkpoint: str) -> Any:
    """The configuration of a folder or Hub id; raises ValueError where there is no model."""
    if os.path.isdir(checkpoint) and not os.path.isfile(os.path.join(checkpoint, "config.json")):
        raise ValueError(f"checkpoint must be a model's folder or Hub id, got {checkpoint} without a config.json.")
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # upstream's checks of a damaged file end in whatever its values lead to
        place = os.path.join(checkpoint, "config.json") if os.path.isdir(checkpoint) else checkpoint
        raise ValueError(f"checkpoint must be a model's folder or Hub id, got {place}: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """What an error says, or its name where it says nothing, cut to a length that can be read."""
    return textwrap.shorten(str(error) or type(error).__name__, 500)


def _check_weights(folder: str) -> None:
    """Raises ValueError where a file of weights in a folder is cut off or damaged; names it."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except Exception as error:  # safetensors has an error of its own for each fault
            raise ValueError(f"{path} is damaged or cut off, fetch or save it again: {_told(error)}") from error


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # of the many kinds of files each fails in its own way
        files = "tokenizer.json, tokenizer_config.json"
        raise ValueError(
            f"checkpoint must have a tokenizer beside it, got {checkpoint} without one that can be read ({files}): "
            f"{_told(error)} Save the one it was trained with: tokenizer.save_pretrained({checkpoint!r})."
        ) from error


def default_device() -> torch.device:
    """The accelerator, if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_trained(checkpoint: str, device: str | torch.device | None = None) -> Any:
    """A sequence classifier in eval mode, stock or BudgetFormer, whose head has been trained.

    Args:
        checkpoint: A folder or Hub id.
        device: Where it goes; None: see `default_device`.

    Raises:
        ValueError: There is no model, or none with a trained classifier.
    """
    load_config(checkpoint)
    if os.path.isdir(checkpoint):
        _check_weights(checkpoint)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
    except Exception as error:  # weights of other shapes, a width that heads do not divide, no file at all...
        raise ValueError(
            f"checkpoint must be a trained classifier, got {checkpoint}, whose config.json and weights cannot be "
            f"loaded together: {_told(error)}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"checkpoint must be a trained classifier, got {checkpoint} without {', '.join(missing)}.")
    return model.to(default_device() if device is None else device).eval()


def load_classifier(
    checkpoint: str, budgeted: bool = False, device: str | torch.device | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A trained sequence classifier in eval mode, stock or BudgetFormer, and its tokenizer.

    Args:
        checkpoint: A folder or Hub id.
        budgeted: Whether it must be a BudgetFormer.
        device: Where it goes; None: see `default_device`.

    Raises:
        ValueError: There is no model, none of that kind, or none with a trained classifier.
    """
    kind = load_config(checkpoint).model_type
    if budgeted and kind != "budgetformer":
        raise ValueError(
            f"checkpoint must be a BudgetFormer, got the {kind} model {checkpoint}: make one of it with "
            f"budgetformer train {checkpoint} DATA --output FOLDER."
        )
    model = load_trained(checkpoint, device)
    tokenizer = load_tokenizer(checkpoint)
    if kind == "budgetformer":  # not every tokenizer knows
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_input_length(model.config))
    return model, tokenizer


def check_classifier(model: Any) -> None:
    """Raises ValueError unless it is a BudgetFormer classifier."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "budgetformer" or getattr(model, "task", None) != "SequenceClassification":
        raise ValueError(
            f"model must be a BudgetFormer classifier, got {type(model).__name__}: make one with "
            "BudgetFormerForSequenceClassification.from_pretrained(checkpoint) and train it."
        )


def check_single_label(config: Any) -> None:
    """Raises ValueError unless the model chooses one label of several."""
    if problem_type(config) != "single_label_classification":
        got = f"problem_type={config.problem_type!r}, num_labels={config.num_labels}"
        raise ValueError(f"model must choose one label of several, got {got}.")


def distinct_budgets(budgets: Iterable[float | None]) -> list[float | None]:
    """Each budget once, in their order; raises ValueError where one is not allowed, or none is given."""
    distinct = list(dict.fromkeys(budgets))
    if not distinct or not all(budget is None or is_share(budget) for budget in distinct):
        raise ValueError(f"budgets must be floats in (0, 1], or None for a plain call, got {distinct}.")
    return distinct


def weights_digest(model: torch.nn.Module) -> str:
    """What tells a model's weights from others: sha256 of names and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = [
    "check_classifier",
    "check_single_label",
    "default_device",
    "distinct_budgets",
    "load_classifier",
    "load_config",
    "load_tokenizer",
    "load_trained",
    "weights_digest",
]
