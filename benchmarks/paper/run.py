"""The paper's experiment (arXiv 2604.22583), smaller: its encoder, trained from scratch with and without its routers.

    python benchmarks/paper/run.py benchmarks/paper/ag_news.json --data FOLDER

Each training writes results/<experiment>-<variant>-<seed>.json as soon as it has ended, so that a command that was
interrupted goes on with --resume. Variants share data, architecture, optimiser and the rate of their routers; they
differ in the fields of the configuration that `VARIANTS` names and in nothing else.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from inputs import keep_quiet, load_tokenizer
from measure import environment, read_filled
from paper.flops import count_flops
from torch import nn
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_budgetformer import BudgetCallback, BudgetFormerConfig, BudgetFormerForSequenceClassification


BUDGETS = (0.1, 0.25, 0.5, 1.0)  # of the paper's ablations
LITERAL = {"gate_type": "soft", "target_budget": None, "budget_sampling": 0.0, "need_scale": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"looks": [1.0]},  # full attention: nothing is routed
    "literal": LITERAL,  # the paper, word for word
    "ours": {},
    **{f"literal-{budget}": {**LITERAL, "looks": [budget]} for budget in BUDGETS},  # ablations: a fixed s
}

SETTINGS: dict[str, Any] = {
    "title": "",
    "data": "ag_news",
    "train_rows": 0,  # 0: all
    "test_rows": 0,
    "max_length": 64,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "epochs": 3.0,
    "learning_rate": 5e-4,
    "router_learning_rate": 2e-3,
    "batch_size": 32,
    "variants": list(VARIANTS),
    "seeds": [0, 1, 2],
    "ablation_seeds": [0],
}


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of an experiment, defaults filled in; ends with a message that names what is wrong."""
    settings = read_filled(path, SETTINGS)
    for name, default in SETTINGS.items():
        value, kinds = settings[name], (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds):
            raise SystemExit(f"{path}: {name} must be a {' or '.join(k.__name__ for k in kinds)}, got {value!r}.")
        if isinstance(value, (int, float)) and (value < 0 or (value == 0 and default != 0)):
            raise SystemExit(f"{path}: {name} must be {'> 0' if default else '>= 0'}, got {value!r}.")
    if not all(isinstance(seed, int) for seed in settings["seeds"] + settings["ablation_seeds"]):
        raise SystemExit(f"{path}: seeds and ablation_seeds must hold integers.")
    if unknown := [name for name in settings["variants"] if name not in VARIANTS]:
        raise SystemExit(f"{path}: unknown variants {unknown}; there are {list(VARIANTS)}.")
    return settings


def list_runs(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of each training, all variants of one seed after the other."""
    shared = {name: x for name, x in settings.items() if name not in ("variants", "seeds", "ablation_seeds")}
    return [
        {**shared, "variant": name, "fields": VARIANTS[name], "seed": seed}
        for seed in sorted({*settings["seeds"], *settings["ablation_seeds"]})
        for name in settings["variants"]
        if seed in settings["ablation_seeds" if name.startswith("literal-") else "seeds"]
    ]


def read_split(data: Path, split: str, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Tokenized rows with their labels, drawn at random where not all are wanted; and where they are from."""
    import pyarrow.parquet  # datasets brings it

    path = data / settings["data"] / f"{split}.parquet"
    if not path.is_file():
        raise SystemExit(f"--data {data}: there is no {settings['data']}/{split}.parquet in it.")
    table = pyarrow.parquet.read_table(path)
    if missing := {"text", "label"} - set(table.column_names):
        raise SystemExit(f"{path}: needs the columns text, label and perhaps text_pair, lacks {sorted(missing)}.")
    count = settings[f"{split}_rows"] or len(table)
    if count > len(table):
        raise SystemExit(f"{path}: {count} rows are asked for, there are {len(table)}.")
    drawn = table.take(random.Random(0).sample(range(len(table)), count)).to_pydict()
    encoded = load_tokenizer()(
        drawn["text"], drawn.get("text_pair"), truncation=True, max_length=settings["max_length"]
    )
    columns = {**encoded, "labels": drawn["label"]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows, {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rows": count, "rows_in_file": len(table)}


def build_model(settings: dict[str, Any], labels: int) -> Any:
    """The paper's encoder with random weights."""
    config = BudgetFormerConfig(
        vocab_size=len(load_tokenizer()),
        hidden_size=settings["hidden_size"],
        intermediate_size=4 * settings["hidden_size"],
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=settings["num_attention_heads"],
        max_position_embeddings=settings["max_length"],
        num_labels=labels,
        router="layer",
        router_lr_multiplier=settings["router_learning_rate"] / settings["learning_rate"],
        **settings["fields"],
    )
    return BudgetFormerForSequenceClassification(config)


def train(model: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, float]:
    """Trains with the plain Trainer; returns steps, seconds and the mean loss, all of its terms."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=settings["epochs"], learning_rate=settings["learning_rate"], warmup_steps=0.1,
            per_device_train_batch_size=settings["batch_size"], train_sampling_strategy="group_by_length",
            seed=settings["seed"], save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        collator = DataCollatorWithPadding(load_tokenizer())
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[BudgetCallback()])
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    return {"steps": result.global_step, "seconds": result.metrics["train_runtime"], "loss": result.training_loss}


def layers_of(model: Any) -> Any:
    """The encoder's layers."""
    return model.base_model.encoder.layer


@contextmanager
def hooked(modules: Iterable[nn.Module], keep: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, `keep` is given whatever the modules return; what it returns, if anything, takes its place."""
    handles = [module.register_forward_hook(lambda module, given, output: keep(output)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_heads(model: Any) -> AbstractContextManager[None]:
    """While it lasts, routers open as many heads as they would, but any: others for each input and layer."""
    return hooked((layer.router.scorer for layer in layers_of(model)), torch.rand_like)


@contextmanager
def soft_gates(model: Any) -> Iterator[None]:
    """While it lasts, routers weigh heads as they did when training ended, and dropout stays off.

    Such gates are numbers in between: ask with `executor="masked"`, which multiplies by them.
    """
    routers = [layer.router for layer in layers_of(model)]
    for router in routers:
        router.train()
    try:
        yield
    finally:
        for router in routers:
            router.eval()


class Scorer:
    """The test texts, and what is measured on them.

    Args:
        rows: Token ids and labels.
        batch_size: Texts a batch, sorted by length.
    """

    def __init__(self, rows: list[dict[str, Any]], batch_size: int) -> None:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        self.labels = torch.tensor([row["labels"] for row in rows])
        inputs = [{name: x for name, x in row.items() if name != "labels"} for row in rows]
        pieces = [inputs[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        self.batches = [load_tokenizer().pad(piece, return_tensors="pt") for piece in pieces]
        self.full: dict[str, int] = {}

    def _accuracy(self, logits: list[torch.Tensor]) -> float:
        return (torch.cat(logits).argmax(-1).cpu() == self.labels).double().mean().item()

    def _flops(self, model: Any, budget: float | None) -> dict[str, int]:
        counts = [count_flops(model, batch.to(model.device), budget) for batch in self.batches]
        return {part: sum(x[part] for x in counts) for part in counts[0]}

    @torch.no_grad()
    def score(self, model: Any, budget: float | None = None) -> dict[str, Any]:
        """Accuracy and cost at a budget; None: the model's own, or that of its configuration.

        "flops_cut" is the share of full attention's FLOPs, all of the model's on the same tokens, that is saved;
        padding counts in neither. "core_only" is the paper's way of counting: a closed head saves its attention core
        (scores and weighted sum), its projections are paid all the same, and routers cost nothing. "true" counts what
        skipping every closed head computes: projections and cores of open heads, and the routers.

        "mean_budget" is the controllers' s, its mean over inputs and layers; "head_share" the share of heads that ran.
        """
        if not self.full:  # depends on the architecture alone
            self.full = self._flops(model, 1.0)
        outputs: list[Any] = []
        budgets: list[torch.Tensor] = []
        routers = [layer.router for layer in layers_of(model)]
        with hooked([model], outputs.append), hooked(routers, lambda routing: budgets.append(routing.budget)):
            spent = self._flops(model, budget)
        total = sum(self.full.values())
        return {
            "accuracy": self._accuracy([x.logits for x in outputs]),
            "n": len(self.labels),
            "head_share": torch.cat([x.budget for x in outputs]).mean().item(),
            "mean_budget": torch.cat(budgets).mean().item() if budgets else 1.0,  # all heads are not routed
            "flops_cut": {
                "core_only": (self.full["core"] - spent["core"]) / total,
                "true": 1 - sum(spent.values()) / total,
            },
        }

    @torch.no_grad()
    def norms(self, model: Any, budget: float | None) -> tuple[torch.Tensor, float]:
        """L2 norm of each input's gated attention output, before its projection, (inputs, layers); and accuracy."""
        contexts: list[torch.Tensor] = []
        norms, logits = [], []
        with hooked([layer.attention.self for layer in layers_of(model)], lambda output: contexts.append(output[0])):
            for batch in self.batches:
                batch = batch.to(model.device)
                logits.append(model(**batch, budget=budget, executor="masked").logits)
                mask = batch["attention_mask"][..., None]  # (B, L, 1)
                norms.append(torch.stack([(x * mask).flatten(1).norm(dim=-1) for x in contexts], dim=-1))
                contexts.clear()
        return torch.cat(norms), self._accuracy(logits)

    def explain(self, model: Any) -> dict[str, Any]:
        """What the hard gates of inference make of a model that was trained with soft ones.

        "norm_ratio" has, for each budget and layer, the norm of the gated attention output with hard gates over that
        with the soft weights that training ended with, at the model's own budget: the mean of the ratio over inputs.
        "soft_accuracy" is the accuracy with the soft weights themselves, at the own budget and at s = 1.
        """
        with soft_gates(model):
            soft, accuracy = self.norms(model, None)
            _, everything = self.norms(model, 1.0 - 1e-6)  # 1.0 itself is not routed
        budgets = {"own": None, **{str(budget): budget for budget in BUDGETS}}
        ratios = {name: (self.norms(model, budget)[0] / soft).mean(0).tolist() for name, budget in budgets.items()}
        return {"soft_accuracy": {"own": accuracy, "1.0": everything}, "norm_ratio": ratios}


def run(settings: dict[str, Any], rows: list[dict[str, Any]], labels: int, scorer: Scorer) -> dict[str, Any]:
    """Trains one variant and measures it."""
    set_seed(settings["seed"])
    model = build_model(settings, labels)
    training = train(model, rows, settings)
    model.eval()
    evaluations = {"own": scorer.score(model)}
    if "looks" not in settings["fields"]:
        evaluations |= {str(budget): scorer.score(model, budget) for budget in BUDGETS}
    if settings["variant"] != "literal":
        return {"figures": {"training": training, "evaluations": evaluations}}
    set_seed(settings["seed"])
    with random_heads(model):
        evaluations["random"] = scorer.score(model)
    return {"figures": {"training": training, "evaluations": evaluations}, "explanation": scorer.explain(model)}


def main(arguments: list[str] | None = None) -> None:
    """Runs the trainings of an experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="JSON file of settings, see ag_news.json")
    parser.add_argument("--data", type=Path, required=True, help="folder of <name>/train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--resume", action="store_true", help="skip what has a result of the same settings and data")
    options = parser.parse_args(arguments)
    keep_quiet()
    settings = read_settings(options.experiment)
    splits = {split: read_split(options.data, split, settings) for split in ("train", "test")}
    data = {"name": settings["data"], **{split: source for split, (_, source) in splits.items()}}
    rows, test = splits["train"][0], splits["test"][0]
    labels, scorer = 1 + max(row["labels"] for row in rows + test), Scorer(test, settings["batch_size"])
    options.output.mkdir(parents=True, exist_ok=True)
    for run_settings in list_runs(settings):
        target = options.output / f"{options.experiment.stem}-{run_settings['variant']}-{run_settings['seed']}.json"
        if options.resume and target.exists():
            before = json.loads(target.read_text())
            if (before["settings"], before["data"]) == (run_settings, data):
                print(f"{target}: there already", flush=True)
                continue
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        machine, start = {**environment(), "gpu": gpu, "threads": torch.get_num_threads()}, time.perf_counter()
        outcome = run(run_settings, rows, labels, scorer)
        seconds = round(time.perf_counter() - start)
        result = {"experiment": options.experiment.stem, "settings": run_settings, "environment": machine, "data": data}
        unfinished = target.with_suffix(".tmp")  # or --resume would stumble over half a file
        unfinished.write_text(json.dumps({**result, "seconds": seconds, **outcome}, indent=1) + "\n")
        unfinished.replace(target)
        print(f"{target}: {seconds} s, accuracy {outcome['figures']['evaluations']['own']['accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
