"""A page that shows what a checkpoint does: the heads that open for a text, what that saves, and a file at a time."""

import base64
import csv
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from .data import batches_by_length, check_single_label, load_classifier, read_rows
from .evaluation import Evaluation
from .plots import plot_accuracy
from .profiling import profile


DEMO_CHECKPOINT = "demo-output"
MOST_BYTES, MOST_ROWS, MOST_CHARACTERS = 1_000_000, 1_000, 5_000
_BATCH = 32
# An easy text and a harder one.
EXAMPLES = {
    "Documentation": (
        "Send the request to the server and read the headers of its response.",
        "Return a proxy that is closed, unless the caller asked otherwise, once its last reader has let go of it.",
    ),
    "Feelings": (
        "I am so happy today.",
        "I was angry and a little afraid, and yet it amused me how strange that felt.",
    ),
    "Reviews": ("A wonderful film.", "For all its borrowed ideas it has a charm that better made films of late lack."),
}
_CSS = """
.bf-label { font-size: 1.25rem; margin: 0 } .bf-note { font-size: .9rem; margin: .4rem 0 }
.bf-figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; margin: .75rem 0; font-size: .85rem }
.bf-figures > div { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .4rem .6rem }
.bf-figures dd { margin: 0 } .bf-figures dd:nth-child(2) { font-size: 1.25rem; font-weight: 600 }
.bf-heads { width: 100%; max-width: 27rem; height: auto; display: block; font-size: 11px; fill: currentColor }
.bf-heads .open { fill: #0072b2 } .dark .bf-heads .open { fill: #56b4e9 }
.bf-heads .closed { fill: none; stroke: currentColor; stroke-opacity: .5 }
.bf-alert { border-left: 4px solid #d55e00; padding: .4rem .8rem }
.bf-scroll { overflow: auto; max-height: 30rem; font-size: .9rem }
.bf-scroll :is(table, thead, tbody, tr, th, td) { border: 0; text-align: left }
.bf-scroll :is(th, td) { padding: .3rem .5rem; border-top: 1px solid #8886 }
.bf-scroll td:first-child { min-width: 7rem; overflow-wrap: anywhere }
pre.bf-scroll { font-size: min(.9rem, 2.8vw) }
.bf-curve { background: white; border-radius: 6px; max-width: 100%; margin-bottom: .75rem }
"""
_SAVE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "predictions.csv";
    link.click();
}"""


def load_checkpoint(checkpoint: str) -> tuple[Any, Any]:
    """A classifier that chooses its heads, in eval mode, and its tokenizer.

    Raises:
        ValueError: `checkpoint` is neither a folder nor a Hub id of one.
    """
    model, tokenizer = load_classifier(checkpoint, budgeted=True)
    check_single_label(model.config)
    if model.config.static_heads is not None:
        raise ValueError(f"{checkpoint} must choose its heads, got a model cut down to static ones.")
    return model, tokenizer


def read_file(path: str | Path) -> dict[str, list[str]]:
    """The columns text and, if there is one, text_pair of a csv file; or the lines of a txt file.

    Raises:
        ValueError: The file is of another kind, too large or damaged, or holds too much.
    """
    path, rows = Path(path), []
    size, most = path.stat().st_size, f"{MOST_ROWS:,} texts of at most {MOST_CHARACTERS:,} characters"
    if path.suffix not in (".csv", ".txt") or size > MOST_BYTES:
        raise ValueError(f"{path.name} must be a .csv or .txt file of at most {MOST_BYTES:,} bytes, got {size:,}.")
    try:
        for number, (row, fault) in enumerate(read_rows(str(path)), 1):
            long = max(map(len, row.values()), default=0)
            if fault or number > MOST_ROWS or long > MOST_CHARACTERS:
                fault = fault or f"is too much, with {long:,} characters: at most {most}"
                raise ValueError(f"{path.name}: text {number:,} {fault}.")
            rows.append(row)
    except ValueError as error:  # which may go on about the command line
        raise ValueError(str(error).replace(str(path), path.name).partition(": name")[0]) from None
    return {name: [row[name] for row in rows] for name in rows[0]}


def _time_in_turn(model: Any, batch: Any, head_budget: float | None, repeats: int) -> tuple[float, float]:
    """Median seconds at the budget and with all heads; each goes first every other time."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(repeats):
        for which in (repeat % 2, 1 - repeat % 2):
            start = time.perf_counter()
            model(**batch, head_budget=1.0 if which else head_budget)
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _figures(*figures: tuple[str, float, str]) -> str:
    parts = (f"<div><dt>{name}</dt><dd>{share:.0%}</dd><dd>{detail}</dd></div>" for name, share, detail in figures)
    return f'<dl class="bf-figures">{"".join(parts)}</dl>'


def draw_heads(gates: torch.Tensor) -> str:
    """A picture, in SVG, of the heads (layers, H) that are open, which also says so in words."""
    layers, heads = gates.shape
    right, drawn, told = 20 * heads + 30, [], []
    for layer, row in enumerate(gates.tolist()):
        y, opened = 20 * layer + 16, [str(head + 1) for head, gate in enumerate(row) if gate]
        told.append(f"layer {layer + 1}: {', '.join(opened)}")
        drawn.append(f'<text x="18" y="{y + 12}" text-anchor="end">{layer + 1}</text>')
        for head, gate in enumerate(row):
            name, inset, side = ("open", 0, 15) if gate else ("closed", 3.5, 8)  # told apart without colour
            place = f'x="{20 * head + 26 + inset}" y="{y + inset}" width="{side}" height="{side}"'
            drawn.append(f'<rect class="{name}" {place} rx="2"/>')
        drawn.append(f'<text x="{right}" y="{y + 12}">{len(opened)}/{heads}</text>')
    return (
        f'<svg class="bf-heads" role="img" aria-label="Open heads of {heads}, {"; ".join(told)}" '
        f'viewBox="0 0 {right + 36} {20 * layers + 18}"><text x="0" y="10">layer</text>'
        f'<text x="{right}" y="10">open</text>{"".join(drawn)}</svg>'
    )


@torch.no_grad()
def show_text(model: Any, tokenizer: Any, text: str, head_budget: float | None) -> str:
    """What a model makes of one text, and what its closed heads save, measured; in HTML.

    Args:
        model: A BudgetFormer classifier in eval mode.
        tokenizer: Of the model.
        text: One text.
        head_budget: As in `forward`.

    Raises:
        ValueError: The text is empty or too long.
    """
    if not text.strip() or len(text) > MOST_CHARACTERS:
        raise ValueError(f"A text must have 1 to {MOST_CHARACTERS:,} characters, got {len(text.strip()):,}.")
    longest = tokenizer.model_max_length
    batch = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
    out, full = model(**batch, head_budget=head_budget, output_head_gates=True), model(**batch, head_budget=1.0)
    (label, *others), (same, *_) = (
        [
            f"<b>{escape(str(model.config.id2label[index]))}</b> {share:.0%}"
            for share, index in zip(
                *(x.tolist() for x in answer.logits[0].softmax(-1).sort(descending=True)), strict=True
            )
        ]
        for answer in (out, full)
    )
    flops, gates = profile(model, batch, head_budget), out.head_gates[0]
    own, everything = _time_in_turn(model, batch, head_budget, repeats=7)
    spent, all_flops = sum(flops.sparse.values()) / 1e9, sum(flops.backbone.values()) / 1e9
    figures = _figures(
        ("Heads", gates.mean().item(), f"{int(gates.sum())} of {gates.numel()}"),
        ("FLOPs", flops.ratio, f"{spent:.3g} of {all_flops:.3g} G"),
        ("Time", own / everything, f"{1000 * own:.1f} of {1000 * everything:.1f} ms"),
    )
    notes = [f"Filled squares are the heads that ran. All heads say {same}; shares are of what they take."]
    if own > 0.95 * everything and not gates.all():
        notes.append("No time is saved on this one text: choosing heads takes about what closed ones spare.")
    if len(tokenizer(text, verbose=False)["input_ids"]) > longest:
        notes.append(f"Only its first {longest} tokens were read.")
    return (
        f'<p class="bf-label">{label}</p><p class="bf-note">then {", ".join(others[:2])}</p>{figures}'
        f'{draw_heads(gates)}<p class="bf-note">{" ".join(notes)}</p>'
    )


@torch.no_grad()
def show_texts(
    model: Any, tokenizer: Any, texts: dict[str, list[str]], head_budget: float | None, tell: Callable[[float], Any]
) -> tuple[str, str]:
    """Classifies many texts, and measures what their closed heads save.

    Args:
        model: A BudgetFormer classifier in eval mode.
        tokenizer: Of the model.
        texts: The columns text and perhaps text_pair, of one row or more.
        head_budget: As in `forward`.
        tell: Called with the share that is done, in (0, 1].

    Returns:
        A summary and a table, in HTML, and the table as a csv file's content.
    """
    count = len(texts["text"])
    rows: list[list[str]] = [list(row) for row in zip(*texts.values(), strict=True)]
    own, everything, heads, same, done = 0.0, 0.0, 0.0, 0, 0
    for places, batch in batches_by_length(texts, tokenizer, _BATCH):
        # What is asked here also warms up for what is timed.
        out, full = model(**batch, head_budget=head_budget), model(**batch, head_budget=1.0)
        times = _time_in_turn(model, batch, head_budget, repeats=2)
        own, everything, heads = own + times[0], everything + times[1], heads + out.head_budget.sum().item()
        shares, labels = out.logits.softmax(-1).max(-1)
        same += int((labels == full.logits.argmax(-1)).sum())
        for place, label, share, spent in zip(places, labels.tolist(), shares, out.head_budget, strict=True):
            rows[place] += [str(model.config.id2label[label]), f"{share:.3f}", f"{spent:.3f}"]
        done += len(places)
        tell(done / count)
    figures = _figures(
        ("Heads", heads / count, f"mean of {count:,} texts"),
        ("Time saved", 1 - own / everything, f"{own:.2f} s, all heads {everything:.2f} s"),
        ("Same label", same / count, "as with all heads"),
    )
    how = f"Measured on these texts, in batches of {_BATCH} of like length, both ways in turn, without tokenizing."
    rows.insert(0, [*texts, "label", "score", "heads"])
    first, *lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    table = f"<thead><tr>{first.replace('td>', 'th>')}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody>"
    content = io.StringIO(newline="")
    csv.writer(content).writerows(rows)
    scroll = f'<div class="bf-scroll" tabindex="0" role="region" aria-label="Predictions"><table>{table}</table></div>'
    return f'{figures}<p class="bf-note">{how}</p>{scroll}', content.getvalue()


def show_curve(checkpoint: str) -> str:
    """Accuracy by budget in HTML, from what `budgetformer evaluate` left beside the checkpoint; or how to get it."""
    try:
        path: Any = cached_file(checkpoint, "budgetformer/evaluation.json")
    except OSError:
        command = f"budgetformer evaluate {escape(checkpoint)} DATA"
        return f"<p>This checkpoint has no curve yet. Labelled texts make one: <code>{command}</code></p>"
    evaluation = Evaluation.from_dict(json.loads(Path(path).read_text("utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        picture = base64.b64encode(plot_accuracy(evaluation, Path(folder, "curve.png")).read_bytes()).decode()
    told = "Accuracy against the share of heads that ran, as in the table below"
    return (
        f'<img class="bf-curve" src="data:image/png;base64,{picture}" alt="{told}">'
        f'<pre class="bf-scroll" tabindex="0" role="region" aria-label="Accuracy by budget">{evaluation}</pre>'
    )


def build_page(model: Any, tokenizer: Any, checkpoint: str) -> Any:
    """The page, a `gradio.Blocks`; nothing that is typed is written to disk, and what is uploaded is removed again.

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

    def answer(text: str, own: bool, percent: float) -> str:
        try:
            return show_text(model, tokenizer, text, None if own else percent / 100)
        except ValueError as error:
            return failed(error)

    def compare(left: str, right: str, own: bool, percent: float) -> tuple[str, str]:
        return answer(left, own, percent), answer(right, own, percent)

    def slide(left: str, right: str, percent: float) -> tuple[bool, str, str]:
        return False, *compare(left, right, False, percent)

    def choose(name: str, own: bool, percent: float) -> tuple[str, ...]:
        return *EXAMPLES[name], *compare(*EXAMPLES[name], own, percent)

    progress = gr.Progress()

    def run(path: str | None, texts: Any, own: bool, percent: float, tell: Any = progress) -> tuple[Any, ...]:
        try:
            texts = read_file(path) if path else texts
        except ValueError as error:
            return None, None, failed(error), "", gr.update(visible=False)
        finally:
            if path:
                Path(path).unlink(missing_ok=True)
        shown, content = show_texts(model, tokenizer, texts, None if own else percent / 100, tell)
        return None, texts, shown, content, gr.update(visible=True)

    shape = f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads, {config.num_labels} labels"
    saved = "The model's own budget" if config.head_budget is None else f"Its saved budget, {config.head_budget:.0%}"
    first = next(iter(EXAMPLES))
    with gr.Blocks(title="BudgetFormer", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# BudgetFormer\n`{checkpoint}`, {shape}: for each text and layer it chooses which heads to run.")
        with gr.Row():
            with gr.Column(min_width=280):
                own = gr.Checkbox(True, label=saved)
            with gr.Column(min_width=280):
                least = math.ceil(100 / config.num_attention_heads)
                percent = gr.Slider(
                    least, 100, value=50, step=1, label="Or ask for a share of the heads, in %", buttons=[]
                )
        with gr.Tab("Texts"):
            with gr.Row():
                pick = gr.Dropdown(list(EXAMPLES), value=first, label="Pick two texts, or type", min_width=180)
                texts = [
                    gr.Textbox(text, label=f"Text {n}", lines=2, max_length=MOST_CHARACTERS, scale=2, min_width=280)
                    for n, text in enumerate(EXAMPLES[first], 1)
                ]
            classify = gr.Button("Classify", variant="primary")
            answers = []
            with gr.Row():
                for _ in texts:
                    with gr.Column(min_width=280):
                        answers.append(gr.HTML())
        with gr.Tab("File"):
            most = f"{MOST_ROWS:,} texts of {MOST_CHARACTERS:,} characters, {MOST_BYTES // 10**6} MB"
            gr.Markdown(f"A csv file with a column `text`, or a txt file with a text in each line: at most {most}.")
            upload = gr.File(label="File, deleted once it is read", file_types=[".csv", ".txt"], height=150)
            kept, shown, content = gr.State(), gr.HTML(), gr.Textbox(visible=False)
            with gr.Row(visible=False) as buttons:
                again = gr.Button("Run again at the budget above")
                save = gr.Button("Download predictions.csv")
        with gr.Tab("Accuracy"):
            gr.HTML(show_curve(checkpoint))

        # One at a time, or times lie; and the last one asked for always runs.
        alone: Any = {"concurrency_id": "model", "concurrency_limit": 1, "trigger_mode": "always_last"}
        alone["api_visibility"] = "private"
        asked, told = [*texts, own, percent], [upload, kept, shown, content, buttons]
        gr.on([page.load, classify.click, own.input, *(x.submit for x in texts)], compare, asked, answers, **alone)
        pick.change(choose, [pick, own, percent], [*texts, *answers], **alone)  # to leave it is an input too
        percent.input(slide, [*texts, percent], [own, *answers], **alone)
        gr.on([upload.upload, again.click], run, [upload, kept, own, percent], told, **alone)
        save.click(None, content, js=_SAVE)
    return page


def main(checkpoint: str | None = None, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the page until interrupted.

    Args:
        checkpoint: Folder or Hub id of a BudgetFormer classifier; None: what `make demo` saved in "demo-output".
        host: Address to bind; "0.0.0.0" lets other machines in.
        port: To listen on; None: the first free one from 7860.

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
    model, tokenizer = load_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(prefix="budgetformer-page-") as folder:  # goes, with all that Gradio left there
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        page = build_page(model, tokenizer, checkpoint)
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


__all__ = ["build_page", "draw_heads", "load_checkpoint", "main", "read_file", "show_curve", "show_text", "show_texts"]
