"""A README for the Hub, made of what the other tools left beside a checkpoint; what others wrote in it stays."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from transformers.utils import logging

from ..configuration_budgetformer import BudgetFormerConfig
from .evaluation import Evaluation
from .plots import plot_accuracy, plot_inputs, plot_layers, plot_time, plot_training, short_name
from .profiling import CostCard
from .tuning import TunedBudget


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
    out = model(**batch)  # out.logits, and out.head_budget (B,): the share of heads that ran
    out = model(**batch, head_budget=0.25)  # a quarter of the heads, for this call
```

Without it, by the code that lies beside the weights:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="NAME", trust_remote_code=True)
classify("a text")
```"""


def _trained(values: dict[str, Any]) -> dict[str, Any]:
    return values | {name: values[name] for name in ("log_history", "arguments", "base_model", "rows", "seconds")}


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "evaluation": Evaluation.from_dict,
    "static": Evaluation.from_dict,
    "tuning": TunedBudget.from_dict,
    "costs": CostCard.from_dict,
    "training": _trained,
}


def _read(path: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not hold what it should ({error!r}): make it again, or delete it.") from error


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


def _shown(source: Any) -> str:
    return _plain(short_name(source or "unnamed data"))


def _block(text: Any) -> str:
    return f"```text\n{text}\n```"


def _on(evaluation: Evaluation) -> str:
    return f"on {evaluation.rows:,} rows of {_shown(evaluation.settings.get('data'))}"


def _about(config: BudgetFormerConfig) -> str:
    labels = list((config.id2label or {}).values())
    named = f" ({', '.join(map(_plain, labels))})" if len(labels) <= 20 else ""
    if config.static_heads:
        left = ", ".join(str(len(kept)) for kept in config.static_heads)
        does = f"Some of the {config.num_attention_heads} attention heads of each layer are left, by layer: {left}"
    else:
        own = "the share it learned to choose" if config.head_budget is None else f"a share of {config.head_budget:g}"
        does = (
            f"For each text and each of its {config.num_hidden_layers} layers it decides how many of the "
            f"{config.num_attention_heads} attention heads to run, and which; the others are not computed. Unless a "
            f"call asks for a share of the heads, a head budget, it runs {own}"
        )
    return (
        f"## What it is\n\nA text classifier with {len(labels)} labels{named}, {config.backbone_model_type.upper()} "
        f"inside. {does}. Method: [BudgetFormer](https://arxiv.org/abs/2604.22583), as hf_budgetformer implements it."
    )


def _sections(config: BudgetFormerConfig, name: str, found: dict[str, Any], folder: Path) -> dict[str, str]:
    """The text of each part, in their order; empty where there is nothing to say."""
    parts = dict.fromkeys(("about", "use", "accuracy", "tuning", "cost", "training", "limits"), "")
    evaluation, static, training = (found.get(kind) for kind in ("evaluation", "static", "training"))
    use = _USE.replace("NAME", name)
    if config.static_heads:
        use = "\n".join(line for line in use.split("\n") if "head_budget=" not in line)
    parts |= {"about": _about(config), "use": use}
    if evaluation:
        parts["accuracy"] = f"## Accuracy by budget\n\nMeasured {_on(evaluation)}:\n\n{_block(evaluation)}"
        if static:
            about = f"With static heads, the same for every text, cut out of this model; {_on(static)}"
            parts["accuracy"] += f"\n\n{about}:\n\n{_block(static)}"
    if "tuning" in found:
        parts["tuning"] = f"## The budget that keeps accuracy\n\n{_block(found['tuning'])}"
    if "costs" in found:
        parts["cost"] = f"## What it costs\n\n{_block(found['costs'])}"
    if training:
        given, minutes = training["arguments"], training["seconds"] / 60
        used = "\n".join(f"{argument}: {given[argument]}" for argument in _ARGUMENTS if argument in given)
        teacher = training.get("teacher")
        taught = f", taught by a fine-tuned plain model, {_shown(teacher)}" if teacher else ""
        parts["training"] = (
            f"## How it was trained\n\nFrom {_shown(training['base_model'])} on {training['rows']:,} rows of "
            f"{_shown(training.get('dataset'))}{taught}, in {minutes:.1f} minutes.\n\n{_block(used)}"
        )
    for part, names in {"accuracy": "accuracy layers inputs", "cost": "time", "training": "training"}.items():
        for plot in names.split() if parts[part] else []:
            if (folder / "budgetformer" / "plots" / f"{plot}.png").is_file():
                parts[part] += f"\n\n![{plot}](budgetformer/plots/{plot}.png)"
    known = f"measured {_on(evaluation)} only" if evaluation else "not measured"
    limits = [
        f"Accuracy was {known}: measure it on texts like yours.",
        "What the backbone and the training data got wrong, it gets wrong too.",
        "Heads are a part of the work: embeddings and feed-forward layers always run.",
    ]
    if not config.static_heads:
        limits.append("A single short text is hardly faster with fewer heads, for routing takes time too: batch texts.")
    parts["limits"] = "## Limits\n\n" + "\n".join(f"- {line}" for line in limits)
    return parts


def _draw(folder: Path, found: dict[str, Any]) -> None:
    """Draws all plots that there are figures for."""
    evaluation, static, costs, training = (found.get(name) for name in ("evaluation", "static", "costs", "training"))
    if evaluation and len(evaluation.results) > 1:
        plot_accuracy(evaluation, folder / "accuracy.png", [static] if static else [])
        plot_layers(evaluation, folder / "layers.png")
        if {"entropy", "heads"} <= evaluation.inputs.keys():
            plot_inputs(evaluation, folder / "inputs.png")
    if costs:
        plot_time(costs, folder / "time.png")
    if training and any("budget" in entry for entry in training["log_history"]):
        plot_training(training, folder / "training.png")


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


def _add_metadata(data: Any, name: str, found: dict[str, Any]) -> None:
    """Sets the keys that are ours, adds to lists, and leaves the rest."""
    training = found.get("training", {})
    results = [x for x in data.eval_results or [] if not str(x.metric_name).startswith("accuracy, ")]
    if "evaluation" in found:
        settings = found["evaluation"].settings
        source = _shown(settings.get("data"))
        results += [
            EvalResult(
                task_type="text-classification",
                dataset_type=re.sub(r"[^\w./-]+", "-", source),
                dataset_name=source,
                dataset_split=settings.get("split"),
                metric_type="accuracy",
                metric_name="accuracy, " + ("own heads" if x.asked is None else f"head budget {x.asked:.3g}"),
                metric_value=x.accuracy,
            )
            for x in found["evaluation"].results
        ]
    data.eval_results, data.model_name = (results, data.model_name or name) if results else (None, None)
    for key, values in (
        ("tags", ["budgetformer", "adaptive-computation"]),
        ("metrics", ["accuracy"] if "evaluation" in found else []),
        ("datasets", [x for x in [_hub_id(training.get("dataset"))] if x]),
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
    metadata other than base model, library, task and the accuracies measured here. What was not measured is left out.

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
    kind = _read(folder / "config.json", dict).get("model_type") if (folder / "config.json").is_file() else None
    if kind != "budgetformer":
        raise ValueError(f"folder must hold a BudgetFormer checkpoint, got {folder} with model type {kind!r}.")
    config = BudgetFormerConfig.from_pretrained(folder)
    if not (folder / "tokenizer_config.json").is_file():
        logger.warning(f"{folder} holds no tokenizer, which the code in its model card needs: save one there.")
    files = {name: folder / "budgetformer" / f"{name}.json" for name in _READERS}
    found = {name: _read(path, _READERS[name]) for name, path in files.items() if path.is_file()}

    name, readme = repo_id or folder.name, folder / "README.md"
    try:
        card = ModelCard.load(readme) if readme.is_file() else ModelCard(f"---\ntags: []\n---\n\n# {name}\n")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{readme} must be UTF-8, with valid metadata if any, got {error!r}.") from error
    data: Any = card.data
    _add_metadata(data, name, found)
    data.language, data.license = language or data.language, license or data.license
    _draw(folder / "budgetformer" / "plots", found)
    windows = "\r\n" in card.text
    text = _renew(card.text.replace("\r\n", "\n"), _sections(config, name, found, folder), readme)
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
