"""The command line, `budgetformer`: each command is a thin layer over a function of this package.

Imports nothing heavy before a command runs, so that help comes at once.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any


try:
    import typer
except ImportError:
    raise ImportError('The command line needs typer: pip install "hf-budgetformer[cli]".') from None


Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a model.")]
Data = Annotated[str, typer.Argument(metavar="DATA", help="parquet, csv or jsonl file, folder of such, or Hub id.")]
Split = Annotated[str | None, typer.Option(help="Of a data set that has several.", show_default=False)]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="text=NAME, text_pair=NAME or label=NAME, if named otherwise.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without broken rows.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Budgets = Annotated[str, typer.Option(help="Shares of the heads, and own, with commas between.")]
HeadBudget = Annotated[float | None, typer.Option(help="Share of the heads; default: the model's own.")]
BatchSize = Annotated[int, typer.Option(help="Texts the model reads at a time.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens kept of a text; default: all the tokenizer allows.")]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="BudgetFormer: classifiers that choose their attention heads for each text.",
    epilog="Exit codes: 0 done, 1 it failed, and one line on stderr says why, 2 wrong usage.",
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; give it first.")] = False,
) -> None: ...


def _parse_budgets(text: str) -> list[float | None]:
    try:
        return [None if part.strip() == "own" else float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--budgets must be numbers in (0, 1], or own, with commas between, got {text!r}."
        ) from None


def _parse_pairs(option: str, given: list[str] | None) -> dict[str, str]:
    if wrong := [pair for pair in given or [] if "=" not in pair]:
        raise typer.BadParameter(f"{option} must be NAME=VALUE, got {wrong[0]!r}.")
    return {name: value for name, _, value in (pair.partition("=") for pair in given or [])}


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _parse_training_arguments(given: list[str]) -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    parser: Any = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]

    def refuse(message: str) -> None:
        raise typer.BadParameter(message)

    parser.error = refuse
    arguments, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown:
        raise typer.BadParameter(f"neither this command nor TrainingArguments knows {' '.join(unknown)}.")
    return arguments


def _read_lines() -> Iterator[str]:
    if sys.stdin.isatty():
        raise typer.BadParameter("there is nothing to read: give texts, --file, or lines on standard input.")
    return (line.rstrip("\r\n") for line in sys.stdin)


def _keep_quiet() -> None:
    """Bars are for people, not for logs; what the library reports while loading is checked here."""
    from datasets import disable_progress_bars  # type: ignore[import-untyped]
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


def _read(data: str, split: str | None, columns: list[str] | None, skip_bad: bool) -> Any:
    from hf_budgetformer.tools.data import read_table

    _keep_quiet()
    return read_table(data, split, _parse_pairs("--column", columns), skip_bad)


def _load(checkpoint: str, budgeted: bool = True) -> tuple[Any, Any]:
    from hf_budgetformer.tools.data import load_classifier

    _keep_quiet()
    return load_classifier(checkpoint, budgeted)


def _finish(found: Any, as_json: bool, checkpoint: str, name: str) -> None:
    """Prints a result, then keeps it beside its checkpoint, if that is a folder."""
    from hf_budgetformer.tools.data import write_json

    print(json.dumps(found.to_dict()) if as_json else found)
    if Path(checkpoint).is_dir():
        write_json(Path(checkpoint) / "budgetformer" / f"{name}.json", found.to_dict())


def _training(checkpoint: str) -> dict[str, Any]:
    """What `train` left beside a checkpoint, if anything."""
    path = Path(checkpoint) / "budgetformer" / "training.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: budgetformer train bert-base-uncased train.csv --output out --learning_rate 3e-5",
)
def train(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Data,
    output: Annotated[str, typer.Option("--output", "--output_dir", help="Folder for the model.", show_default=False)],
    validation: Annotated[str | None, typer.Option(help="Data to evaluate on.", show_default=False)] = None,
    validation_split: Split = None,
    teacher: Annotated[
        str | None, typer.Option(help="Fine-tuned classifier to learn from, in place of stage one.", show_default=False)
    ] = None,
    one_stage: Annotated[bool, typer.Option("--one-stage", help="Train without a teacher.")] = False,
    config: Annotated[
        list[str] | None, typer.Option(help="FIELD=VALUE of BudgetFormerConfig; may be repeated.", show_default=False)
    ] = None,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    with_card: Annotated[bool, typer.Option("--card", help="Write the model card at the end.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the plain model, then train a BudgetFormer that it teaches.

    After CHECKPOINT and DATA, every option of TrainingArguments is one of this command too; it holds for both stages.
    """
    if stray := [argument for argument in (checkpoint, data) if argument.startswith("-")]:
        raise typer.BadParameter(f"CHECKPOINT and DATA come first, got {stray[0]} before them.")
    fields = {name: _parse_value(text) for name, text in _parse_pairs("--config", config).items()}
    arguments = _parse_training_arguments([*context.args, "--output_dir", output])
    from hf_budgetformer.tools.recipe import train_classifier

    Path(output).mkdir(parents=True, exist_ok=True)
    rows = _read(data, split, column, skip_bad)
    held_out = _read(validation, validation_split, column, skip_bad) if validation else None
    with contextlib.redirect_stdout(sys.stderr):  # what the Trainer prints is no result
        found = train_classifier(
            checkpoint, rows, arguments, held_out, teacher, one_stage, max_length, source=data, **fields
        )
    if with_card:
        from hf_budgetformer.tools.model_card import write_model_card

        write_model_card(output)
    told = {"output": output, **{name: found[name] for name in ("teacher", "rows", "seconds", "validation")}}
    if as_json:
        print(json.dumps(told))
    else:
        figures = f", accuracy {found['validation']['eval_accuracy']:.1%} on {validation}" if validation else ""
        print(f"Saved in {output}: trained on {found['rows']} rows{figures}.")


@app.command(epilog="Example: budgetformer evaluate out test.csv --budgets 1,0.5,0.25,own")
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    budgets: Budgets = "1,0.5,0.25,0.125,own",
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Accuracy and heads at several budgets; a stock or baked model is tried as it is."""
    asked = _parse_budgets(budgets)
    from dataclasses import replace

    from hf_budgetformer.tools.evaluation import evaluate_budgets

    model, tokenizer = _load(checkpoint, budgeted=False)
    found = evaluate_budgets(model, _read(data, split, column, skip_bad), tokenizer, asked, batch_size, max_length)
    seed = _training(checkpoint).get("arguments", {}).get("seed")
    found = replace(found, settings={**found.settings, "data": data, "split": split, "seed": seed})
    _finish(found, as_json, checkpoint, "evaluation")


@app.command(epilog="Example: budgetformer tune out validation.csv --tolerance 0.01 --write")
def tune(
    checkpoint: Checkpoint,
    data: Data,
    tolerance: Annotated[float, typer.Option(help="Accuracy that may be lost; 0.005 is half a point.")] = 0.005,
    confidence: Annotated[float, typer.Option(help="That no more is lost.")] = 0.95,
    budgets: Annotated[str | None, typer.Option(help="Candidates, with commas; default: each count of heads.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Set the budget in the folder's config.json.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order in which rows are looked at.")] = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """The smallest budget that keeps accuracy, with confidence."""
    if write and not Path(checkpoint).is_dir():
        raise typer.BadParameter(f"--write needs a folder, got {checkpoint}.")
    asked: Any = None if budgets is None else _parse_budgets(budgets)
    from hf_budgetformer.tools.data import write_json
    from hf_budgetformer.tools.tuning import tune_budget

    model, tokenizer = _load(checkpoint)
    rows = _read(data, split, column, skip_bad)
    found = tune_budget(model, rows, tokenizer, asked, tolerance, confidence, batch_size, seed, "flops", max_length)
    _finish(found, as_json, checkpoint, "tuning")
    if write:
        path = Path(checkpoint) / "config.json"
        write_json(path, {**json.loads(path.read_text("utf-8")), "head_budget": found.budget})


@app.command(epilog="Example: budgetformer profile out test.csv --budgets 1,0.25,own --rows 512")
def profile(
    checkpoint: Checkpoint,
    data: Data,
    budgets: Budgets = "1,0.5,0.25,own",
    rows: Annotated[int, typer.Option(help="Texts that are measured.")] = 256,
    repeats: Annotated[int, typer.Option(help="Times each batch is run.")] = 5,
    energy: Annotated[bool, typer.Option("--energy", help="Measure energy and CO2e too.")] = False,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Time, FLOPs and memory beside the stock model, measured here; after how many texts training has paid."""
    asked = _parse_budgets(budgets)
    from hf_budgetformer.tools.profiling import cost_card

    model, tokenizer = _load(checkpoint)
    texts, seconds = _read(data, split, column, skip_bad), _training(checkpoint).get("seconds")
    found = cost_card(model, texts, tokenizer, asked, batch_size, rows, repeats, max_length, seconds, energy)
    _finish(found, as_json, checkpoint, "costs")


@app.command(epilog="Example: budgetformer bake out train.csv --output baked --head-budget 0.25 --test test.csv")
def bake(
    checkpoint: Checkpoint,
    data: Data,
    output: Annotated[str, typer.Option(help="Folder for the baked model.", show_default=False)],
    head_budget: HeadBudget = None,
    test: Annotated[str | None, typer.Option(help="Data to evaluate the baked model on.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(help="Texts that choose the heads, drawn at random.")] = 2000,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Cut a model down to the heads it opens most often: small, static, and plain enough for any runtime."""
    from dataclasses import replace

    from transformers.utils import logging

    from hf_budgetformer.tools.data import batches_by_length, write_json
    from hf_budgetformer.tools.evaluation import evaluate_budgets
    from hf_budgetformer.tools.export import bake

    if Path(output).resolve() == Path(checkpoint).resolve():
        raise ValueError(f"output must not be the checkpoint's own folder, got {output}.")
    model, tokenizer = _load(checkpoint)
    texts = _read(data, split, column, skip_bad).shuffle(seed=0)
    batches = batches_by_length(texts[:rows], tokenizer, batch_size, max_length)
    bar = logging.tqdm(batches, desc="Counting open heads", unit=" batches", leave=False, disable=None)
    baked = bake(model, (batch for _, batch in bar), head_budget)
    baked.save_pretrained(output)
    tokenizer.save_pretrained(output)
    kept = baked.config.static_heads
    told: dict[str, Any] = {"output": output, "static_heads": kept}
    if test:
        found = evaluate_budgets(
            baked, _read(test, split, column, skip_bad), tokenizer, (None,), batch_size, max_length
        )
        found = replace(found, settings={**found.settings, "checkpoint": output, "data": test, "budget": head_budget})
        told["evaluation"] = found.to_dict()
        write_json(Path(output) / "budgetformer" / "evaluation.json", found.to_dict())
        if Path(checkpoint).is_dir():
            write_json(Path(checkpoint) / "budgetformer" / "static.json", found.to_dict())
    if as_json:
        print(json.dumps(told))
    else:
        print(
            f"Saved in {output}: {sum(map(len, kept))} heads are left, by layer {', '.join(str(len(x)) for x in kept)}."
        )
        if test:
            print(found)


@app.command(epilog="Example: budgetformer export baked baked.onnx --quantize")
def export(
    checkpoint: Checkpoint,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Of the onnx file.")],
    head_budget: HeadBudget = None,
    quantize: Annotated[bool, typer.Option("--quantize", help="Weights in int8.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, for onnxruntime; bake it first, or closed heads save nothing there."""
    from hf_budgetformer.tools.export import export_onnx

    model, _ = _load(checkpoint)
    with contextlib.redirect_stdout(sys.stderr):
        path = export_onnx(model, output, head_budget, quantize)
    print(json.dumps({"output": str(path)}) if as_json else f"Saved as {path}.")


@app.command(epilog="Example: budgetformer card out --repo-id me/my-budgetformer --license apache-2.0")
def card(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder of a BudgetFormer.")],
    repo_id: Annotated[str | None, typer.Option(help="The model's name on the Hub.", show_default=False)] = None,
    language: Annotated[str | None, typer.Option(help="Of the texts, an ISO code.", show_default=False)] = None,
    license: Annotated[str | None, typer.Option(help="Of the model, as the Hub names it.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Write README.md and plots from what the other commands left; what you wrote in it stays."""
    from hf_budgetformer.tools.model_card import write_model_card

    path = write_model_card(checkpoint, repo_id, language, license)
    print(json.dumps({"output": str(path)}) if as_json else f"Saved as {path}.")


@app.command(epilog="Example: budgetformer predict out --file texts.csv --output answers.jsonl --budgets")
def predict(
    checkpoint: Checkpoint,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Default: the lines of standard input.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="parquet, csv, jsonl or txt file, or Hub id, instead.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="jsonl file; with --file, a run that was cut off goes on.", show_default=False)
    ] = None,
    head_budget: HeadBudget = None,
    budgets: Annotated[bool, typer.Option("--budgets", help="Give the share of heads that ran.")] = False,
    gates: Annotated[bool, typer.Option("--gates", help="Give the heads that ran, by layer.")] = False,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
) -> None:
    """Label texts: one line of JSON for each, in their order."""
    if texts and file:
        raise typer.BadParameter("texts must be given as arguments or by --file, not both.")
    if output and not file:
        raise typer.BadParameter("--output needs --file; what comes from elsewhere is printed.")
    from hf_budgetformer.tools import prediction
    from hf_budgetformer.tools.data import read_rows

    columns = _parse_pairs("--column", column)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "head_budget": head_budget}
    options |= {"budgets": budgets, "gates": gates, "skip_bad": skip_bad}
    model, tokenizer = _load(checkpoint, budgeted=False)
    if file and output:
        done = prediction.predict_file(model, tokenizer, file, output, split, columns, **options)
        print(f"Saved as {output}" + (f"; {done} rows were there already." if done else "."), file=sys.stderr)
        return
    given = read_rows(file, split, columns) if file else (({"text": x}, None) for x in texts or _read_lines())
    for answer in prediction.predict(model, tokenizer, given, **options):
        print(json.dumps(answer), flush=True)


@app.command(epilog="Example: budgetformer page out --port 8000")
def page(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Default: what make demo left.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
) -> None:
    """Serve a page to try a model on."""
    from hf_budgetformer.tools.page import main

    main(checkpoint, host, port)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error becomes one line on stderr, unless the first argument is --debug."""
    given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(given, prog_name="budgetformer", standalone_mode=False)
    except Exception as error:
        if given[0] == "--debug":
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error) or repr(error)
        print(f"budgetformer: {' '.join(message.split())}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    sys.exit(code)


__all__ = ["app", "main"]
