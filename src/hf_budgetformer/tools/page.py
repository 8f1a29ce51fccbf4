"""A page that shows what a checkpoint does: each look at a text, a file at some budgets, the promise and its curve."""

import base64
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from huggingface_hub import snapshot_download

from ..budgets import FULL_LOOK, Counts, confidence
from .checkpoints import check_single_label, load_classifier
from .evaluation import Evaluation
from .looking import plan_call
from .plots import plot_accuracy
from .prediction import describe_answer, predict
from .results import describe_looks, read_results, read_training
from .tables import read_rows, read_table
from .tuning import check_looks_twice, describe_promise, kept_promise


MOST_ROWS = 1_000
REPEATS = 7
EXAMPLES = ["A wonderful film.", "Send the request and read the headers of its response."]
CSS = """
body { --font: system-ui } .prose { overflow-x: auto } td, th { padding: .2rem .6rem }
pre { overflow-x: auto } pre[role=img] { font: min(.9rem, 2.4vw)/1.1 monospace }
"""


def starting_texts(checkpoint: str, data: str | None = None) -> list[str]:
    """Up to four texts of `data`, or of what the model was trained on if that file is still there; or general ones."""
    trained_on = read_training(checkpoint).get("dataset")
    rows: list[Any] = []
    if data is not None:
        rows = list(itertools.islice(read_rows(data), 100))
    elif trained_on and Path(trained_on).is_file():
        with contextlib.suppress(ValueError):  # its columns may have other names
            rows = list(itertools.islice(read_rows(trained_on), 100))
    texts = [row["text"] for row, fault in rows if not fault and row["text"]]
    return list(dict.fromkeys(texts))[:4] or EXAMPLES


def draw_units(opened: Sequence[int], units: int) -> str:
    """Squares for the units of each layer, filled where they are open, in HTML; also in words."""
    squares = "\n".join(f"{'■' * count:□<{units}}" for count in opened)
    words = f"Open of {units} in each layer: {', '.join(map(str, opened))}"
    return f'<pre role="img" aria-label="{words}">{squares}</pre>'


@torch.no_grad()
def show_text(model: Any, tokenizer: Any, text: str, budget: float | None) -> str:
    """What each look at a text opens, answers and takes, beside the full model, in HTML; None is a plain call."""
    config = model.config
    layers = config.num_hidden_layers
    bounds = model.narrow.order.bounds
    everything = Counts((config.num_attention_heads,) * layers, (bounds[-1],) * layers)
    plan = plan_call(model, budget)
    looks = [look for look in plan.looks if look != FULL_LOOK] + [FULL_LOOK]
    batch = tokenizer(text, truncation=True, return_tensors="pt").to(model.device)
    logits = torch.zeros(len(looks), config.num_labels)
    times = torch.zeros(REPEATS, len(looks))
    for repeat, number in itertools.product(range(REPEATS), range(len(looks))):
        start = time.perf_counter()
        logits[number] = model(**batch, budget=looks[number].cost).logits[0]
        times[repeat, number] = 1000 * (time.perf_counter() - start)
    milliseconds = times.median(0).values.tolist()
    margins = confidence(logits, config.problem_type).tolist()
    sure = [number for number, least in enumerate(plan.thresholds) if margins[number] >= least]
    last = min(sure, default=len(plan.thresholds))
    verdicts = ["In doubt: look on"] * last + ["This is the answer", "Not needed"]
    table = pd.DataFrame()
    for number, look in enumerate(looks):
        answer = describe_answer(logits[number], config)
        heads, neurons = look.counts or everything
        cells = {
            "Verdict": verdicts[number],
            "Answer": f"<b>{escape(str(answer['label']))}</b> {answer['score']:.0%}",
            "Margin": f"{margins[number]:.2f}",
            "Milliseconds": f"{milliseconds[number]:.1f}",
            "Share of the work": f"{look.cost:.0%}",
            "Open heads": draw_units(heads, config.num_attention_heads),
            "Open feed-forward blocks": draw_units([bounds.index(count) for count in neurons], len(bounds) - 1),
        }
        table["Full model" if look == FULL_LOOK else f"Look {number + 1}"] = pd.Series(cells)
    spent = sum(look.cost for look in looks[: last + 1])
    line = f"{sum(milliseconds[: last + 1]):.1f} ms, {spent:.0%} of the work. Full model: {milliseconds[-1]:.1f} ms."
    return f"<h2>{table.loc['Answer'].iloc[last]}</h2><p>{line}</p>{table.style.to_html()}"


def show_file(model: Any, tokenizer: Any, texts: Any, budgets: Mapping[str, float | None]) -> tuple[str, Any]:
    """What each budget takes on a DataFrame of texts, with a link that saves the answers, in HTML; and the answers."""
    rows = [(row, None) for row in texts.to_dict("records")]
    answers = {}
    for name, budget in budgets.items():
        start = time.perf_counter()
        predictions = pd.DataFrame(predict(model, tokenizer, rows, budget=budget, spent=True))
        answers[name] = predictions.assign(seconds=time.perf_counter() - start)
    by_name = pd.concat(answers, axis=1).swaplevel(axis=1)
    same = by_name["label"].eq(by_name["label"]["Full model"], axis=0).mean()
    columns = {"Seconds": by_name["seconds"].max(), "Share of the work": by_name["budget"].mean(), "Agreement": same}
    summary = pd.DataFrame(columns).style.format("{:.1%}").format("{:.2f}", "Seconds").to_html()
    table = texts.join(by_name["label"]).join(answers["Plain call"][["score", "budget"]])
    content = base64.b64encode(table.to_csv(index=False, lineterminator="\r\n").encode()).decode()
    link = f'<a download="predictions.csv" href="data:text/csv;base64,{content}">Download predictions.csv</a>'
    return f"{summary}<p>{len(rows):,} texts; agreement is with the full model. {link}</p>", table


def show_curves(checkpoint: str) -> str:
    """Accuracy by budget in HTML, from what `budgetformer evaluate` left beside the checkpoint; or how to get it."""
    folder = checkpoint if Path(checkpoint).is_dir() else snapshot_download(checkpoint, allow_patterns="budgetformer/*")
    parts = []
    for record in read_results(folder, "evaluation"):
        evaluation = Evaluation.from_dict(record.result)
        with tempfile.TemporaryDirectory() as place:
            picture = base64.b64encode(plot_accuracy(evaluation, Path(place, "curve.png")).read_bytes()).decode()
        image = f'<img alt="Accuracy by budget, as in the table" src="data:image/png;base64,{picture}">'
        parts.append(f'<p>{escape(str(record))}</p>{image}<pre tabindex="0">{evaluation}</pre>')
    return "".join(parts) or f"No curve yet: <code>budgetformer evaluate {escape(checkpoint)} DATA</code> draws it."


def build_page(model: Any, tokenizer: Any, checkpoint: str, examples: list[str]) -> Any:
    """The page, a `gradio.Blocks`; what is typed is not written to disk, and what is uploaded is removed once read."""
    try:
        import gradio as gr
    except ImportError:
        raise ImportError('The page needs gradio: pip install "hf-budgetformer[page]".') from None
    plan = plan_call(model, None)
    most = model.config.narrow_budget
    budgets = {"Plain call": None, "First look": plan.looks[0].cost, f"{most:.0%} of the work": most, "Full model": 1.0}

    def show(text: str, name: str) -> str:
        return show_text(model, tokenizer, text, budgets[name])

    def run(path: str) -> tuple[str, Any]:
        try:
            texts = pd.DataFrame(read_table(path, labelled=False)[:MOST_ROWS])
        except (OSError, ValueError) as error:  # which may go on about the command line
            message = str(error).replace(path, Path(path).name).partition(": name the")[0].partition(". Mend")[0]
            raise gr.Error(escape(message), duration=None, print_exception=False) from None
        finally:
            Path(path).unlink(missing_ok=True)
        shown, table = show_file(model, tokenizer, texts, budgets)
        return shown, gr.Dataframe(table, visible=True)

    call = describe_looks([look.cost for look in plan.looks], plan.thresholds)
    about = f"`{checkpoint}`: a plain call {call}. {describe_promise(kept_promise(model.config))}"
    with gr.Blocks(title="BudgetFormer", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# A cheap first look, and the full model where in doubt\n{about}")
        with gr.Tab("Text"), gr.Row():
            with gr.Column():
                text = gr.Textbox(examples[0], label="Text", lines=4, submit_btn="Classify")
                starts = gr.Examples(examples, text, label="Or one of these")
                budget = gr.Radio(list(budgets), value="Plain call", label="Budget")
            result = gr.HTML()
        with gr.Tab("File"):
            gr.Markdown(f"A csv or parquet file with a column `text`, or a txt file: its first {MOST_ROWS:,} texts.")
            upload = gr.UploadButton("Classify a file", file_types=[".csv", ".parquet", ".txt"])
            shown = gr.HTML()
            table = gr.Dataframe(visible=False, max_chars=60)
        with gr.Tab("Accuracy"):
            gr.HTML(show_curves(checkpoint))
        # One at a time, or times lie.
        alone: Any = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        gr.on([page.load, text.submit, budget.input], show, [text, budget], result, trigger_mode="always_last", **alone)
        starts.load_input_event.then(show, [text, budget], result, **alone)
        upload.upload(run, upload, [shown, table], **alone)
    return page


def main(checkpoint: str = "demo-output", device: str | None = None, data: str | None = None, **launch: Any) -> None:
    """Serves the page until interrupted.

    Args:
        checkpoint: Folder or Hub id of a BudgetFormer classifier; the default is what `make demo` saves.
        device: Where the model runs; None: the accelerator, if there is one.
        data: Whose texts the page starts with, as in `tools.tables.read_rows`; None: those of the training.
        **launch: Of `gradio.Blocks.launch`: server_name="0.0.0.0" lets other machines in, server_port=7860...

    Raises:
        ValueError: There is no such checkpoint, or it does not choose one label in two looks.
        ImportError: gradio or matplotlib is missing.
    """
    model, tokenizer = load_classifier(checkpoint, budgeted=True, device=device)
    check_single_label(model.config)
    check_looks_twice(model)
    with tempfile.TemporaryDirectory(prefix="budgetformer-page-") as folder:  # goes, with all that Gradio left there
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", GRADIO_SSR_MODE="False")
        page = build_page(model, tokenizer, checkpoint, starting_texts(checkpoint, data))
        page.launch(share=False, run_history=False, max_file_size="1mb", footer_links=[], css=CSS, **launch)


__all__ = ["build_page", "draw_units", "main", "show_curves", "show_file", "show_text", "starting_texts"]
