"""The documents' blocks run or parse as they are written, and their tables are what was measured."""

import copy
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, HfArgumentParser, TrainingArguments

import loopback_hub
from documents import README, ROOT, blocks, run_python, use_stand_ins
from hf_budgetformer import BudgetFormerConfig
from hf_budgetformer.tools.results import read_results
from loopback_hub import LoopbackHub


DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if path.resolve().is_relative_to(DOCS.resolve())
}
EVERYTHING = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), **PAGES}


@pytest.fixture(scope="module")
def five_lines(tmp_path_factory, texts, tokenizer):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_stand_ins(monkeypatch, tmp_path_factory.mktemp("docs"), texts, tokenizer)
        yield run_python("README.md", blocks(README, "python")[:1])


@pytest.fixture(scope="module")
def namespace(five_lines):
    """What is there after all of the README's blocks."""
    stock = AutoModelForSequenceClassification.from_pretrained("me/my-fine-tuned-bert").eval()
    variables = {**five_lines, "model": copy.deepcopy(five_lines["model"])}
    return {**run_python("README.md", blocks(README, "python")[1:], variables), "stock": stock}


def test_the_readmes_blocks_run_in_order(namespace):
    assert namespace["model"].is_trained()
    assert namespace["model"].config.margins is not None
    assert namespace["out"].budget.shape == (2,)
    assert set(namespace["classify"]("w1 w2")[0]) == {"label", "score"}


def test_a_budget_of_1_is_the_users_model_after_training_too(namespace):
    model, batch = namespace["model"], namespace["batch"]
    ours = model(**batch, budget=1.0, executor="masked").logits
    assert torch.equal(ours, namespace["stock"](**batch).logits)


def count_flops(model, batch, budget):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, budget=budget)
    return counter.get_total_flops()


def test_a_quarter_of_the_work_is_at_most_a_quarter_of_the_flops_with_gradients_on(namespace):
    model, batch = namespace["model"].eval(), namespace["batch"]
    assert torch.is_grad_enabled()
    whole = count_flops(model, batch, 1.0)
    # Work is counted at 128 tokens, where a head of a model this narrow costs nearly twice what it does at these few.
    assert 0.15 < count_flops(model, batch, 0.25) / whole < 0.27
    assert count_flops(model, batch, 1 / 12) / whole < 0.15


def test_the_table_of_savings_is_what_was_measured():
    import report

    results = report.read_results(BENCHMARKS / "results")
    assert report.fill(README, "savings", report.savings(results)) == README


def test_the_table_of_savings_is_made_of_results():
    import report

    names = ["stock", "onnx-int8", "openvino-int8", "ours 1", "looks 1/12, all for 10%", "ours 1/4"]
    figures = {
        "ways": {f"{x} sorted": {"ratio_to_sorted": {"median": float(n)}} for n, x in enumerate(names, 1)},
        "latency_ms": {"ours 1/4": {"ratio": 2.5}},
    }
    result = {"settings": {"level": "model", "title": "Some news"}, "figures": {"2": figures}}
    table = report.savings({"some": result})
    for number, start in enumerate(
        ["stock model, P", "stock model, onnx", "stock model, O", "ours, all", "**o", "ours, e"], 1
    ):
        assert re.search(rf"^\| {re.escape(start)}.* \| {number}.0x \|$", table, flags=re.MULTILINE)
    assert "2.5x (Some news)" in table
    assert "Not measured yet" in report.savings({})


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", README))
def test_the_readmes_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def pages_of_python():
    """Start's blocks are run with its shell blocks, further down; to export takes the graphs of two encoders."""
    names = [name for name, page in PAGES.items() if blocks(page, "python") and name != "start.md"]
    return [pytest.param(x, marks=[pytest.mark.slow] if "export_looks" in PAGES[x] else []) for x in names]


# The warning is of peft, which asks by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", pages_of_python())
def test_the_python_blocks_of_a_page_run_after_the_five_lines(name, five_lines):
    run_python(name, blocks(PAGES[name], "python"), {**five_lines, "model": copy.deepcopy(five_lines["model"])})


def test_start_ends_with_the_readmes_five_lines():
    assert blocks(PAGES["start.md"], "python")[-1] == blocks(README, "python")[0]


def commands(page):
    """Every command of a page's shell blocks, in words."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "|"]:
                if word not in ("|", "&&", ">"):
                    words.append(word)
                elif words:
                    yield words[sum(bool(re.fullmatch(r"\w+=.*", word)) for word in words[:1]) :]
                    words = []


COMMANDS = [(name, words) for name, page in EVERYTHING.items() for words in commands(page)]


def started_with(*first):
    matches = [words for _, words in COMMANDS if tuple(words[: len(first)]) == first]
    return [pytest.param(words[len(first) :], id=" ".join(words)) for words in matches]


@pytest.mark.parametrize("words", started_with("make"))
def test_make_knows_the_target(words):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE)
    for variable in words[1:]:
        assert f"$({variable.split('=')[0]})" in makefile or f",{variable.split('=')[0]})" in makefile


@pytest.mark.parametrize("words", started_with("pip", "install"))
def test_extras_exist(words):
    extras = (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1]
    for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        for extra in names.split(","):
            assert re.search(rf"^{extra} =", extras, flags=re.MULTILINE), extra


@pytest.mark.parametrize("words", started_with("budgetformer"))
def test_the_command_line_has_the_commands_and_options(words):
    typer = pytest.importorskip("typer")
    import hf_budgetformer_cli as cli

    command = typer.main.get_command(cli.app).commands[words[0]]
    with command.make_context(words[0], words[1:]) as context:
        if words[0] == "train":
            HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*context.args, "--output_dir", "out"])


def script_and_options(words):
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script = re.sub(r"^\$\{?CHECKOUT\}?/", "", words[place])
    return ROOT / script, [word.split("=")[0] for word in words[place + 1 :] if word.startswith("--")]


@pytest.mark.parametrize("words", [*started_with("python"), *started_with("accelerate", "launch")])
def test_scripts_exist_and_have_the_options(words):
    script, options = script_and_options(words)
    source = script.read_text(encoding="utf-8")
    known = {f"--{field.name}" for field in fields(TrainingArguments)} if "TrainingArguments" in source else set()
    known |= set(re.findall(r'"(--[\w-]+)"', source))
    known |= {f"--{name}" for name in re.findall(r"^    (\w+): .*field\(", source, flags=re.MULTILINE)}
    assert set(options) <= known


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_a_page_names_exists(name):
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", EVERYTHING[name], flags=re.DOTALL | re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for text in code:
        if re.fullmatch(r"(benchmarks|docs|examples|src|tests|tools)/[\w./]*", text):
            places = (ROOT, ROOT / "src" / "hf_budgetformer")
            assert any((place / text).exists() for place in places), text
        if target := re.match(r"make ([\w-]+)", text):
            assert re.search(rf"^{target[1]}:", makefile, flags=re.MULTILINE), text
        if re.fullmatch(r"test_\w+", text):
            assert f"def {text}(" in tests, text


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", PAGES[name]):
        assert (DOCS / name).parent.joinpath(target).exists(), target


def test_the_drawing_has_the_names_of_the_code():
    package = ROOT / "src" / "hf_budgetformer"
    source = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    names = re.findall(r'class="code">([^<]+)<', (DOCS / "images" / "way_of_an_input.svg").read_text(encoding="utf-8"))
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"\b{re.escape(name.split('=')[0])}\b", source)] == []


def test_the_configuration_table_is_complete_and_true():
    documented = {}
    for names, defaults in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", PAGES["configuration.md"], flags=re.MULTILINE):
        keys, values = re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", ")
        documented.update(zip(keys, values, strict=True))
    config = BudgetFormerConfig()
    explained = config.__class__.__doc__.split("The remaining fields")[1].split("Raises:")[0]
    assert sorted(documented) == sorted(re.findall(r"^        (\w+): ", explained, flags=re.MULTILINE))
    for field, value in documented.items():
        actual = getattr(config, field)
        shown = f"{actual:g}" if isinstance(actual, float | int) and not isinstance(actual, bool) else str(actual)
        assert value.strip('"') == shown, field


def script_of_start(port):
    """The page's blocks in one shell script, as a reader with two terminals would run them.

    Without README's five lines, which end it: they want a model and data of the Hub, and run with stand-ins above.
    """
    parts = ["set -eu"]
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", PAGES["start.md"], flags=re.DOTALL | re.MULTILINE):
        if "pip install" in block:
            block = f"export CHECKOUT={shlex.quote(str(ROOT))}\n"  # the environment is that of the tests
        if block == blocks(README, "python")[0]:
            continue
        if "serve.py" in block:
            block = (
                f"{block.strip()} --port {port} & trap 'kill '$! EXIT\n"
                f"until curl --silent --fail 127.0.0.1:{port}/health; do sleep 1; kill -0 $!; done\n"
            )
        parts.append(f"python - <<'END'\n{block}END" if language == "python" else block)
    # A login asks the Hub for more than the one here knows.
    script = "\n".join(parts).replace("hf auth login\n", "").replace(" me/", f" {LoopbackHub.user}/")
    return script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page uses curl")
def test_following_start_in_an_empty_folder_ends_at_a_served_model(tmp_path, monkeypatch):
    monkeypatch.setattr(loopback_hub, "LARGEST_UPLOAD", 2**28)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with LoopbackHub() as hub:
        environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        (tmp_path / "empty").mkdir()
        run = subprocess.run(
            ["bash", "-c", script_of_start(port)],
            cwd=tmp_path / "empty",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3000,
        )
        assert run.returncode == 0, run.stdout
        published = hub.files(f"{hub.user}/my-budgetformer")
    assert {"README.md", "model.safetensors", "modeling_budgetformer.py", "tokenizer.json"} <= published.keys()
    assert not any(name.startswith("teacher") for name in published)
    answers = [json.loads(text) for text in re.findall(r'\{"label".*?\}', run.stdout)]
    assert len(answers) == 2
    assert answers[1]["budget"] == pytest.approx(0.25, abs=0.01)
    [evaluated] = read_results(tmp_path / "empty" / "my-budgetformer", "evaluation")
    assert evaluated.result["results"][0]["accuracy"] > 0.3  # eight labels
