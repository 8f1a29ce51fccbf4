"""The command line, `budgetformer`: each command is a thin layer over a function of `hf_budgetformer`.

Imports nothing heavy before a command runs, so that help comes at once.
"""

import contextlib
import difflib
import json
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any


try:
    import typer
except ImportError:
    raise ImportError('The command line needs typer: pip install "hf-budgetformer[cli]".') from None


def _number_between(low: float, high: float, most: bool = False) -> Callable[[float | None], float | None]:
    """A check for an option: above `low`, and below `high`, or with `most` at most."""
    allowed = f"above {low:g}" if high == float("inf") else f"in ({low:g}, {high:g}{']' if most else ')'}"

    def check(value: float | None) -> float | None:
        if value is not None and not (low < value < high or (most and value == high)):
            raise typer.BadParameter(f"must be a number {allowed}, got {value:g}.")
        return value

    return check


_check_level = _number_between(0.0, 1.0)
_check_share = _number_between(0.0, 1.0, most=True)

Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a model.")]
Data = Annotated[str, typer.Argument(metavar="DATA", help="parquet, csv or jsonl file, folder of such, or Hub id.")]
Split = Annotated[str | None, typer.Option(help="Of a data set that has several.", show_default=False)]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="text=NAME, text_pair=NAME or label=NAME, if named otherwise.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without broken rows.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Budgets = Annotated[
    str | None,
    typer.Option(
        help="Shares of the full model's work, and plain, with commas between; default: 1,1/4,1/6,1/12,plain, and "
        "of a stock or cut model plain alone.",
        show_default=False,
    ),
]
Budget = Annotated[
    float | None, typer.Option(callback=_check_share, help="Share of the full model's work; default: a plain call.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts the model reads at a time.")]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens kept of a text; default: as in training, or all the tokenizer allows."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda...; default: the accelerator, if there is one.")]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="BudgetFormer: a classifier as it is, and a cheap first look beside it that answers the easy texts.",
    epilog="Exit codes: 0 done, 1 it failed, and one line on stderr says why, 2 wrong usage.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hf-budgetformer {version('hf-budgetformer')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; give it first.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


def _parse_budget(text: str) -> float | None:
    if text == "plain":
        return None
    budget = float(Fraction(text))
    if not 0.0 < budget <= 1.0:
        raise ValueError
    return budget


def _parse_budgets(text: str | None) -> list[float | None] | None:
    if text is None:
        return None
    try:
        return [_parse_budget(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"--budgets must be numbers in (0, 1], or plain, with commas between, got {text!r}."
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


def _device_type(device: str) -> str:
    import torch

    try:
        return torch.device(device).type
    except RuntimeError:
        raise typer.BadParameter(f"--device must be cpu, cuda, cuda:1 or the like, got {device!r}.") from None


def _check_fields(fields: dict[str, Any]) -> None:
    """Raises BadParameter where a value given by --config is not one of the field's."""
    from dataclasses import fields as fields_of

    from huggingface_hub.errors import StrictDataclassFieldValidationError

    from hf_budgetformer import BudgetFormerConfig

    known = {field.name for field in fields_of(BudgetFormerConfig)}
    if unknown := sorted(set(fields) - known):
        with contextlib.suppress(TypeError):
            BudgetFormerConfig(**{name: fields[name] for name in unknown})  # says what became of one of version 0.1
        raise typer.BadParameter(f"--config must name fields of BudgetFormerConfig, got {unknown}.")
    for name, value in fields.items():
        try:
            BudgetFormerConfig(**{name: value})
        except StrictDataclassFieldValidationError as error:
            raise typer.BadParameter(f"--config {name}: {error}") from None
        except ValueError:
            pass  # it depends on others, the checkpoint's among them


def _suggest(option: str, known: list[str]) -> str:
    """What may have been meant, in words; nothing where nothing is like it."""
    name = option.partition("=")[0].replace("_", "-")
    like = difflib.get_close_matches(name, [known_name.replace("_", "-") for known_name in known], n=1, cutoff=0.8)
    return f": did you mean {like[0]}?" if like else "."


def _parse_training_arguments(given: list[str], device: str | None, own_options: list[str]) -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    parser: Any = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]

    def refuse(message: str) -> None:
        raise typer.BadParameter(message)

    parser.error = refuse
    kind = None if device is None else _device_type(device)
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty())  # bars are for people, not for logs
    if kind == "cpu":
        given = [*given, "--use_cpu"]
    arguments, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown:
        known = own_options + [f"--{name}" for name in vars(arguments)]
        raise typer.BadParameter(
            f"neither this command nor TrainingArguments knows {' '.join(unknown)}{_suggest(unknown[0], known)}"
        )
    if kind not in (None, arguments.device.type):
        raise typer.BadParameter(f"--device must be cpu or {arguments.device.type} here, got {device!r}.")
    return arguments


def _read_lines() -> Iterator[str]:
    if sys.stdin.isatty():
        raise typer.BadParameter("there is nothing to read: give texts, --file, or lines on standard input.")
    return (line.rstrip("\r\n") for line in sys.stdin)


def _keep_quiet() -> None:
    """Turns bars off, which are for people and not for logs, and what the library reports while loading."""
    from datasets import disable_progress_bars  # type: ignore[import-untyped]
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


def _read(data: str, split: str | None, columns: list[str] | None, skip_bad: bool, labelled: bool | None = True) -> Any:
    from hf_budgetformer.tools.tables import read_table

    _keep_quiet()
    return read_table(data, split, _parse_pairs("--column", columns), skip_bad, labelled)


def _load(checkpoint: str, device: str | None, budgeted: bool = True) -> tuple[Any, Any]:
    if device is not None:
        _device_type(device)
    from hf_budgetformer.tools.checkpoints import load_classifier

    _keep_quiet()
    return load_classifier(checkpoint, budgeted, device)


def _finish(result: Any, as_json: bool, folder: str, kind: str, data: str, split: str | None, rows: int) -> None:
    """Prints a result, then keeps it beside its checkpoint, if that is a folder."""
    from hf_budgetformer.tools.results import save_result

    print(json.dumps(result.to_dict()) if as_json else result)
    save_result(folder, kind, result.to_dict(), data, split, rows)


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
    fine_tuned: Annotated[bool, typer.Option("--fine-tuned", help="CHECKPOINT is, and stays as it is.")] = False,
    together: Annotated[bool, typer.Option("--together", help="Both encoders learn at once, in one stage.")] = False,
    new_head: Annotated[bool, typer.Option("--new-head", help="Other labels than CHECKPOINT's: start anew.")] = False,
    unlabelled: Annotated[
        str | None, typer.Option(help="More texts for the narrow encoder, without labels.", show_default=False)
    ] = None,
    narrow_learning_rate: Annotated[
        float | None,
        typer.Option(
            callback=_number_between(0.0, float("inf")),
            help="Of the narrow encoder; 6e-4 if not given.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Names of the labels 0, 1..., with commas between.", show_default=False)
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option(help="FIELD=VALUE of BudgetFormerConfig; may be repeated.", show_default=False)
    ] = None,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    device: Device = None,
    with_card: Annotated[bool, typer.Option("--card", help="Write the model card at the end.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the plain model, then train a narrow encoder beside it, from its answers.

    After CHECKPOINT and DATA, every option of TrainingArguments is one of this command too. It holds for both stages,
    but for --learning_rate: the narrow encoder, which learns alone in stage two, has a rate of its own. Labels that are
    lists (several hold at once) or numbers with a fraction (a regression) are told from others.
    """
    if stray := [argument for argument in (checkpoint, data) if argument.startswith("-")]:
        raise typer.BadParameter(f"CHECKPOINT and DATA come first, got {stray[0]} before them.")
    if fine_tuned and together:
        raise typer.BadParameter("--fine-tuned and --together exclude each other: what stays as it is does not learn.")
    if together and unlabelled:
        raise typer.BadParameter("--unlabelled teaches a narrow encoder alone, which --together does not.")
    fields = {name: _parse_value(text) for name, text in _parse_pairs("--config", config).items()}
    own_options = [option for parameter in context.command.params for option in parameter.opts]
    arguments = _parse_training_arguments([*context.args, "--output_dir", output], device, own_options)
    _check_fields(fields)
    if labels is not None:
        fields["labels"] = [name.strip() for name in labels.split(",")]
    if narrow_learning_rate is not None:
        fields["narrow_learning_rate"] = narrow_learning_rate
    options = {option.partition("=")[0].replace("-", "_") for option in context.args}
    if "__learning_rate" in options and fine_tuned and fields.get("router") != "layer":
        raise typer.BadParameter(
            "--learning_rate is of the full model, which does not learn with --fine-tuned: give --narrow-learning-rate."
        )
    from hf_budgetformer.tools.recipe import train_classifier

    rows = _read(data, split, column, skip_bad)
    held_out = _read(validation, validation_split, column, skip_bad) if validation else None
    more = _read(unlabelled, None, column, skip_bad, labelled=False) if unlabelled else None
    with contextlib.redirect_stdout(sys.stderr):  # what the Trainer prints is no result
        trained = train_classifier(
            checkpoint, rows, arguments, held_out, fine_tuned, together, new_head, max_length, data, more, **fields
        )
    if with_card:
        from hf_budgetformer.tools.model_card import write_model_card

        write_model_card(output)
    summary = {"output": output, **{name: trained[name] for name in ("teacher", "rows", "seconds", "validation")}}
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"Saved in {output}: trained on {trained['rows']} rows.{_describe_validation(trained, validation)}")


def _describe_validation(trained: dict[str, Any], validation: str | None) -> str:
    """What plain calls came to on validation rows, beside the full model alone."""
    figures = trained["validation"]
    if validation is None:
        return ""
    spent = f"at a mean budget of {figures['eval_budget']:.2f}"
    if "eval_error" in figures:
        kept, full = f"error {figures['eval_error']:.4f}", f"{figures['eval_full_error']:.4f}"
    else:
        kept, full = f"accuracy {figures['eval_accuracy']:.1%}", f"{figures['eval_full_accuracy']:.1%}"
    alone = "the plain model's" if trained["teacher"] else "the full model's"
    return f" On {validation}, {kept} {spent}; {alone} is {full}."


@app.command(epilog="Example: budgetformer evaluate out test.csv --budgets 1,1/4,plain")
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    budgets: Budgets = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    device: Device = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Accuracy, agreement with the full model and work spent; of a regression the error."""
    shares = _parse_budgets(budgets)
    from dataclasses import replace

    from hf_budgetformer.tools.evaluation import evaluate_budgets
    from hf_budgetformer.tools.results import read_training

    model, tokenizer = _load(checkpoint, device, budgeted=False)
    rows = _read(data, split, column, skip_bad)
    evaluation = evaluate_budgets(model, rows, tokenizer, shares, batch_size, max_length)
    seed = read_training(checkpoint).get("arguments", {}).get("seed")
    evaluation = replace(evaluation, settings={**evaluation.settings, "data": data, "split": split, "seed": seed})
    _finish(evaluation, as_json, checkpoint, "evaluation", data, split, evaluation.rows)


@app.command(epilog="Example: budgetformer tune out validation.parquet --disagreement 0.01")
def tune(
    checkpoint: Checkpoint,
    data: Data,
    disagreement: Annotated[
        float | None,
        typer.Option(callback=_check_level, help="Share of the texts that may be answered differently; default: 0.01."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            callback=_check_level, help="Instead, accuracy that may be lost; 0.005 is half a point. Needs labels."
        ),
    ] = None,
    mean_budget: Annotated[
        float | None,
        typer.Option(callback=_check_level, help="Instead, mean share of the full model's work that may be spent."),
    ] = None,
    confidence: Annotated[float, typer.Option(callback=_check_level, help="That the promise holds.")] = 0.95,
    budgets: Annotated[str | None, typer.Option(help="First looks to choose from, with commas between.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Leave the folder's config.json as it is.")] = False,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    device: Device = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """The cheapest looks that keep a promise on texts like these; labels are needed for --tolerance only."""
    if not dry_run and not Path(checkpoint).is_dir():
        raise typer.BadParameter(f"CHECKPOINT must be a folder, or --dry-run be given, got {checkpoint}.")
    candidates: Any = _parse_budgets(budgets)
    if candidates is not None and None in candidates:
        raise typer.BadParameter(f"--budgets must be numbers in (0, 1], of first looks, got {budgets!r}.")
    if sum(level is not None for level in (disagreement, tolerance, mean_budget)) > 1:
        raise typer.BadParameter("one of --disagreement, --tolerance and --mean-budget may be given.")
    from hf_budgetformer.tools import tuning
    from hf_budgetformer.tools.results import write_json

    model, tokenizer = _load(checkpoint, device)
    rows = _read(data, split, column, skip_bad, labelled=tolerance is not None)
    result = tuning.tune(
        model,
        rows,
        tokenizer,
        disagreement,
        tolerance,
        mean_budget,
        confidence,
        budgets=candidates,
        batch_size=batch_size,
        max_length=max_length,
    )
    if not dry_run:  # before the result is kept, which holds for these looks
        path = Path(checkpoint) / "config.json"
        changed = {name: getattr(model.config, name) for name in ("looks", "confidence", "margins", "promise")}
        write_json(path, {**json.loads(path.read_text("utf-8")), **changed})
    _finish(result, as_json, checkpoint, "tuning", data, split, len(rows))
    if not (dry_run or as_json):
        print(f"Written to {Path(checkpoint) / 'config.json'}: plain calls look this way from now on.")


@app.command(epilog="Example: budgetformer profile out test.csv --budgets 1,1/4,plain --against sorted,onnx-int8")
def profile(
    checkpoint: Checkpoint,
    data: Data,
    budgets: Budgets = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts that are measured.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Times each batch is run.")] = 5,
    energy: Annotated[bool, typer.Option("--energy", help="Measure energy and CO2e too.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="What you could pick instead, with commas between: sorted, the stock model on batches sorted by "
            "length; onnx, onnx-int8, openvino, openvino-int8, the same in other runtimes.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    device: Device = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Time, FLOPs, memory and, with labels, accuracy beside the stock model; after how many texts training has paid."""
    shares = _parse_budgets(budgets)
    from hf_budgetformer.tools.profiling import cost_card
    from hf_budgetformer.tools.results import read_training
    from hf_budgetformer.tools.rivals import check_against

    others = [name.strip() for name in against.split(",")] if against else []
    try:
        check_against(others)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    model, tokenizer = _load(checkpoint, device)
    texts, seconds = _read(data, split, column, skip_bad, labelled=None), read_training(checkpoint).get("seconds")
    costs = cost_card(model, texts, tokenizer, shares, batch_size, rows, repeats, max_length, seconds, energy, others)
    _finish(costs, as_json, checkpoint, "costs", data, split, costs.settings["rows"])


@app.command(epilog="Example: budgetformer cut out --output small --budget 0.25 --test test.csv")
def cut(
    checkpoint: Checkpoint,
    output: Annotated[str, typer.Option(help="Folder for the cut model.", show_default=False)],
    budget: Annotated[
        float,
        typer.Option(callback=_check_share, help="Share of the full model's work that is left.", show_default=False),
    ],
    test: Annotated[str | None, typer.Option(help="Data to evaluate the cut model on.", show_default=False)] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    device: Device = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Cut the narrow encoder out at a budget: a small static model that trains, saves and loads like any."""
    if Path(output).resolve() == Path(checkpoint).resolve():
        raise typer.BadParameter(f"--output must not be the checkpoint's own folder, got {output}.")
    from hf_budgetformer.tools import narrowing

    model, tokenizer = _load(checkpoint, device)
    small = narrowing.cut(model, budget)
    small.save_pretrained(output)
    tokenizer.save_pretrained(output)
    parameters = small.num_parameters()
    if not as_json:
        print(f"Saved in {output}: {parameters:,} parameters are left.")
    elif not test:
        print(json.dumps({"output": output, "parameters": parameters}))
    if test:
        evaluate(output, test, "plain", batch_size, max_length, device, split, column, skip_bad, as_json)


@app.command(epilog="Example: budgetformer export out served --dtype int8 --calibration validation.parquet")
def export(
    checkpoint: Checkpoint,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for all looks, or an .onnx file for one.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, fp16 or int8.")] = "fp32",
    runtime: Annotated[str | None, typer.Option(help="Of a folder: onnx or openvino; default: onnx.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Data to calibrate thresholds on, of the graphs themselves; int8 needs it.", metavar="DATA"),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Of a file: 1, or up to the narrow budget; default: 1.")] = None,
    max_length: MaxLength = None,
    split: Split = None,
    column: Columns = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Write a model for onnxruntime or OpenVINO: the looks of a plain call, or one budget in one file."""
    to_file = output.endswith(".onnx")
    of_folder = {"--runtime": runtime, "--calibration": calibration, "--max-length": max_length}
    for option, value in of_folder.items() if to_file else [("--budget", budget)]:
        if value is not None:
            raise typer.BadParameter(f"{option} is for {'a folder' if to_file else 'an .onnx file'}, got {output}.")
    model, tokenizer = _load(checkpoint, "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        if to_file:
            from hf_budgetformer.tools.export import export_onnx

            path = export_onnx(model, output, budget, dtype)
            printed = f"Saved as {path}."
            summary: dict[str, Any] = {"output": str(path)}
        else:
            from hf_budgetformer.tools.looks_export import export_looks

            labelled = (model.config.promise or {}).get("risk") == "tolerance"
            rows = None if calibration is None else _read(calibration, split, column, skip_bad, labelled)
            written = export_looks(model, tokenizer, output, runtime or "onnx", dtype, rows, max_length)
            printed = str(written)
            summary = {"output": output, "taken": written.taken, "looks": written.looks.to_dict()}
    print(json.dumps(summary) if as_json else printed)


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


@app.command(epilog="Example: budgetformer predict out --file texts.csv --output answers.jsonl --spent")
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
    budget: Budget = None,
    spent: Annotated[bool, typer.Option("--spent", help="Give the share of the full model's work spent.")] = False,
    chunks: Annotated[
        str | None,
        typer.Option(
            help="Read all of a long text, in chunks of --max-length tokens, and answer by their mean, max or vote.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[int, typer.Option(min=0, help="Tokens that a chunk shares with the one before.")] = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    device: Device = None,
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
    from hf_budgetformer.tools.documents import check_chunks
    from hf_budgetformer.tools.tables import read_rows

    try:
        check_chunks(chunks, stride)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    columns = _parse_pairs("--column", column)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "budget": budget, "spent": spent}
    options["skip_bad"] = skip_bad
    if chunks is not None:
        options |= {"chunks": chunks, "stride": stride}
    model, tokenizer = _load(checkpoint, device, budgeted=False)
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
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a model; make demo saves the default.")
    ] = "demo-output",
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Texts to start with; default: those of the training.", show_default=False)
    ] = None,
    device: Device = None,
) -> None:
    """Serve a page to try a model on."""
    if device is not None:
        _device_type(device)
    from hf_budgetformer.tools.page import main

    main(checkpoint, device, data, server_name=host, server_port=port)


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
