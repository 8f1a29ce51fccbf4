"""The demo page: what its functions say against the model, and the page itself in a real browser."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset

from conftest import budgetformer, stock_folder
from hf_budgetformer.tools import page
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.looking import plan_call
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.results import save_result, write_json
from hf_budgetformer.tools.tuning import calibrate_margins


ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
NAMES = {0: "first", 1: "<i>second</i>", 2: "third"}
BUDGETS = {"Plain call": None, "A quarter": 0.25, "Full model": 1.0}


@pytest.fixture(scope="module")
def model(texts, tokenizer):
    """Doubts about half of its first looks."""
    torch.manual_seed(0)  # the seed of conftest is for one test
    model = budgetformer("bert")
    model.config.id2label = NAMES
    model.config.label2id = {name: number for number, name in NAMES.items()}
    calibrate_margins(model, [tokenizer(texts["text"][:], padding=True, return_tensors="pt")])
    model.config.looks, model.config.confidence = [0.125, 1.0], [model.config.margins["quantiles"][50]]
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("page") / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = [
        BudgetResult(1.0, 54, 0.9, (0.8, 0.95), 1.0, 1.0),
        BudgetResult(0.25, 48, 0.8, (0.68, 0.88), 0.9, 0.24),
        BudgetResult(None, 51, 0.85, (0.74, 0.92), 0.95, 0.5),
    ]
    save_result(folder, "evaluation", Evaluation(60, results, {}, {}).to_dict(), "me/teapots", "test", 60)
    return folder


def escaped(label):
    return NAMES[label].replace("<", "&lt;").replace(">", "&gt;")


def columns_of(shown):
    """The table in the HTML: of each column the cells by the names of their rows."""
    lines = [
        [cell.strip() for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", line, re.DOTALL)]
        for line in re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    ]
    head, *body = lines
    return {name: {row[0]: row[place] for row in body} for place, name in enumerate(head) if place}


def ask(model, tokenizer, *text, **options):
    with torch.no_grad():
        return model(**tokenizer(*text, truncation=True, return_tensors="pt"), **options)


@pytest.mark.parametrize("budget", [None, 0.125, 0.6, 1.0])
def test_a_text_is_shown_with_what_the_model_says_and_spends(model, tokenizer, texts, budget):
    counted = []
    for text in [*texts["text"][:12], "", " \n", "w1 " * 99]:
        out = ask(model, tokenizer, text, budget=budget)
        [probability], [label] = (x.tolist() for x in out.logits.softmax(-1).max(-1))
        shown = page.show_text(model, tokenizer, text, budget)
        assert shown.startswith(f"<h2><b>{escaped(label)}</b> {probability:.0%}</h2>")
        assert re.search(rf"<p>[\d.]+ ms, {out.budget.item():.0%} of the work. Full model: [\d.]+ ms.</p>", shown)
        columns = columns_of(shown)
        assert list(columns)[-1] == "Full model"
        verdicts = [column["Verdict"] for column in columns.values()]
        counted.append(1 + verdicts.index("This is the answer"))
    assert set(counted) == ({1, 2} if len(plan_call(model, budget).looks) == 2 else {1})


def test_each_look_is_shown_with_what_it_opens_and_said_its_margin_and_its_time(model, tokenizer, texts):
    plan = plan_call(model, None)
    counts = plan.looks[0].counts
    blocks = [round(neurons / 6) for neurons in counts.neurons]  # of 24 neurons in 4 blocks
    doubted = set()
    for text in texts["text"][:12]:
        columns = columns_of(page.show_text(model, tokenizer, text, None))
        for name, budget in (("Look 1", 0.125), ("Full model", 1.0)):
            shares = ask(model, tokenizer, text, budget=budget).logits.softmax(-1)[0].sort(descending=True)
            margin = (shares.values[0] - shares.values[1]).item()
            assert columns[name]["Answer"] == f"<b>{escaped(shares.indices[0].item())}</b> {shares.values[0]:.0%}"
            assert columns[name]["Margin"].startswith(f"{margin:.2f}")
            assert re.match(r"[\d.]+", columns[name]["Milliseconds"])
            if budget < 1.0:
                doubt = margin < plan.thresholds[0]
        verdicts = [column["Verdict"] for column in columns.values()]
        sure = ["This is the answer", "Not needed"]
        assert verdicts == (["In doubt: look on", "This is the answer"] if doubt else sure)
        assert columns["Look 1"]["Share of the work"] == f"{plan.looks[0].cost:.0%}"
        assert columns["Look 1"]["Open heads"] == page.draw_units(counts.heads, 4)
        assert columns["Look 1"]["Open feed-forward blocks"] == page.draw_units(blocks, 4)
        assert columns["Full model"]["Open heads"] == page.draw_units([4, 4, 4], 4)
        doubted.add(doubt)
    assert doubted == {True, False}


def test_units_are_drawn_as_squares_and_told_in_words():
    drawn = page.draw_units([3, 0, 4], 4)
    assert drawn == ('<pre role="img" aria-label="Open of 4 in each layer: 3, 0, 4">■■■□\n□□□□\n■■■■</pre>')


def test_before_training_the_full_model_answers_alone(tokenizer):
    untrained = budgetformer("bert", trained=False)
    columns = columns_of(page.show_text(untrained, tokenizer, "w1 w2", None))
    assert list(columns) == ["Full model"]
    assert columns["Full model"]["Verdict"] == "This is the answer"


def test_the_time_of_a_look_is_the_median_of_turns(model, tokenizer, monkeypatch):
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: (calls.append(given["budget"]), forward(**given))[1])
    monkeypatch.setattr(page, "REPEATS", 3)
    clock = iter([0.0, 1.0, 1.0, 4.0, 4.0, 9.0, 9.0, 11.0, 11.0, 13.0, 13.0, 22.0])  # 1, 5, 2 and 3, 2, 9 seconds
    monkeypatch.setattr(page.time, "perf_counter", lambda: next(clock))
    columns = columns_of(page.show_text(model, tokenizer, "w1", 0.25))
    monkeypatch.undo()
    times = [column["Milliseconds"].partition(" ")[0] for column in columns.values()]
    assert times == ["2000.0", "3000.0"]
    assert calls == [model.narrow.order.look(0.25).cost, 1.0] * 3


@pytest.mark.parametrize("columns", [("text",), ("text", "text_pair")])
def test_a_files_table_is_what_the_model_says_of_each_row_alone(model, tokenizer, texts, columns):
    given = pd.DataFrame({name: texts["text"][:12] for name in columns})
    shown, table = page.show_file(model, tokenizer, given, BUDGETS)
    assert list(table) == [*columns, *BUDGETS, "score", "budget"]
    spent, same = [], 0
    for row in table.to_dict("records"):
        outs = {name: ask(model, tokenizer, *(row[name] for name in columns), budget=BUDGETS[name]) for name in BUDGETS}
        labels = {name: out.logits.argmax().item() for name, out in outs.items()}
        assert {name: row[name] for name in BUDGETS} == {name: NAMES[label] for name, label in labels.items()}
        plain = outs["Plain call"]
        assert row["score"] == pytest.approx(plain.logits.softmax(-1).max().item(), abs=1e-5)
        assert row["budget"] == pytest.approx(plain.budget.item(), abs=1e-5)
        spent.append(plain.budget.item())
        same += labels["Plain call"] == labels["Full model"]
    assert any(share > 1.0 for share in spent)
    lines = pd.DataFrame(columns_of(shown)).to_dict("index")
    assert list(lines) == list(BUDGETS)
    assert lines["Plain call"]["Share of the work"] == f"{sum(spent) / 12:.1%}"
    assert lines["Plain call"]["Agreement"] == f"{same / 12:.1%}"
    assert lines["Full model"]["Agreement"] == "100.0%"
    assert all(re.fullmatch(r"\d+\.\d\d", line["Seconds"]) for line in lines.values())


def test_what_is_saved_is_the_table(model, tokenizer):
    given = pd.DataFrame({"text": ['<img src="x" onerror="alert()">, w1\r\nw2', "w3\rw4"]})
    shown, table = page.show_file(model, tokenizer, given, BUDGETS)
    content = re.search(r'<a download="predictions.csv" href="data:text/csv;base64,(.*?)">', shown)[1]
    rows = list(csv.reader(io.StringIO(base64.b64decode(content).decode(), newline="")))
    assert rows == [list(table), *([str(cell) for cell in row] for row in table.itertuples(index=False))]


@pytest.fixture
def run(model, tokenizer, checkpoint):
    """What the page does with an uploaded file: HTML, and the table as values."""
    pytest.importorskip("gradio")
    blocks = page.build_page(model, tokenizer, str(checkpoint), page.EXAMPLES)
    [function] = [function.fn for function in blocks.fns.values() if function.name == "run"]

    def run(path):
        shown, table = function(str(path))
        return shown, table.value["data"]

    return run


def test_files_are_read_and_removed(run, tmp_path):
    (tmp_path / "a.csv").write_text('\ufefflabel,text\n1,"one, ""two"""\n0,drei\n', encoding="utf-8")
    (tmp_path / "b.csv").write_text("text_pair,text\nb,a\n")
    (tmp_path / "c.txt").write_text("one, two\r\nüber\n", encoding="utf-8")
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "d.parquet")
    given = {"a.csv": [['one, "two"'], ["drei"]], "b.csv": [["a", "b"]], "c.txt": [["one, two"], ["über"]]}
    given["d.parquet"] = [["a"], ["b"]]
    for name, rows in given.items():
        _, data = run(tmp_path / name)
        assert [row[: len(rows[0])] for row in data] == rows
    assert list(tmp_path.iterdir()) == []


def test_of_a_long_file_the_first_rows_are_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_ROWS", 3)
    (tmp_path / "a.txt").write_text("w1\n" * 4)
    shown, data = run(tmp_path / "a.txt")
    assert len(data) == 3
    assert "3 texts" in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"<b>,label\ngood,1\n", r"a\.csv must have a column 'text', got the columns \['<b>', 'label'\]"),
        ("a.csv", b"", r"a\.csv must hold at least one row that can be read, got none"),
        ("a.csv", b"text\ngood\nb\xe4d\n", r"a\.csv: 1 of 2 rows are broken .* row 1 is not UTF-8 in 'text'"),
        ("a.csv", b'text\nw\n"open\n', r"a\.csv: 1 of 2 rows are broken .* row 1 is not csv"),
        ("a.csv", b"text\nw\nw,w\n", r"a\.csv: 1 of 2 rows are broken .* row 1 has more fields than the header"),
        ("a.exe", b"w", r"a\.exe: the file's name must end in one of"),
        ("a.parquet", b"PAR1", r"a\.parquet is no parquet file"),
    ],
)
def test_a_bad_file_is_named_without_its_place_on_the_server(run, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=re.escape(name)) as caught:
        run(tmp_path / name)
    text = caught.value.message
    assert re.match(message, text.replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'"))
    assert "<" not in text
    assert str(tmp_path) not in text
    assert "--" not in text
    assert not (tmp_path / name).exists()


def test_the_page_starts_with_rows_of_the_users_data(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,0\nw1,0\nw2,1\nw1,0\nw3,1\nw4,1\nw5,1\n")
    (tmp_path / "other.csv").write_text("text\nw9\n")
    (tmp_path / "renamed.csv").write_text("review\nw9\n")
    write_json(tmp_path / "budgetformer" / "training.json", {"dataset": str(tmp_path / "rows.csv")})
    assert page.starting_texts(str(tmp_path)) == ["w1", "w2", "w3", "w4"]
    assert page.starting_texts(str(tmp_path), str(tmp_path / "other.csv")) == ["w9"]
    assert page.starting_texts("me/model") == page.EXAMPLES
    for dataset in (None, "me/data", str(tmp_path / "gone.csv"), str(tmp_path / "renamed.csv")):
        write_json(tmp_path / "budgetformer" / "training.json", {"dataset": dataset})
        assert page.starting_texts(str(tmp_path)) == page.EXAMPLES
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        page.starting_texts(str(tmp_path), str(tmp_path / "gone.csv"))
    with pytest.raises(ValueError, match="must have a column 'text'"):
        page.starting_texts(str(tmp_path), str(tmp_path / "renamed.csv"))


def test_the_curve_is_drawn_with_its_table_and_data_or_the_page_says_how_to_make_one(checkpoint, tmp_path):
    shown = page.show_curves(str(checkpoint))
    assert re.search(r'<img alt="[^"]+" src="data:image/png;base64,iVBOR', shown)
    assert re.search(r"plain +85\.0% ", shown)
    assert "On 60 rows of me/teapots, test, by a model whose plain call looks at" in shown
    assert "OUT OF DATE" not in shown
    assert f"<code>budgetformer evaluate {tmp_path} DATA</code>" in page.show_curves(str(tmp_path))


def test_a_curve_of_other_weights_is_marked(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "changed")
    budgetformer("bert").save_pretrained(tmp_path / "changed")
    assert "OUT OF DATE" in page.show_curves(str(tmp_path / "changed"))


def test_only_a_classifier_that_looks_twice_is_taken(tokenizer, tmp_path, monkeypatch):
    others = {
        "cut": (cut(budgetformer("bert"), 0.25), "must look twice.* full_encoder=False"),
        "routed": (budgetformer("bert", router="layer"), "must look twice.* router='layer'"),
        "regression": (budgetformer("bert", num_labels=1), "num_labels=1"),
    }
    for name, (other, message) in others.items():
        other.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            page.main(str(tmp_path / name))
    stock_folder("bert", tmp_path / "stock")
    for name in ("stock", "none"):
        with pytest.raises(ValueError, match=name):
            page.main(str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="demo-output"):
        page.main()


def texts_of(blocks):
    return " ".join(block.value for block in blocks.blocks.values() if isinstance(getattr(block, "value", None), str))


def test_the_promise_is_told_in_words_as_long_as_it_is_kept(model, tokenizer, checkpoint, monkeypatch):
    pytest.importorskip("gradio")
    assert "Its answers" not in texts_of(page.build_page(model, tokenizer, str(checkpoint), page.EXAMPLES))
    promise = {"risk": "tolerance", "level": 0.005, "confidence": 0.95, "rows": 5000, "bound": 0.004, "lost": 0.001}
    promise |= {"looks": model.config.looks, "thresholds": model.config.confidence, "doubted": 9}
    monkeypatch.setattr(model.config, "promise", promise)
    text = texts_of(page.build_page(model, tokenizer, str(checkpoint), page.EXAMPLES))
    assert "Its answers lose at most 0.5 points of accuracy on the full model's for texts like the 5,000" in text
    monkeypatch.setattr(model.config, "looks", [0.2, 1.0])
    assert "Its answers" not in texts_of(page.build_page(model, tokenizer, str(checkpoint), page.EXAMPLES))


def test_without_gradio_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[page\]"'):
        page.build_page(model, tokenizer, "name", page.EXAMPLES)


def test_the_space_asks_for_what_the_package_needs():
    setup = (ROOT / "setup.cfg").read_text("utf-8")
    needed = re.search(r"install_requires =\n((?:    .*\n)+)", setup)[1].split()
    assert set(needed) <= set((SPACE / "requirements.txt").read_text("utf-8").split())
    _, front, _ = (SPACE / "README.md").read_text("utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert (SPACE / "app.py").is_file()
    assert card["sdk_version"].startswith("6.")


def find(browser, css):
    return [element for element in browser.find_elements("css selector", css) if element.is_displayed()]


def wait(browser, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    replaced = [StaleElementReferenceException]  # while it was looked at
    return WebDriverWait(browser, 30, 0.1, ignored_exceptions=replaced).until(lambda _: condition())


def answer(browser):
    """What is answered, and what each look opens; empty before it is there."""
    return [element.text for element in find(browser, "h2, pre[role=img]")]


def button(browser, text):
    [match] = [element for element in find(browser, "button:not([tabindex='-1'])") if element.text.strip() == text]
    return match


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    """The Space in a folder as it would be on the Hub, served; its address, and the only folders it may write in."""
    pytest.importorskip("gradio", reason='needs gradio: pip install "hf-budgetformer[page]"')
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(SPACE, folder / "app")
    shutil.copytree(ROOT / "src" / "hf_budgetformer", folder / "app" / "hf_budgetformer")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "CHECKPOINT": str(checkpoint)}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as file:
        command = [sys.executable, "-u", "app.py"]
        process = subprocess.Popen(command, cwd=folder / "app", env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while not (match := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield match[0], folder
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chromium.downloads = tmp_path_factory.mktemp("downloads")
    allow = {"behavior": "allow", "downloadPath": str(chromium.downloads)}
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", allow)
    yield chromium
    chromium.quit()


@pytest.fixture
def browser(server, chromium):
    """The page, loaded anew; at the end nothing went wrong in its console, and it asked nobody but its server."""
    address, _ = server
    chromium.get(address)
    wait(chromium, lambda: answer(chromium))
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
    sent = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []


def open_file(browser, path):
    if not [tab for tab in find(browser, "button[role=tab][aria-selected=true]") if tab.text == "File"]:
        button(browser, "File").click()
    browser.find_element("css selector", "input[type=file]").send_keys(str(path))


def cells(browser):
    """Rows of the table of answers, as far as they are in view."""
    rows = find(browser, "[role=row][data-index]")
    return [[cell.text for cell in row.find_elements("css selector", "[role=gridcell]")] for row in rows]


@pytest.mark.browser
def test_the_page_classifies_what_is_typed(browser, model, tokenizer):
    [box] = find(browser, "textarea")
    for text in ("w1 w2 w3", "w21 w22 w23 w24 w25"):
        box.clear()
        box.send_keys(text)
        button(browser, "Classify").click()
        probability, number = ask(model, tokenizer, text).logits.softmax(-1)[0].max(-1)
        wanted = f"{NAMES[number.item()]} {probability:.0%}"
        wait(browser, lambda wanted=wanted: answer(browser)[:1] == [wanted])


@pytest.mark.browser
def test_a_budget_changes_what_is_opened(browser):
    plain = answer(browser)
    for name in ("25% of the work", "Full model", "Plain call"):
        [choice] = [label for label in find(browser, "label:has(input[type=radio])") if label.text == name]
        before = answer(browser)
        choice.click()
        wait(browser, lambda before=before: answer(browser) not in (before, []))
        assert len(answer(browser)) == (3 if name == "Full model" else 5)
    assert answer(browser) == plain


@pytest.mark.browser
def test_a_text_is_picked(browser):
    before = answer(browser)
    find(browser, "button.gallery-item")[1].click()
    wait(browser, lambda: answer(browser) not in (before, []))
    assert find(browser, "textarea")[0].get_attribute("value") == page.EXAMPLES[1]


@pytest.mark.browser
def test_everything_is_reached_by_tab_in_order_and_has_a_name(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def reach(count):
        reached = []
        for _ in range(count):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            reached.append(browser.switch_to.active_element.accessible_name)
        return reached

    # The box of the text holds its button.
    assert reach(7) == ["Text", "File", "Accuracy", "Text Classify", "Classify", *page.EXAMPLES]
    assert reach(1) == ["Plain call"]
    button(browser, "File").send_keys(Keys.ENTER)
    assert reach(2) == ["Accuracy", "Classify a file"]


@pytest.mark.browser
def test_a_file_is_classified_and_saved(browser, tmp_path, texts):
    given = [*texts["text"][:19], "<b>w1</b>"]
    pd.DataFrame({"text": given}).to_csv(tmp_path / "texts.csv")
    open_file(browser, tmp_path / "texts.csv")
    wait(browser, lambda: len(cells(browser)) >= 10)
    assert "20 texts" in browser.find_element("tag name", "body").text
    find(browser, "a[download]")[0].click()
    saved = browser.downloads / "predictions.csv"
    wait(browser, lambda: saved.exists() and saved.stat().st_size)
    rows = list(csv.reader(saved.open(newline="")))
    assert [row[0] for row in rows[1:]] == given
    assert cells(browser)[0] == rows[1]


@pytest.mark.browser
def test_what_others_wrote_is_shown_as_text(browser, tmp_path):
    wrote = "<b>w1</b> <img src=x onerror=alert()>"
    (tmp_path / "texts.txt").write_text(wrote)
    open_file(browser, tmp_path / "texts.txt")
    wait(browser, lambda: cells(browser))
    assert cells(browser)[0][0] == wrote
    assert set(cells(browser)[0][1:-2]) <= set(NAMES.values())


@pytest.mark.browser
def test_a_bad_file_gives_a_message_and_the_next_one_works(browser, tmp_path):
    (tmp_path / "bad.csv").write_text("<b>review</b>\ngood\n")
    (tmp_path / "good.txt").write_text("w1 w2\nw3\n")
    open_file(browser, tmp_path / "bad.csv")
    message = "bad.csv must have a column 'text', got the columns ['<b>review</b>']"
    wait(browser, lambda: [element for element in find(browser, "[role=status]") if message in element.text])
    assert not find(browser, "a[download]")
    open_file(browser, tmp_path / "good.txt")
    wait(browser, lambda: len(cells(browser)) == 2)


@pytest.mark.browser
def test_a_file_too_large_is_refused_with_a_message(browser, tmp_path):
    (tmp_path / "large.txt").write_text("w1\n" * 400_000)
    open_file(browser, tmp_path / "large.txt")
    wait(browser, lambda: "maximum allowed size" in browser.find_element("tag name", "body").text)


@pytest.mark.browser
def test_the_curve_is_there(browser):
    button(browser, "Accuracy").click()
    wait(browser, lambda: find(browser, "img[alt^=Accuracy]"))
    assert find(browser, "img[alt^=Accuracy]")[0].get_property("naturalWidth") > 100


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, scheme):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    try:
        browser.refresh()
        wait(browser, lambda: answer(browser))
        for name in ("File", "Accuracy", "Text"):
            button(browser, name).click()
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        for picture in find(browser, "pre[role=img]"):
            assert picture.rect["x"] + picture.rect["width"] <= 390
        assert bool(find(browser, ".dark")) == (scheme == "dark")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
def test_nothing_typed_or_uploaded_stays_on_disk(browser, server, tmp_path):
    _, folder = server
    secret = "verysecretword"
    before = answer(browser)
    [box] = find(browser, "textarea")
    box.clear()
    box.send_keys(f"w1 {secret}")
    button(browser, "Classify").click()
    wait(browser, lambda: answer(browser) not in (before, []))
    (tmp_path / f"{secret}.csv").write_text(f"text\n{secret}\n")
    open_file(browser, tmp_path / f"{secret}.csv")
    wait(browser, lambda: cells(browser))
    written = [path for path in folder.rglob("*") if path.is_file() and "hf_budgetformer" not in path.parts]
    assert folder / "log" in written
    assert [path for path in written if secret in path.name or secret.encode() in path.read_bytes()] == []
