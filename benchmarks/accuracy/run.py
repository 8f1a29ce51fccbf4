"""Trains and evaluates what a table of accuracies is made of: run.py experiments/X.json --data FOLDER.

Every training is written at once, to results/X/<data>-<seed>-<method>.json, and not repeated: a killed command, given
again, goes on. Dense models are kept in --models, for the methods that start from them.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from transformers import Trainer, TrainingArguments, set_seed


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from inputs import keep_quiet, load_tokenizer, make_batches, minilm  # noqa: E402
from measure import environment, read_filled  # noqa: E402

from hf_budgetformer import BudgetCallback, BudgetFormerForSequenceClassification, add_teacher_logits  # noqa: E402
from hf_budgetformer.losses import teacher_divergence  # noqa: E402
from hf_budgetformer.tools.baselines import drop_layers, head_importance, most_important, prune  # noqa: E402
from hf_budgetformer.tools.data import weights_digest  # noqa: E402
from hf_budgetformer.tools.profiling import profile  # noqa: E402


SETTINGS: dict[str, Any] = {
    "title": "",
    # {"name", "max_length", "train", "test"}: rows of each split; "methods" where they differ; "head_and_tail": of a
    # long text keep as much from its end as from its start.
    "data": [],
    "seeds": [0, 1, 2],
    "methods": [],  # names of METHODS; "dense" always comes first
    "budgets": [1.0, 0.75, 0.5, 1 / 3, 0.25, 1 / 6, 0.125],
    "batch_size": 16,
    "bf16": False,  # autocast while training; several times faster where the processor multiplies bfloat16
    "dense": {"epochs": 3.0, "learning_rate": 2e-4},
    "budget_stage": {"epochs": 2.0, "learning_rate": 1e-4, "router_learning_rate": 2e-3},
}
# What differs from the recipe: "share" of the heads of models cut before they are trained, fields of the "config".
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "ours": {},
    "equal budgets": {"config": {"need_scale": 0.0}},
    "half the task's loss": {"config": {"distillation_weight": 0.5}},
    "heads not ranked": {"rank": False},
    "three times the steps": {"longer": 3.0},  # as many as static pruning needs for three budgets
    "fixed heads": {"fixed_heads": True},
    "without teacher": {"teacher": None},
    "own teacher": {"teacher": "self"},
    "one stage": {"teacher": None, "start": "pretrained"},
    "paper-literal": {
        "teacher": None,
        "config": {"gate_type": "soft", "target_head_budget": None, "budget_sampling": 0.0},
    },
    "dense again": {"share": 1.0},
    **{
        f"{name} {share}": {"share": share, "cut": name}
        for name in ("static", "iterative", "per layer", "random", "layers")
        for share in (0.5, 0.25, 0.125)
    },
}


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of an experiment, defaults filled in; ends with a message that names what is wrong."""
    settings = read_filled(path, SETTINGS)
    if unknown := sorted(set(settings["methods"]) - METHODS.keys()):
        raise SystemExit(f"{path}: unknown methods {unknown}; there are {sorted(METHODS)}.")
    for stage in ("dense", "budget_stage"):
        settings[stage] = {**SETTINGS[stage], **settings[stage]}
    return settings


def read_rows(folder: Path, source: dict[str, Any], split: str, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """Tokenized rows of a split, drawn by the seed; and where they are from."""
    import pyarrow.parquet

    path = folder / source["name"] / f"{split}.parquet"
    if not path.is_file():
        raise SystemExit(f"--data {folder}: there is no {source['name']}/{split}.parquet in it.")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows = random.Random(seed).sample(rows, min(source[split], len(rows)))
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    texts = [row["text"] for row in rows]
    if source.get("head_and_tail"):
        seconds = pairs or [None] * len(texts)
        texts = [head_and_tail(x, y, source["max_length"]) for x, y in zip(texts, seconds, strict=True)]
    encoded = load_tokenizer()(texts, pairs, truncation=True, max_length=source["max_length"])
    columns = {"input_ids": encoded["input_ids"], "token_type_ids": encoded["token_type_ids"]}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    labels = [row["label"] for row in rows]
    return Dataset.from_dict({**columns, "labels": labels}), {"name": f"{source['name']}/{split}", "sha256": digest}


def head_and_tail(text: str, pair: str | None, max_length: int) -> str:
    """What is left of a text cut in its middle, such that it and its pair are at most `max_length` tokens long."""
    tokenizer = load_tokenizer()
    room = max_length - len(tokenizer("", pair)["input_ids"])
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(places) <= room:
        return text
    return text[: places[room // 2 - 1][1]] + " " + text[places[room // 2 - room][0] :]


class SelfTeacher(Trainer):
    """Asks the model itself, all heads open, in place of a teacher."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream, with teacher_logits."""
        model.eval()
        with torch.no_grad():
            teacher = model(**{k: v for k, v in inputs.items() if k != "labels"}, head_budget=1.0).logits
        model.train()
        return super().compute_loss(model, {**inputs, "teacher_logits": teacher}, *args, **kwargs)


def train(
    model: Any,
    rows: Dataset,
    stage: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    kind: type[Trainer] = Trainer,
    rank: bool = True,
) -> tuple[Any, float]:
    """Trains with the plain Trainer, word embeddings frozen; the model in eval mode, and the seconds it took."""
    set_seed(seed)
    model.base_model.embeddings.requires_grad_(False)
    arguments = TrainingArguments(
        "build/accuracy", num_train_epochs=stage["epochs"], learning_rate=stage["learning_rate"], warmup_steps=0.1,
        per_device_train_batch_size=settings["batch_size"], train_sampling_strategy="group_by_length",
        save_strategy="no", logging_strategy="no", seed=seed, report_to="none", disable_tqdm=True, use_cpu=True,
        bf16=settings["bf16"], dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [BudgetCallback(rank=rank)] if model.config.static_heads is None else None
    trainer = kind(
        model,
        arguments,
        train_dataset=rows,
        processing_class=load_tokenizer(),
        callbacks=callbacks,  # type: ignore[arg-type]
    )
    start = time.perf_counter()
    trainer.train()
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def answers(model: Any, rows: Dataset, head_budget: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, labels), and the share of heads each input used (N,), in the order of the rows."""
    ids, types = rows["input_ids"], rows["token_type_ids"]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    logits, heads = [], []
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        [batch] = make_batches([ids[row] for row in chosen], len(chosen), False)
        longest = batch["input_ids"].shape[1]
        batch["token_type_ids"] = torch.tensor([types[row] + [0] * (longest - len(types[row])) for row in chosen])
        outputs = model(**batch, head_budget=head_budget)
        logits.append(outputs.logits)
        heads.append(outputs.head_budget)
    places = torch.tensor(order).argsort()
    return torch.cat(logits)[places], torch.cat(heads)[places]


def judge(
    model: Any, test: Dataset, budget: float | None, dense: torch.Tensor, layers: int
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Figures of a model at one budget; what it costs each input and how many heads it used, (N,) both.

    Heads and FLOPs are shares of those of a model of `layers` layers.
    """
    logits, heads = answers(model, test, budget)
    depth = model.config.num_hidden_layers / layers
    heads = depth * heads
    labels, predicted = torch.tensor(test["labels"]), logits.argmax(-1)
    cost = teacher_divergence(logits, dense, "")
    [batch] = make_batches(test["input_ids"][:64], 64, False)
    flops = profile(model, batch, budget)
    bits = {name: "".join(map(str, x.int().tolist())) for name, x in (
        ("correct", predicted == labels), ("agrees", predicted == dense.argmax(-1)))}  # fmt: skip
    return (
        {
            "asked": budget,
            "accuracy": (predicted == labels).float().mean().item(),
            "agreement": (predicted == dense.argmax(-1)).float().mean().item(),
            "divergence": cost.mean().item(),
            "heads": heads.mean().item(),
            "heads_std": heads.std().item(),
            "flops_ratio": depth * sum(flops.sparse.values()) / (sum(flops.backbone.values()) * flops.token_share),
            **bits,
        },
        cost,
        heads,
    )


def cut_model(model: Any, spec: dict[str, Any], share: float, rows: Dataset, seed: int) -> Any:
    """A model without the heads or layers that a method does without."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    if share == 1.0:
        return prune(model, [list(range(heads))] * layers)
    if spec["cut"] == "layers":  # as few heads, but feed-forward layers are gone too
        return drop_layers(model, max(1, round(share * layers)))
    count = max(layers, round(share * layers * heads))
    if spec["cut"] == "random":
        return prune(model, most_important(torch.rand(layers, heads, generator=torch.manual_seed(seed)), count))
    importance, per_layer = head_importance(model, importance_batches(rows)), spec["cut"] == "per layer"
    return prune(model, most_important(importance, count - count % layers * per_layer, per_layer))


def importance_batches(rows: Dataset) -> list[dict[str, torch.Tensor]]:
    """A few labelled batches of the training rows, as head importance is estimated from."""
    chosen = rows.select(range(min(256, len(rows))))
    batches = make_batches(chosen["input_ids"], 32, False)
    for index, batch in enumerate(batches):
        batch["labels"] = torch.tensor(chosen["labels"][index * 32 : (index + 1) * 32])
    return batches


def run_method(
    name: str, dense: Any, pretrained: Any, rows: Dataset, settings: dict[str, Any], seed: int
) -> tuple[Any, float]:
    """Trains a method; the model, and the seconds that took."""
    spec, stage = METHODS[name], dict(settings["budget_stage"])
    if spec.get("cut") == "iterative":  # half of the steps on the way, in two cuts
        halfway = {**stage, "epochs": stage["epochs"] / 2}
        model, first = train(cut_model(dense, spec, spec["share"] ** 0.5, rows, seed), rows, halfway, settings, seed)
        model, second = train(cut_model(model, spec, spec["share"], rows, seed), rows, halfway, settings, seed + 1)
        return model, first + second
    if "share" in spec:
        return train(cut_model(dense, spec, spec["share"], rows, seed), rows, stage, settings, seed)
    start, kind = dense, SelfTeacher if spec.get("teacher") == "self" else Trainer
    if spec.get("start") == "pretrained":  # as many steps as the two stages together
        start = pretrained
        stage |= {**settings["dense"], "epochs": stage["epochs"] + settings["dense"]["epochs"]}
    stage["epochs"] *= spec.get("longer", 1.0)
    if "teacher" in spec:
        rows = rows.remove_columns("teacher_logits")
    multiplier = settings["budget_stage"]["router_learning_rate"] / stage["learning_rate"]
    fields = {**start.config.to_dict(), "static_heads": None, "router_lr_multiplier": multiplier}
    set_seed(seed)
    model = BudgetFormerForSequenceClassification(type(start.config)(**{**fields, **spec.get("config", {})}))
    model.load_state_dict(start.state_dict(), strict=False)
    if spec.get("fixed_heads"):
        for layer in model.base_model.encoder.layer:
            torch.nn.init.zeros_(layer.router.scorer.weight)
            layer.router.scorer.weight.requires_grad_(False)
    return train(model, rows, stage, settings, seed, kind, spec.get("rank", True))


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """(N, labels) -> (N,), nats."""
    return torch.distributions.Categorical(logits=logits).entropy()


def run_chain(
    source: dict[str, Any], seed: int, settings: dict[str, Any], data: Path, output: Path, models: Path
) -> None:
    """All methods of one data set and seed, one after the other, on one thread: what is there already is left alone."""
    torch.set_num_threads(1)
    keep_quiet()
    machine = environment()
    (rows, from_train), (test, from_test) = (read_rows(data, source, split, seed) for split in ("train", "test"))
    labels = len(set(rows["labels"]))
    label_names = {"id2label": {i: str(i) for i in range(labels)}, "label2id": {str(i): i for i in range(labels)}}

    def place_of(name: str) -> Path:
        return output / f"{source['name']}-{seed}-{name.replace(' ', '_')}.json"

    def write(name: str, seconds: float, figures: dict[str, Any]) -> None:
        path = place_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {
            "data": source["name"],
            "seed": seed,
            "method": name,
            "source": source,
            "files": [from_train, from_test],
        }
        about |= {"settings": {key: settings[key] for key in ("batch_size", "bf16", "dense", "budget_stage")}}
        about |= {"environment": machine, "train_seconds": round(seconds), "rows": [len(rows), len(test)]}
        path.write_text(json.dumps({**about, **figures}) + "\n")
        print(f"{path}: {seconds:.0f} s", flush=True)

    set_seed(seed)
    pretrained = BudgetFormerForSequenceClassification.from_pretrained(minilm(), **label_names)
    place = models / f"{source['name']}-{seed}-dense"
    if not (place / "config.json").exists():
        every = list(range(pretrained.config.num_attention_heads))
        start = prune(pretrained, [every] * pretrained.config.num_hidden_layers)
        dense, seconds = train(start, rows, settings["dense"], settings, seed)
        dense.save_pretrained(place)
        logits, _ = answers(dense, test)
        figures, _, _ = judge(dense, test, None, logits, dense.config.num_hidden_layers)
        write("dense", seconds, {"evaluations": [figures], "entropy": entropy(logits).mean().item()})
    dense = BudgetFormerForSequenceClassification.from_pretrained(place).eval()
    expected, _ = answers(dense, test)
    rows = add_teacher_logits(rows, dense, load_tokenizer())
    for name in source.get("methods", settings["methods"]):
        if name == "dense" or place_of(name).exists():
            continue
        model, seconds = run_method(name, dense, pretrained, rows, settings, seed)
        static = model.config.static_heads is not None
        found: dict[str, Any] = {"evaluations": []}
        spent, costs = {}, {}
        for budget in [None] if static else [*settings["budgets"], None]:
            figures, costs[budget], spent[budget] = judge(model, test, budget, expected, dense.config.num_hidden_layers)
            found["evaluations"].append(figures)
        if not static and 0.25 in spent:
            low = min(x for x in costs if x is not None)
            found["spearman"] = {
                "entropy": float(spearmanr(spent[0.25], entropy(expected)).statistic),
                "cost": float(spearmanr(spent[0.25], costs[low]).statistic),
                "cost_at": low,
            }
        if not static:
            model.save_pretrained(models / place_of(name).stem)
            found["weights"] = weights_digest(model)
        write(name, seconds, found)


def main(arguments: list[str] | None = None) -> None:
    """Runs every experiment named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="+", type=Path, help="JSON files, see benchmarks/accuracy/experiments")
    parser.add_argument("--data", type=Path, required=True, help="folder of <name>/train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--models", type=Path, default=HERE.parents[1] / "build" / "accuracy")
    parser.add_argument("--jobs", type=int, default=1, help="data sets and seeds at a time, a thread each")
    options = parser.parse_args(arguments)
    experiments = {path: read_settings(path) for path in options.experiments}
    for path, settings in experiments.items():
        chains = [(source, seed) for seed in settings["seeds"] for source in settings["data"]]
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            folders = (settings, options.data, options.output / path.stem, options.models / path.stem)
            for future in [pool.submit(run_chain, *chain, *folders) for chain in chains]:
                future.result()


if __name__ == "__main__":
    main()
