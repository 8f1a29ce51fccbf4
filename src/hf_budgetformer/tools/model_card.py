"""A README for the Hub, made of what the other tools left beside a checkpoint; what others wrote in it stays."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import safe_open
from transformers.utils import logging

from ..configuration_budgetformer import BudgetFormerConfig
from .evaluation import Evaluation
from .plots import can_plot_training, plot_accuracy, plot_gains, plot_inputs, plot_time, plot_training
from .profiling import CostCard
from .results import describe_looks, read_results, short_name
from .tuning import Tuning, describe_promise, kept_promise


logger = logging.get_logger(__name__)

_MARK = "<!-- budgetformer:{} {} -->"
_DATA_FILES = (".csv", ".json", ".jsonl", ".parquet")
# Of the many arguments of a training, those that are needed to repeat it.
_ARGUMENTS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "label_smoothing_factor", "bf16", "fp16", "seed",
)  # fmt: skip
_USE = """## How to use it

With hf_budgetformer installed:

```python
import hf_budgetformer  # registers with the Auto classes
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForSequenceClassification.from_pretrained("NAME").eval()
batch = tokenizer(["a text", "another text, a longer one"], padding=True, return_tensors="pt")
with torch.no_grad():
    out = model(**batch)  # out.logits, and out.budget (B,): what each text spent
    out = model(**batch, budget=BUDGET)  # asks for a budget, for this call
```

Without it, by the code that lies beside the weights:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="NAME", trust_remote_code=True)
classify("a text")
```"""
_READERS: dict[str, Any] = {
    "evaluation": Evaluation.from_dict,
    "tuning": Tuning.from_dict,
    "costs": CostCard.from_dict,
}
_HEADINGS = {
    "evaluation": "Accuracy by budget",
    "tuning": "The promise",
    "costs": "What it costs",
}  # fmt: skip


def _read_measured(folder: Path) -> dict[str, Any]:
    """Of each kind (record, what it holds), those that still hold first; and the "training", or None."""
    measured: dict[str, Any] = {"training": None}
    place = folder / "budgetformer"
    try:
        for kind, read in _READERS.items():
            place = folder / "budgetformer" / kind
            measured[kind] = []
            for record in read_results(folder, kind):
                result = read(record.result)
                result.settings.update(data=record.data, split=record.split)
                measured[kind].append((record, result))
        place = folder / "budgetformer" / "training.json"
        if place.is_file():
            measured["training"] = training = json.loads(place.read_text(encoding="utf-8"))
            for name in ("log_history", "arguments", "base_model", "rows", "seconds"):
                training[name]
    except (TypeError, KeyError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{place} does not hold what it should ({error!r}): make it again, or delete it.") from error
    return measured


def _hub_id(name: Any) -> str | None:
    """`name` if it can be that of a repository, and is not that of a file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() or Path(name).suffix in _DATA_FILES else str(name)


def _plain(text: Any) -> str:
    """Without what Markdown and the marks would trip over."""
    return re.sub(r"[|<>`\s]+", " ", str(text))


def _is_trained(folder: Path) -> bool:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            if "narrow.steps" in weights.keys():  # noqa: SIM118 - it is no mapping
                return bool(weights.get_tensor("narrow.steps") > 0)
    return False


def _about(config: BudgetFormerConfig, trained: bool) -> str:
    labels = list((config.id2label or {}).values())
    named = f" ({', '.join(map(_plain, labels))})" if len(labels) <= 20 else ""
    shape = f"{config.num_hidden_layers} layers of {config.num_attention_heads} attention heads"
    call = describe_looks(config.looks, config.confidence)
    if config.router == "layer":
        call = (
            f"runs {config.looks[0]:.3g} of the heads"
            if config.looks
            else "runs the share of the heads that it learned to choose"
        )
        does = f"For each text and each of its {shape} it decides how many heads to run, and which"
    elif not config.full_encoder:
        call = call if config.looks else f"looks once, at a budget of {config.narrow_budget:.3g}"
        does = f"Cut from a model of {shape}, of whose work budgets are shares: its most important heads and neurons"
    else:
        call = call if trained or config.looks else "runs the full model, for the narrow encoder has not been trained"
        kept = "as it was before" if config.freeze_full else "trained with it"
        does = (
            f"A full model of {shape}, {kept} (`budget=1.0`). Beside it stands a narrow encoder, its most important "
            f"heads and neurons, for a first look at {config.narrow_budget:.3g} of the work or less; texts whose "
            "answer is in doubt go on to the full model"
        )
    promise = kept_promise(config)
    promised = "" if promise is None else f" {describe_promise(promise)}"
    return (
        f"## What it is\n\nA text classifier with {len(labels)} labels{named}, {config.backbone_model_type.upper()} "
        f"inside. {does}. A plain call {call}.{promised} Method: after "
        "[BudgetFormer](https://arxiv.org/abs/2604.22583), by hf_budgetformer."
    )


def _about_training(training: dict[str, Any]) -> str:
    base, data = (_plain(short_name(training.get(name) or "unnamed data")) for name in ("base_model", "dataset"))
    validation = training.get("validation") or {}
    taught = f", taught by {_plain(short_name(training['teacher']))}" if training.get("teacher") else ""
    if taught and "eval_full_accuracy" in validation:
        taught += f" (accuracy on the validation rows {validation['eval_full_accuracy']:.1%})"
    given = training["arguments"]
    used = "\n".join(f"{argument}: {given[argument]}" for argument in _ARGUMENTS if argument in given)
    for argument, value in training.get("narrow", {}).items():
        used += f"\nnarrow encoder, {argument}: {value}"
    return (
        f"## How it was trained\n\nFrom {base} on {training['rows']:,} rows of {data}{taught}, in {_minutes(training)}."
        f"\n\n```text\n{used}\n```"
    )


def _minutes(training: dict[str, Any]) -> str:
    """What both stages took, in words."""
    first, second = training.get("stage_one_seconds") or 0.0, training["seconds"]
    total = f"{(first + second) / 60:.1f} minutes"
    return f"{total}, {first / 60:.1f} of them for the plain model" if first else total


def _sections(config: BudgetFormerConfig, name: str, folder: Path, measured: dict[str, Any]) -> dict[str, str]:
    """The text of each part, in their order; empty where there is nothing to say. Draws the plots."""
    budget = 0.5 * config.narrow_budget if config.router == "look" else 0.25
    parts = {
        "about": _about(config, _is_trained(folder)),
        "use": _USE.replace("NAME", name).replace("BUDGET", f"{budget:.3g}"),
    }
    for kind, heading in _HEADINGS.items():
        entries = [f"{_plain(record)}\n\n```text\n{result}\n```" for record, result in measured[kind]]
        parts[kind] = "\n\n".join([f"## {heading}", *entries]) if entries else ""
    parts["training"] = _about_training(measured["training"]) if measured["training"] else ""
    for part, plots in _draw(folder / "budgetformer" / "plots", measured).items():
        parts[part] += "".join(f"\n\n![{plot.stem}](budgetformer/plots/{plot.name})" for plot in plots)
    current = [_plain(record.source) for record, _ in measured["evaluation"] if "weights" not in record.changed]
    known = f"measured on {' and '.join(dict.fromkeys(current))} only" if current else "not measured"
    limits = [f"Accuracy was {known}: measure it on texts like yours."]
    limits.append("What the backbone and the training data got wrong, it gets wrong too.")
    if config.router == "layer":
        limits.append("Heads are a part of the work: embeddings and feed-forward layers always run.")
    elif config.full_encoder:
        limits.append("A text in doubt costs both looks, more than the full model alone.")
        if kept_promise(config):
            limits.append("What is promised holds for texts like those of the calibration; on others tune again.")
    parts["limits"] = "## Limits\n\n" + "\n".join(f"- {line}" for line in limits)
    return parts


def _draw(folder: Path, measured: dict[str, Any]) -> dict[str, list[Path]]:
    """Draws what there are figures for that still hold, in place of what was drawn before; the plots of each part."""
    for path in folder.glob("*.png"):
        path.unlink()
    drawn: dict[str, list[Path]] = {"evaluation": [], "costs": [], "training": []}
    [evaluation, *_] = [x for record, x in measured["evaluation"] if not record.stale] or [None]
    [costs, *_] = [x for record, x in measured["costs"] if not record.stale] or [None]
    training = measured["training"]
    if evaluation and len(evaluation.results) > 1 and evaluation.results[0].accuracy is not None:
        drawn["evaluation"].append(plot_accuracy(evaluation, folder / "accuracy.png"))
        if {"entropy", "spent"} <= evaluation.inputs.keys():
            drawn["evaluation"].append(plot_inputs(evaluation, folder / "inputs.png"))
    if costs:
        drawn["costs"].append(plot_time(costs, folder / "time.png"))
        if costs.results[0].accuracy is not None:
            drawn["costs"].append(plot_gains(costs, folder / "gains.png"))
    if training and can_plot_training(training):
        drawn["training"].append(plot_training(training, folder / "training.png"))
    return drawn


def _renew(text: str, parts: dict[str, str], where: Path) -> str:
    """Writes every part between its marks; those it lacks, at the end. Empty parts keep their place by their marks."""
    marks = re.findall(_MARK.format("(begin|end)", r"(\w+)"), text)
    names = [name for _, name in marks[::2]]
    if marks != [(kind, name) for name in names for kind in ("begin", "end")] or len(set(names)) < len(names):
        raise ValueError(
            f"{where} must have each mark <!-- budgetformer:... --> in one pair, begin and end, got {marks}."
        )
    for name, part in parts.items():
        begin, end = (_MARK.format(kind, name) for kind in ("begin", "end"))
        block = "\n".join(filter(None, (begin, part, end)))
        if name in names:
            text = text[: text.index(begin)] + block + text[text.index(end) + len(end) :]
        else:
            text = f"{text.rstrip()}\n\n{block}\n"
    return text


def _accuracies(measured: dict[str, Any]) -> list[EvalResult]:
    """Of each data set and split the accuracies on the most rows, as far as they still hold."""
    by_source: dict[str, list[EvalResult]] = {}
    for record, evaluation in measured["evaluation"]:
        if "weights" in record.changed or record.source in by_source:
            continue
        data = _plain(record.data or "unnamed data")
        about = {"dataset_type": re.sub(r"[^\w./-]+", "-", data), "dataset_name": data, "dataset_split": record.split}
        by_source[record.source] = [
            EvalResult(
                "text-classification",
                metric_type="accuracy",
                metric_name="accuracy, " + ("plain call" if x.asked is None else f"budget {x.asked:.3g}"),
                metric_value=x.accuracy,
                **about,
            )
            for x in evaluation.results
            if x.accuracy is not None and (x.asked is not None or not record.stale)
        ]
    return [result for results in by_source.values() for result in results]


def _add_metadata(data: Any, name: str, measured: dict[str, Any]) -> None:
    """Sets the keys that are ours, adds to lists, and leaves the rest."""
    accuracies, training = _accuracies(measured), measured["training"] or {}
    results = [x for x in data.eval_results or [] if not str(x.metric_name).startswith("accuracy, ")] + accuracies
    data.eval_results, data.model_name = (results, data.model_name or name) if results else (None, None)
    dataset = _hub_id(training.get("dataset"))
    for key, values in (
        ("tags", ["budgetformer", "adaptive-computation"]),
        ("metrics", ["accuracy"] if accuracies else []),
        ("datasets", [dataset] if dataset else []),
    ):
        old = data.get(key, [])
        data[key] = list(dict.fromkeys([*([old] if isinstance(old, str) else old), *values])) or None
    data.library_name, data.pipeline_tag = "transformers", "text-classification"
    data.base_model = _hub_id(training.get("base_model")) or data.base_model


def write_model_card(
    folder: str | Path, repo_id: str | None = None, language: str | None = None, license: str | None = None
) -> Path:
    """Writes README.md of a checkpoint folder, and draws its plots, from the JSON files in `budgetformer/` there.

    Each generated part lies between HTML comments, `budgetformer:begin` and `budgetformer:end` with its name. Where a
    README exists, only what is between them is written anew, parts it lacks are added, and all else stays; so do the
    metadata other than base model, library, task and the accuracies measured here. What was not measured is left out;
    what has changed since it was measured is marked, and neither drawn nor in the metadata.

    huggingface_hub checks the metadata, and so does the Hub, to which the README is sent for that; that it cannot be
    reached, or HF_HUB_OFFLINE is set, is logged and no error. To publish, upload the folder (`hf upload me/model
    FOLDER`): a model's `push_to_hub` leaves out README and plots.

    Args:
        folder: A BudgetFormer checkpoint.
        repo_id: Its name on the Hub, for the code; None: the folder's name.
        language: ISO code of the texts' language, for the metadata.
        license: The model's, as the Hub names it, for the metadata.

    Returns:
        The README.

    Raises:
        ValueError: The folder is no BudgetFormer checkpoint, a file is not what it should be, or the Hub refuses the
            metadata. The README then stays as it was.
        ImportError: There is something to draw, and matplotlib is not installed.
    """
    folder = Path(folder).absolute()
    kind = None
    if (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "budgetformer":
        raise ValueError(f"folder must hold a BudgetFormer checkpoint, got {folder} with model type {kind!r}.")
    config = BudgetFormerConfig.from_pretrained(folder)
    if not (folder / "tokenizer_config.json").is_file():
        logger.warning(f"{folder} holds no tokenizer, which the code in its model card needs: save one there.")
    measured = _read_measured(folder)

    name, readme = repo_id or folder.name, folder / "README.md"
    try:
        card = ModelCard.load(readme) if readme.is_file() else ModelCard(f"---\ntags: []\n---\n\n# {name}\n")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{readme} must be UTF-8, with valid metadata if any, got {error!r}.") from error
    data: Any = card.data
    _add_metadata(data, name, measured)
    data.language, data.license = language or data.language, license or data.license
    windows = "\r\n" in card.text
    text = _renew(card.text.replace("\r\n", "\n"), _sections(config, name, folder, measured), readme)
    card.text = text.replace("\n", "\r\n") if windows else text
    try:
        card.validate()
    except (httpx.HTTPError, OSError) as error:
        logger.warning(f"The Hub could not check the metadata of {readme}, only huggingface_hub did: {error}")
    part = readme.with_name(".README.md.part")
    part.write_bytes(str(card).encode())
    os.replace(part, readme)
    return readme


__all__ = ["write_model_card"]
