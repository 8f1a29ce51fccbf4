"""A page that shows what a checkpoint does: what each look at a text opens, says and takes; and a file at a time."""

import base64
import csv
import io
import itertools
import json
import math
import os
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..budgets import FULL_LOOK, Look, confidence
from .batching import batches_by_length
from .checkpoints import check_single_label, load_classifier
from .evaluation import Evaluation
from .looking import plan_call
from .plots import plot_accuracy
from .results import describe_looks, read_results
from .tables import read_rows
from .tuning import describe_promise, kept_promise


DEMO_CHECKPOINT = "demo-output"
MOST_BYTES, MOST_ROWS, MOST_CHARACTERS = 1_000_000, 1_000, 5_000
FILES = (".csv", ".parquet", ".txt")
BATCH = 32
EXAMPLES = (
    "Send the request to the server and read the headers of its response.",
    "Return a proxy that is closed, unless the caller asked otherwise, once its last reader has let go of it.",
    "A wonderful film.",
    "For all its borrowed ideas it has a charm that better made films of late lack.",
)
_CSS = """
.bf-label { font-size: 1.25rem; margin: 0 } .bf-note { font-size: .9rem; margin: .4rem 0 }
.bf-figures, .bf-looks { display: grid; gap: .5rem; margin: .75rem 0; font-size: .85rem }
.bf-figures { grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)) }
.bf-looks { grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)) }
.bf-figures > div, .bf-look { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .4rem .6rem }
.bf-figures dd { margin: 0 } .bf-figures dd:nth-child(2) { font-size: 1.25rem; font-weight: 600 }
.bf-look.idle { border-style: dashed } .bf-look h3 { margin: 0; font-size: .95rem }
.bf-units { width: 100%; max-width: 20rem; height: auto; display: block; font-size: 8px; fill: currentColor }
.bf-units .open { fill: #0072b2 } .dark .bf-units .open { fill: #56b4e9 }
.bf-units .closed { fill: none; stroke: currentColor; stroke-opacity: .5 }
.bf-alert { border-left: 4px solid #d55e00; padding: .4rem .8rem }
.bf-scroll { overflow: auto; max-height: 30rem; font-size: .9rem }
.bf-scroll :is(table, thead, tbody, tr, th, td) { border: 0; text-align: left }
.bf-scroll :is(th, td) { padding: .3rem .5rem; border-top: 1px solid #8886 }
.bf-scroll td:first-child { min-width: 7rem; overflow-wrap: anywhere }
pre.bf-scroll { font-size: min(.9rem, 2.4vw) } .bf-curve { background: white; border-radius: 6px; max-width: 100% }
"""
_SAVE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "predictions.csv";
    link.click();
}"""


def load_checkpoint(checkpoint: str, device: str | None = None) -> tuple[Any, Any]:
    """A classifier with a narrow encoder beside a full one, in eval mode, and its tokenizer.

    Raises:
        ValueError: `checkpoint` is neither a folder nor a Hub id of one.
    """
    model, tokenizer = load_classifier(checkpoint, budgeted=True, device=device)
    check_single_label(model.config)
    if model.narrow is None or not model.config.full_encoder:
        got = "routers in its layers (router='layer')" if model.narrow is None else "one that was cut"
        raise ValueError(f"checkpoint must have a narrow encoder beside a full one, got {got} in {checkpoint}.")
    return model, tokenizer


def read_file(path: str | Path) -> dict[str, list[str]]:
    """The columns text and, if there is one, text_pair of a csv or parquet file; or the lines of a txt file.

    Raises:
        ValueError: The file is of another kind, too large or damaged, or holds too much.
    """
    path, rows = Path(path), []
    size, most = path.stat().st_size, f"{MOST_ROWS:,} texts of at most {MOST_CHARACTERS:,} characters"
    if path.suffix not in FILES or size > MOST_BYTES:
        allowed = f"a {', '.join(FILES[:-1])} or {FILES[-1]} file of at most {MOST_BYTES:,} bytes"
        raise ValueError(f"{path.name} must be {allowed}, got {size:,}.")
    try:
        for number, (row, fault) in enumerate(read_rows(str(path)), 1):
            long = max(map(len, row.values()), default=0)
            if fault or number > MOST_ROWS or long > MOST_CHARACTERS:
                fault = fault or f"is too much, with {long:,} characters: at most {most}"
                raise ValueError(f"{path.name}: text {number:,} {fault}.")
            rows.append(row)
    except (ValueError, OSError) as error:  # which may go on about the command line
        raise ValueError(str(error).replace(str(path), path.name).partition(": name")[0]) from None
    return {name: [row[name] for row in rows] for name in rows[0]}


def starting_texts(checkpoint: str, data: str | None = None) -> list[str]:
    """A few texts to begin with: the first of `data`, or of what the model was trained on if that file is still there.

    Args:
        checkpoint: Folder or Hub id.
        data: As in `tools.tables.read_rows`; None: see above.

    Returns:
        Up to four texts; general ones where there are no others.

    Raises:
        OSError: There are no such data.
        ValueError: They cannot be read.
    """
    record = Path(checkpoint, "budgetformer", "training.json")
    source = data
    if data is None and record.is_file():
        trained_on = json.loads(record.read_text("utf-8")).get("dataset")
        source = trained_on if trained_on and Path(trained_on).is_file() else None
    if source is None:
        return list(EXAMPLES)
    try:
        rows = list(itertools.islice(read_rows(source), 100))
    except ValueError:
        if data is not None:
            raise
        return list(EXAMPLES)  # read under other names, perhaps
    texts = [row["text"] for row, fault in rows if not fault and 0 < len(row["text"]) <= MOST_CHARACTERS]
    return list(dict.fromkeys(texts))[: len(EXAMPLES)] or list(EXAMPLES)


def time_in_turn(model: Any, batch: Any, ways: Sequence[Mapping[str, Any]], repeats: int) -> list[float]:
    """Median seconds of each way to call the model; each goes first in turn."""
    times: list[list[float]] = [[] for _ in ways]
    for repeat in range(repeats):
        for place in range(len(ways)):
            way = (repeat + place) % len(ways)
            start = time.perf_counter()
            model(**batch, **ways[way]).logits.cpu()
            times[way].append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def _figures(*figures: tuple[str, str, str]) -> str:
    parts = (f"<div><dt>{name}</dt><dd>{value}</dd><dd>{detail}</dd></div>" for name, value, detail in figures)
    return f'<dl class="bf-figures">{"".join(parts)}</dl>'


def draw_look(model: Any, look: Look) -> str:
    """A picture, in SVG, of the heads and feed-forward blocks that a look opens, which also says so in words."""
    heads, bounds = model.config.num_attention_heads, model.narrow.order.bounds
    blocks, right, drawn, told = len(bounds) - 1, 9 * heads + 30, [], []
    for layer in range(model.config.num_hidden_layers):
        opened = (heads, blocks)
        if look.counts is not None:
            opened = (look.counts.heads[layer], bounds.index(look.counts.neurons[layer]))
        told.append(f"layer {layer + 1}: {opened[0]} and {opened[1]}")
        y = 9 * layer + 13
        drawn.append(f'<text x="12" y="{y + 7}" text-anchor="end">{layer + 1}</text>')
        for left, count, most in ((18, opened[0], heads), (right, opened[1], blocks)):
            for unit in range(most):
                name, inset, side = ("open", 0, 7) if unit < count else ("closed", 2, 3)  # told apart without colour
                place = f'x="{9 * unit + left + inset}" y="{y + inset}" width="{side}" height="{side}"'
                drawn.append(f'<rect class="{name}" {place} rx="1"/>')
    return (
        f'<svg class="bf-units" role="img" aria-label="Open of {heads} heads and {blocks} feed-forward blocks, '
        f'{"; ".join(told)}" viewBox="0 0 {right + 9 * blocks} {9 * len(told) + 14}"><text x="18" y="8">heads</text>'
        f'<text x="{right}" y="8">feed-forward</text>{"".join(drawn)}</svg>'
    )


@torch.no_grad()
def show_text(model: Any, tokenizer: Any, text: str, budget: float | None) -> str:
    """What each look at a text opens, says and takes, beside the full model; in HTML.

    Args:
        model: See `load_checkpoint`.
        tokenizer: Of the model.
        text: One text.
        budget: As in `forward`.

    Raises:
        ValueError: The text is too long, or the model cannot spend that budget.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"A text must have at most {MOST_CHARACTERS:,} characters, got {len(text):,}.")
    plan, longest = plan_call(model, budget), tokenizer.model_max_length
    looks = [look for look in plan.looks if look.counts is not None] + [FULL_LOOK]
    batch = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
    ways = [{} if budget is None else {"budget": budget}, *({"budget": look.cost} for look in looks)]
    out, *answers = (model(**batch, **way) for way in ways)
    taken, *times = time_in_turn(model, batch, ways, repeats=7)

    def said(logits: torch.Tensor) -> str:
        share, label = logits[0].softmax(-1).max(-1)
        return f"<b>{escape(str(model.config.id2label[label.item()]))}</b> {share:.0%}"

    cards, going = [], True
    for number, (look, answer, seconds) in enumerate(zip(looks, answers, times, strict=True)):
        asked = going and number < len(plan.looks)
        margin = confidence(answer.logits, model.config.problem_type).item()
        going = asked and number < len(plan.thresholds) and margin < plan.thresholds[number]
        verdict = "This is the answer." if asked else "Not asked: no need."
        if asked and number < len(plan.thresholds):
            asked_for = f"{plan.thresholds[number]:.2f} was asked for"
            verdict = f"{asked_for}: in doubt, look on." if going else f"{asked_for}: this is the answer."
        name = "Full model" if look.counts is None else f"Look {number + 1}, {look.cost:.0%} of the work"
        told = f"{said(answer.logits)}, {1000 * seconds:.1f} ms<br>Margin {margin:.2f}. {verdict}"
        shown = f'<h3>{name}</h3><p class="bf-note">{told}</p>{draw_look(model, look)}'
        cards.append(f'<section class="bf-look{"" if asked else " idle"}">{shown}</section>')
    same = out.logits.argmax().item() == answers[-1].logits.argmax().item()
    figures = _figures(
        ("Budget spent", f"{out.budget.item():.0%}", "of the full model's work"),
        ("Time", f"{taken / times[-1]:.0%}", f"{1000 * taken:.1f} of {1000 * times[-1]:.1f} ms"),
        ("Full model", "same label" if same else "another label", said(answers[-1].logits)),
    )
    cut = len(tokenizer(text, verbose=False)["input_ids"]) > longest
    note = f'<p class="bf-note">Only its first {longest} tokens were read.</p>' if cut else ""
    return f'<p class="bf-label">{said(out.logits)}</p>{figures}<div class="bf-looks">{"".join(cards)}</div>{note}'


@torch.no_grad()
def show_texts(
    model: Any, tokenizer: Any, texts: dict[str, list[str]], budget: float | None, tell: Callable[[float], Any]
) -> tuple[str, str]:
    """Classifies many texts, beside the full model, and measures both.

    Args:
        model: See `load_checkpoint`.
        tokenizer: Of the model.
        texts: The columns text and perhaps text_pair, of one row or more.
        budget: As in `forward`.
        tell: Called with the share that is done, in (0, 1].

    Returns:
        A summary and a table, in HTML, and the table as a csv file's content.
    """
    first, count = plan_call(model, budget).looks[0].cost, len(texts["text"])
    ways = [{} if budget is None else {"budget": budget}, {"budget": 1.0}]
    rows: list[list[str]] = [list(row) for row in zip(*texts.values(), strict=True)]
    seconds, spent, went_on, same, done = [0.0, 0.0], 0.0, 0, 0, 0
    for places, batch in batches_by_length(texts, tokenizer, BATCH):
        batch = batch.to(model.device)
        out, full = (model(**batch, **way) for way in ways)  # warms up for what is timed
        seconds = [sum(pair) for pair in zip(seconds, time_in_turn(model, batch, ways, repeats=2), strict=True)]
        scores, labels = out.logits.softmax(-1).max(-1)
        spent, went_on = spent + out.budget.sum().item(), went_on + int((out.budget > first + 1e-6).sum())
        same += int((labels == full.logits.argmax(-1)).sum())
        for place, label, score, share in zip(places, labels.tolist(), scores, out.budget, strict=True):
            rows[place] += [str(model.config.id2label[label]), f"{score:.3f}", f"{share:.3f}"]
        done += len(places)
        tell(done / count)
    figures = _figures(
        ("Went on", f"{went_on / count:.0%}", f"{went_on:,} of {count:,} texts, past the first look"),
        ("Same label", f"{same / count:.0%}", "as the full model"),
        ("Time", f"{seconds[0]:.2f} s", f"full model {seconds[1]:.2f} s"),
        ("Budget spent", f"{spent / count:.0%}", "of the full model's work"),
    )
    how = f"Measured on these texts, in batches of {BATCH} of like length, both ways in turn, without tokenizing."
    rows.insert(0, [*texts, "label", "score", "budget"])
    top, *lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    table = f"<thead><tr>{top.replace('td>', 'th>')}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody>"
    content = io.StringIO(newline="")
    csv.writer(content).writerows(rows)
    scroll = f'<div class="bf-scroll" tabindex="0" role="region" aria-label="Predictions"><table>{table}</table></div>'
    return f'{figures}<p class="bf-note">{how}</p>{scroll}', content.getvalue()


def show_curves(checkpoint: str) -> str:
    """Accuracy by budget in HTML, from what `budgetformer evaluate` left beside the checkpoint; or how to get it."""
    folder = Path(checkpoint)
    try:
        folder = folder if folder.is_dir() else Path(snapshot_download(checkpoint, allow_patterns="budgetformer/*"))
        records = read_results(folder, "evaluation")
    except OSError:
        records = []
    if not records:
        command = f"budgetformer evaluate {escape(checkpoint)} DATA"
        return f"<p>This checkpoint has no curve yet. Labelled texts make one: <code>{command}</code></p>"
    parts = []
    for record in records:
        evaluation = Evaluation.from_dict(record.result)
        evaluation.settings.update(data=record.data, split=record.split)
        with tempfile.TemporaryDirectory() as place:
            picture = base64.b64encode(plot_accuracy(evaluation, Path(place, "curve.png")).read_bytes()).decode()
        parts.append(
            f'<p class="bf-note">{escape(str(record))}</p><img class="bf-curve" src="data:image/png;base64,{picture}" '
            'alt="Accuracy against the mean budget spent, as in the table below">'
            f'<pre class="bf-scroll" tabindex="0" role="region" aria-label="Accuracy by budget">{evaluation}</pre>'
        )
    return "".join(parts)


def build_page(model: Any, tokenizer: Any, checkpoint: str, data: str | None = None) -> Any:
    """The page, a `gradio.Blocks`; nothing that is typed is written to disk, and what is uploaded is removed again.

    Args:
        model: See `load_checkpoint`.
        tokenizer: Of the model.
        checkpoint: Where it is from.
        data: See `starting_texts`.

    Raises:
        ImportError: gradio is missing.
    """
    try:
        import gradio as gr
    except ImportError:
        raise ImportError('The page needs gradio: pip install "hf-budgetformer[page]".') from None
    config = model.config

    def failed(error: ValueError) -> str:
        return f'<p class="bf-alert" role="alert">{escape(str(error))}</p>'

    def budget_of(plain: bool, percent: float | None) -> float | None:
        if plain:
            return None
        if percent is None:  # the number beside the slider can be emptied
            raise ValueError("A budget must be a number, in % of the full model's work, got none.")
        return percent / 100

    def answer(text: str, plain: bool, percent: float | None) -> str:
        try:
            return show_text(model, tokenizer, text, budget_of(plain, percent))
        except ValueError as error:
            return failed(error)

    progress = gr.Progress()

    def run(path: str | None, texts: Any, plain: bool, percent: float | None, tell: Any = progress) -> tuple[Any, ...]:
        try:
            texts = read_file(path) if path else texts
            shown, content = show_texts(model, tokenizer, texts, budget_of(plain, percent), tell)
        except ValueError as error:
            return None, None, failed(error), "", gr.update(visible=False)
        finally:
            if path:
                Path(path).unlink(missing_ok=True)
        return None, texts, shown, content, gr.update(visible=True)

    examples = starting_texts(checkpoint, data)
    shape = f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads, {config.num_labels} labels"
    call = "runs the full model" if plan_call(model, None).looks[0] == FULL_LOOK else None
    call = call or describe_looks(config.looks, config.confidence)
    promise = kept_promise(config)
    promised = "" if promise is None else f" A plain call {call}. {describe_promise(promise)}"
    least, most = math.ceil(100 * model.narrow.order.costs[1]), math.floor(100 * config.narrow_budget)
    with gr.Blocks(title="BudgetFormer", analytics_enabled=False, delete_cache=(600, 600)) as page:
        about = f"`{checkpoint}`, {shape}: a cheap first look, and the full model where in doubt."
        gr.Markdown(f"# BudgetFormer\n{about}{promised}")
        with gr.Row():
            with gr.Column(min_width=280):
                plain = gr.Checkbox(True, label=f"Plain call, which {call}")
            with gr.Column(min_width=280):
                label = "Or ask for a budget, in % of the full model's work"
                most = 100 if config.margins else most  # none in between can be asked for
                percent = gr.Slider(min(least, most), most, value=min(most, 25), step=1, label=label, buttons=[])
        with gr.Tab("Text"):
            choices = [(textwrap.shorten(example, 100), example) for example in examples]
            pick = gr.Dropdown(choices, value=examples[0], label="Pick a text, or type")
            text = gr.Textbox(examples[0], label="Text", lines=2, max_length=MOST_CHARACTERS)
            classify = gr.Button("Classify", variant="primary")
            answered = gr.HTML()
        with gr.Tab("File"):
            limits = f"{MOST_ROWS:,} texts of {MOST_CHARACTERS:,} characters, {MOST_BYTES // 10**6} MB"
            kinds = "A csv or parquet file with a column `text`, or a txt file with a text in each line"
            gr.Markdown(f"{kinds}: at most {limits}.")
            upload = gr.File(label="File, deleted once it is read", file_types=list(FILES), height=150)
            kept, shown, content = gr.State(), gr.HTML(), gr.Textbox(visible=False)
            with gr.Row(visible=False) as buttons:
                again = gr.Button("Run again at the budget above")
                save = gr.Button("Download predictions.csv")
        with gr.Tab("Accuracy"):
            gr.HTML(show_curves(checkpoint))

        # One at a time, or times lie; and the last one asked for always runs.
        alone: Any = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
        alone["api_visibility"] = "private"
        asked, told = [text, plain, percent], [upload, kept, shown, content, buttons]
        gr.on([page.load, classify.click, plain.input, text.submit], answer, asked, answered, **alone)
        pick.change(lambda chosen, *way: (chosen, answer(chosen, *way)), [pick, *asked[1:]], [text, answered], **alone)
        slide = [text, percent], [plain, answered]
        percent.input(lambda typed, share: (False, answer(typed, False, share)), *slide, **alone)
        gr.on([upload.upload, again.click], run, [upload, kept, plain, percent], told, **alone)
        save.click(None, content, js=_SAVE)
    return page


def main(
    checkpoint: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str | None = None,
    data: str | None = None,
) -> None:
    """Serves the page until interrupted.

    Args:
        checkpoint: Folder or Hub id of a BudgetFormer classifier; None: what `make demo` saved in "demo-output".
        host: Address to bind; "0.0.0.0" lets other machines in.
        port: To listen on; None: the first free one from 7860.
        device: Where the model runs; None: the accelerator, if there is one.
        data: See `starting_texts`.

    Raises:
        ValueError: There is no such checkpoint.
        ImportError: gradio or matplotlib is missing.
    """
    if checkpoint is None and not Path(DEMO_CHECKPOINT, "config.json").is_file():
        raise ValueError(
            f"checkpoint must be given where there is no {DEMO_CHECKPOINT}: run `make demo`, which trains one in five "
            "minutes, or name a folder or Hub id: budgetformer page CHECKPOINT."
        )
    checkpoint = checkpoint or DEMO_CHECKPOINT
    model, tokenizer = load_checkpoint(checkpoint, device)
    with tempfile.TemporaryDirectory(prefix="budgetformer-page-") as folder:  # goes, with all that Gradio left there
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        page = build_page(model, tokenizer, checkpoint, data)
        import gradio as gr

        fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        theme = gr.themes.Default(primary_hue="blue", **fonts)
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,  # it would keep what was typed in the browser
            max_file_size=MOST_BYTES,
            footer_links=[],
            theme=theme.set(button_primary_background_fill="*primary_600"),  # readable in white
            css=_CSS,
        )


__all__ = [
    "build_page", "draw_look", "load_checkpoint", "main", "plan_call", "read_file", "show_curves", "show_text",
    "show_texts", "starting_texts", "time_in_turn",
]  # fmt: skip
