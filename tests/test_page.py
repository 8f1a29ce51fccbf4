"""The demo page: what its functions say against the model, and the page itself in a real browser."""

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

import pytest
import torch
import yaml
from datasets import Dataset

from conftest import budgetformer, stock_folder
from hf_budgetformer.budgets import FULL_LOOK
from hf_budgetformer.tools import page
from hf_budgetformer.tools.evaluation import BudgetResult, Evaluation
from hf_budgetformer.tools.narrowing import cut
from hf_budgetformer.tools.results import save_result, write_json
from hf_budgetformer.tools.tuning import calibrate_margins


ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
NAMES = {0: "first", 1: "<i>second</i>", 2: "third"}


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


def looks_of(shown):
    """What the page says of each look: its name, whether it was asked, and the rest."""
    found = re.findall(r'<section class="bf-look( idle)?"><h3>(.*?)</h3><p class="bf-note">(.*?)</p>', shown)
    return [(name, not idle, told) for idle, name, told in found]


def ask(model, tokenizer, *text, **options):
    with torch.no_grad():
        return model(**tokenizer(*text, truncation=True, return_tensors="pt"), **options)


@pytest.mark.parametrize("budget", [None, 0.125, 0.6, 1.0])
def test_a_text_is_shown_with_what_the_model_says_and_spends(model, tokenizer, texts, budget):
    asked = {} if budget is None else {"budget": budget}
    first, counted = page.plan_call(model, budget), []
    for text in texts["text"][:12]:
        out = ask(model, tokenizer, text, **asked)
        [probability], [label] = (x.tolist() for x in out.logits.softmax(-1).max(-1))
        shown = page.show_text(model, tokenizer, text, budget)
        assert shown.startswith(f'<p class="bf-label"><b>{escaped(label)}</b> {probability:.0%}</p>')
        assert f"<dt>Budget spent</dt><dd>{out.budget.item():.0%}</dd>" in shown
        assert re.search(r"<dt>Time</dt><dd>\d+%</dd><dd>[\d.]+ of [\d.]+ ms</dd>", shown)
        full = ask(model, tokenizer, text, budget=1.0).logits.argmax().item()
        same = "same label" if full == label else "another label"
        assert f"<dt>Full model</dt><dd>{same}</dd><dd><b>{escaped(full)}</b>" in shown
        looks = looks_of(shown)
        assert [name for name, *_ in looks][-1] == "Full model"
        spent = sum(look.cost for look, (_, taken, _) in zip([*first.looks, FULL_LOOK], looks, strict=False) if taken)
        assert spent == pytest.approx(out.budget.item())
        counted.append(sum(taken for _, taken, _ in looks))
    assert set(counted) == ({1, 2} if len(first.looks) == 2 else {1})


def test_each_look_is_shown_with_what_it_said_its_margin_and_its_time(model, tokenizer, texts):
    plan, doubted = page.plan_call(model, None), set()
    for text in texts["text"][:12]:
        (name, asked, told), (_, full_asked, full_told) = looks_of(page.show_text(model, tokenizer, text, None))
        shares = ask(model, tokenizer, text, budget=0.125).logits.softmax(-1)[0].sort(descending=True)
        margin = (shares.values[0] - shares.values[1]).item()
        doubt = margin < plan.thresholds[0]
        assert (name, asked, full_asked) == (f"Look 1, {plan.looks[0].cost:.0%} of the work", True, doubt)
        assert re.match(
            rf"<b>{re.escape(escaped(shares.indices[0].item()))}</b> {shares.values[0]:.0%}, [\d.]+ ms", told
        )
        assert f"Margin {margin:.2f}. {plan.thresholds[0]:.2f} was asked for" in told
        assert told.endswith("in doubt, look on." if doubt else "this is the answer.")
        assert full_told.endswith("This is the answer." if doubt else "Not asked: no need.")
        doubted.add(doubt)
    assert doubted == {True, False}


def test_before_training_the_full_model_answers_alone(tokenizer):
    untrained = budgetformer("bert", trained=False)
    [(name, asked, told)] = looks_of(page.show_text(untrained, tokenizer, "w1 w2", None))
    assert (name, asked) == ("Full model", True)
    assert told.endswith("This is the answer.")


def test_the_picture_also_says_in_words_what_is_open(model):
    look = model.narrow.order.look(0.25)
    drawn = page.draw_look(model, look)
    blocks = [round(neurons / 6) for neurons in look.counts.neurons]  # of 24 neurons in 4 blocks
    told = "; ".join(f"layer {n + 1}: {look.counts.heads[n]} and {blocks[n]}" for n in range(3))
    assert f'role="img" aria-label="Open of 4 heads and 4 feed-forward blocks, {told}"' in drawn
    opened = sum(look.counts.heads) + sum(blocks)
    assert (drawn.count('class="open"'), drawn.count('class="closed"')) == (opened, 24 - opened)
    assert 0 < opened < 24
    assert page.draw_look(model, FULL_LOOK).count('class="open"') == 24


def test_time_is_that_of_every_way_which_go_first_in_turn(model, tokenizer, monkeypatch):
    batch, calls, forward = tokenizer("w1", return_tensors="pt"), [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: (calls.append(given["budget"]), forward(**given))[1])
    clock = iter([0.0, 1.0, 1.0, 4.0, 4.0, 9.0, 9.0, 10.0])  # 1 and 3 seconds, then 5 and 1 the other way round
    monkeypatch.setattr(page.time, "perf_counter", lambda: next(clock))
    with torch.no_grad():
        assert page.time_in_turn(model, batch, [{"budget": 0.125}, {"budget": 1.0}], 2) == [1.0, 4.0]
    assert calls == [0.125, 1.0, 1.0, 0.125]


def test_an_empty_text_is_answered_as_the_model_answers_it(model, tokenizer):
    label = ask(model, tokenizer, "").logits.argmax().item()
    for text in ("", " \n"):
        assert f"<b>{escaped(label)}</b>" in page.show_text(model, tokenizer, text, None)


def test_a_text_that_is_far_too_long_is_refused_and_a_long_one_cut(model, tokenizer):
    assert "Only its first 32 tokens were read." in page.show_text(model, tokenizer, "w1 " * 31, 0.5)
    assert "Only its first" not in page.show_text(model, tokenizer, "w1 " * 30, 0.5)
    with pytest.raises(ValueError, match=r"A text must have at most 5,000 characters, got 5,001"):
        page.show_text(model, tokenizer, "w" * 5001, None)


def test_a_budget_that_the_model_cannot_spend_is_refused(tokenizer):
    with pytest.raises(ValueError, match="calibrate_margins"):
        page.show_text(budgetformer("bert"), tokenizer, "w1", 0.5)


@pytest.mark.parametrize("columns", [("text",), ("text", "text_pair")])
def test_a_files_table_is_what_the_model_says_of_each_row_alone(model, tokenizer, texts, monkeypatch, columns):
    monkeypatch.setattr(page, "BATCH", 5)
    table, told = {name: [f"{text} w{place}" for text in texts["text"][:12]] for place, name in enumerate(columns)}, []
    shown, content = page.show_texts(model, tokenizer, table, None, told.append)
    rows = list(csv.DictReader(io.StringIO(content)))
    assert list(rows[0]) == [*columns, "label", "score", "budget"]
    spent, same = [], 0
    for place, row in enumerate(rows):
        given = [table[name][place] for name in columns]
        out, full = (ask(model, tokenizer, *given, **way) for way in ({}, {"budget": 1.0}))
        assert [row[name] for name in columns] == given
        assert row["label"] == NAMES[out.logits.argmax().item()]
        assert float(row["score"]) == pytest.approx(out.logits.softmax(-1).max().item(), abs=1e-3)
        assert float(row["budget"]) == pytest.approx(out.budget.item(), abs=1e-3)
        spent.append(out.budget.item())
        same += int(out.logits.argmax() == full.logits.argmax())
    went_on = sum(share > 1.0 for share in spent)
    assert went_on
    assert f"<dt>Went on</dt><dd>{went_on / 12:.0%}</dd><dd>{went_on} of 12 texts" in shown
    assert f"<dt>Budget spent</dt><dd>{sum(spent) / 12:.0%}</dd>" in shown
    assert f"<dt>Same label</dt><dd>{same / 12:.0%}</dd>" in shown
    assert re.search(r"<dt>Time</dt><dd>[\d.]+ s</dd><dd>full model [\d.]+ s</dd>", shown)
    assert told == pytest.approx([5 / 12, 10 / 12, 1.0])


def test_what_others_wrote_is_shown_as_text(model, tokenizer):
    shown, content = page.show_texts(model, tokenizer, {"text": ['<img src="x" onerror="alert()">, w1\nw2']}, None, id)
    assert "<td>&lt;img src=&quot;x&quot; onerror=&quot;alert()&quot;&gt;, w1\nw2</td>" in shown
    assert next(csv.DictReader(io.StringIO(content, newline="")))["text"] == '<img src="x" onerror="alert()">, w1\nw2'


def test_files_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('\ufefflabel,text\n1,"one, ""two"""\n0,drei\n', encoding="utf-8")
    assert page.read_file(tmp_path / "a.csv") == {"text": ['one, "two"', "drei"]}
    (tmp_path / "b.csv").write_text("text_pair,text\nb,a\n")
    assert page.read_file(tmp_path / "b.csv") == {"text": ["a"], "text_pair": ["b"]}
    (tmp_path / "c.txt").write_text("one, two\r\nüber\n", encoding="utf-8")
    assert page.read_file(tmp_path / "c.txt") == {"text": ["one, two", "über"]}


def test_a_parquet_file_is_read(tmp_path):
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "a.parquet")
    assert page.read_file(tmp_path / "a.parquet") == {"text": ["a", "b"]}


def test_the_page_starts_with_rows_of_the_users_data(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,0\nw1,0\nw2,1\nw1,0\nw3,1\nw4,1\nw5,1\n")
    (tmp_path / "other.csv").write_text("text\nw9\n")
    write_json(tmp_path / "budgetformer" / "training.json", {"dataset": str(tmp_path / "rows.csv")})
    assert page.starting_texts(str(tmp_path)) == ["w1", "w2", "w3", "w4"]
    assert page.starting_texts(str(tmp_path), str(tmp_path / "other.csv")) == ["w9"]
    assert page.starting_texts("me/model") == list(page.EXAMPLES)
    for dataset in (None, "me/data", str(tmp_path / "gone.csv")):
        write_json(tmp_path / "budgetformer" / "training.json", {"dataset": dataset})
        assert page.starting_texts(str(tmp_path)) == list(page.EXAMPLES)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        page.starting_texts(str(tmp_path), str(tmp_path / "gone.csv"))


def test_a_number_field_that_was_emptied_is_told_and_no_crash(model, tokenizer):
    pytest.importorskip("gradio")
    blocks = page.build_page(model, tokenizer, "name")
    answer = next(function.fn for function in blocks.fns.values() if function.name == "answer")
    assert "A budget must be a number" in answer("w1", False, None)
    assert "bf-label" in answer("w1", True, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"review,label\ngood,1\n",
            r"a\.csv must have a column 'text', got the columns \['review', 'label'\]",
        ),
        ("a.csv", b"", r"a\.csv must hold at least one row that can be read, got none"),
        ("a.csv", b"text\ngood\nb\xe4d\n", r"a\.csv: text 2 is not UTF-8 in 'text'"),
        ("a.csv", b'text\n"open\n', r"a\.csv: text 1 is not csv"),
        ("a.csv", b"text\nw\nw,w\n", r"a\.csv: text 2 has more fields than the header"),
        ("a.txt", b"w\n" * 1001, r"a\.txt: text 1,001 is too much, .*: at most 1,000 texts"),
        ("a.txt", b"w\n" + b"w" * 5001, r"a\.txt: text 2 is too much, with 5,001 characters: .* 5,000 characters"),
        (
            "a.txt",
            b"w" * 1_000_001,
            r"a\.txt must be a \.csv, \.parquet or \.txt file of at most 1,000,000 bytes, got 1,000,001",
        ),
        ("a.exe", b"w", r"a\.exe must be a \.csv, \.parquet or \.txt file"),
        ("a.parquet", b"PAR1", r"a\.parquet is no parquet file"),
    ],
)
def test_a_bad_file_is_named_without_its_place_on_the_server(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{message}") as caught:
        page.read_file(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)
    assert "--column" not in str(caught.value)


def test_the_curve_is_drawn_with_its_table_and_data_or_the_page_says_how_to_make_one(checkpoint, tmp_path):
    shown = page.show_curves(str(checkpoint))
    assert '<img class="bf-curve" src="data:image/png;base64,iVBOR' in shown
    assert re.search(r"plain +85\.0% ", shown)
    assert "On 60 rows of me/teapots, test, by a model whose plain call looks at" in shown
    assert "OUT OF DATE" not in shown
    for nothing in (str(tmp_path), "me/not-in-the-cache"):
        assert f"<code>budgetformer evaluate {nothing} DATA</code>" in page.show_curves(nothing)


def test_a_curve_of_other_weights_is_marked(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "changed")
    budgetformer("bert").save_pretrained(tmp_path / "changed")
    assert "OUT OF DATE" in page.show_curves(str(tmp_path / "changed"))


def test_only_a_classifier_that_looks_twice_is_taken(checkpoint, tokenizer, tmp_path, monkeypatch):
    loaded, _ = page.load_checkpoint(str(checkpoint))
    assert not loaded.training
    others = {
        "cut": (cut(budgetformer("bert"), 0.25), "one that was cut"),
        "routed": (budgetformer("bert", router="layer"), "router='layer'"),
        "regression": (budgetformer("bert", num_labels=1), "num_labels=1"),
    }
    for name, (other, message) in others.items():
        other.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            page.load_checkpoint(str(tmp_path / name))
    stock_folder("bert", tmp_path / "stock")
    for name in ("stock", "none"):
        with pytest.raises(ValueError, match=name):
            page.load_checkpoint(str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no demo-output: run `make demo`.*budgetformer page CHECKPOINT"):
        page.main()


def texts_of(blocks):
    return " ".join(block.value for block in blocks.blocks.values() if isinstance(getattr(block, "value", None), str))


def test_the_promise_is_told_in_words_as_long_as_it_is_kept(model, tokenizer, monkeypatch):
    pytest.importorskip("gradio")
    assert "Its answers" not in texts_of(page.build_page(model, tokenizer, "name"))
    promise = {"risk": "tolerance", "level": 0.005, "confidence": 0.95, "rows": 5000, "bound": 0.004, "lost": 0.001}
    promise |= {"looks": model.config.looks, "thresholds": model.config.confidence, "doubted": 9}
    monkeypatch.setattr(model.config, "promise", promise)
    told = texts_of(page.build_page(model, tokenizer, "name"))
    assert "Its answers lose at most 0.5 points of accuracy on the full model's for texts like the 5,000" in told
    monkeypatch.setattr(model.config, "looks", [0.2, 1.0])
    assert "Its answers" not in texts_of(page.build_page(model, tokenizer, "name"))


def test_without_gradio_the_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "hf-budgetformer\[page\]"'):
        page.build_page(model, tokenizer, "name")


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
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, poll_frequency=0.1).until(lambda _: condition())


def pictures(browser):
    return [picture.get_attribute("aria-label") for picture in find(browser, ".bf-units")]


def button(browser, text):
    [found] = [element for element in find(browser, "button:not([tabindex='-1'])") if element.text.strip() == text]
    return found


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
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found[0], folder
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
    wait(chromium, lambda: pictures(chromium))
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
    sent = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def open_file(browser, path):
    if not find(browser, "[data-testid=file-upload], input[type=file]"):
        button(browser, "File").click()
    browser.find_element("css selector", "input[type=file]").send_keys(str(path))


def type_text(browser, text):
    [box] = find(browser, "textarea")
    box.clear()
    box.send_keys(text)
    button(browser, "Classify").click()


def spent(browser):
    return find(browser, ".bf-figures dd")[0].text


@pytest.mark.browser
def test_the_page_classifies_what_is_typed(browser, model, tokenizer):
    for text in ("w1 w2 w3", "w21 w22 w23 w24 w25"):
        type_text(browser, text)
        probability, number = ask(model, tokenizer, text).logits.softmax(-1)[0].max(-1)
        wanted = f"{NAMES[number.item()]} {probability:.0%}"
        wait(browser, lambda wanted=wanted: [label.text for label in find(browser, ".bf-label")] == [wanted])


@pytest.mark.browser
def test_the_slider_changes_what_is_spent_and_the_check_box_brings_the_plain_call_back(browser, model):
    from selenium.webdriver.common.keys import Keys

    plain, pictured = spent(browser), pictures(browser)
    [slider], [box] = find(browser, "input[type=range]"), find(browser, "input[type=checkbox]")
    slider.send_keys(Keys.HOME)
    least = model.narrow.order.look(float(slider.get_attribute("min")) / 100)
    wait(browser, lambda: spent(browser) == f"{least.cost:.0%}")
    assert pictures(browser) != pictured
    assert not box.is_selected()
    slider.send_keys(Keys.END)
    wait(browser, lambda: spent(browser) == "100%")
    assert len(pictures(browser)) == 1
    box.send_keys(Keys.SPACE)
    wait(browser, lambda: (spent(browser), pictures(browser)) == (plain, pictured))


@pytest.mark.browser
def test_a_text_is_picked_and_what_is_typed_stays_when_the_list_is_only_passed(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def typed():
        return box.get_attribute("value")

    [pick], [box] = find(browser, "input[role=combobox]"), find(browser, "textarea")
    pick.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    wait(browser, lambda: typed() == page.EXAMPLES[1])
    box.send_keys(" w1")
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).send_keys(Keys.TAB).perform()
    box.send_keys(" w2", Keys.SHIFT, Keys.ENTER)
    before = find(browser, ".bf-figures")[0].text
    wait(browser, lambda: find(browser, ".bf-figures")[0].text != before)
    assert typed() == f"{page.EXAMPLES[1]} w1 w2"


@pytest.mark.browser
def test_everything_is_reached_by_tab_in_order_and_has_a_name(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(9):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.switch_to.active_element.accessible_name)
    wanted = ["Plain call", "number .* budget", "range .* budget", "Text", "File", "Accuracy", "Pick a text", "Text"]
    wanted += ["Classify"]
    assert all(map(re.match, wanted, reached)), "; ".join(reached)


@pytest.mark.browser
def test_a_file_is_classified_run_again_and_saved(browser, model, tmp_path, texts):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(texts["text"][:20]) + "\n")
    open_file(browser, tmp_path / "texts.csv")
    wait(browser, lambda: find(browser, ".bf-scroll tbody tr"))
    assert len(find(browser, ".bf-scroll tbody tr")) == 20
    assert "of 20 texts" in find(browser, ".bf-figures")[0].text
    saved = browser.downloads / "predictions.csv"

    def save():
        saved.unlink(missing_ok=True)
        button(browser, "Download predictions.csv").click()
        wait(browser, lambda: saved.exists() and saved.stat().st_size)
        return list(csv.DictReader(saved.open(newline="")))

    rows = save()
    assert [row["text"] for row in rows] == list(texts["text"][:20])
    cells = [cell.text for cell in find(browser, ".bf-scroll tbody td")]
    assert cells == [value for row in rows for value in row.values()]
    [slider] = find(browser, "input[type=range]")
    slider.send_keys(Keys.HOME)
    wait(browser, lambda: not find(browser, "input[type=checkbox]")[0].is_selected())
    button(browser, "Run again at the budget above").click()
    wait(browser, lambda: find(browser, ".bf-figures")[0].text.startswith("Went on\n0%"))
    least = model.narrow.order.look(float(slider.get_attribute("min")) / 100)
    assert {row["budget"] for row in save()} == {f"{least.cost:.3f}"}


@pytest.mark.browser
def test_a_bad_file_gives_a_message_and_the_next_one_works(browser, tmp_path):
    (tmp_path / "bad.csv").write_text("review\ngood\n")
    (tmp_path / "good.txt").write_text("w1 w2\nw3\n")
    open_file(browser, tmp_path / "bad.csv")
    wait(browser, lambda: find(browser, "[role=alert]"))
    assert find(browser, "[role=alert]")[0].text == "bad.csv must have a column 'text', got the columns ['review']"
    assert "Download predictions.csv" not in [element.text for element in find(browser, "button")]
    open_file(browser, tmp_path / "good.txt")
    wait(browser, lambda: len(find(browser, ".bf-scroll tbody tr")) == 2)
    assert not find(browser, "[role=alert]")


@pytest.mark.browser
def test_a_file_too_large_is_refused_with_a_message(browser, tmp_path):
    (tmp_path / "large.txt").write_text("w1\n" * 400_000)
    open_file(browser, tmp_path / "large.txt")
    wait(browser, lambda: "maximum allowed size" in browser.find_element("tag name", "body").text)


@pytest.mark.browser
def test_the_curve_is_there(browser):
    button(browser, "Accuracy").click()
    wait(browser, lambda: find(browser, "img.bf-curve"))
    assert find(browser, "img.bf-curve")[0].get_property("naturalWidth") > 100


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, scheme):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    try:
        browser.refresh()
        wait(browser, lambda: pictures(browser))
        for name in ("File", "Accuracy", "Text"):
            button(browser, name).click()
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert all(picture.size["width"] > 200 for picture in find(browser, ".bf-units"))
        assert find(browser, "label:has(input[type=checkbox])")[0].size["height"] < 60
        assert bool(find(browser, ".dark")) == (scheme == "dark")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
def test_nothing_typed_or_uploaded_stays_on_disk(browser, server, tmp_path):
    _, folder = server
    secret = "verysecretword"
    before = find(browser, ".bf-figures")[0].text
    type_text(browser, f"w1 {secret}")
    wait(browser, lambda: find(browser, ".bf-figures")[0].text != before)
    (tmp_path / f"{secret}.csv").write_text(f"text\n{secret}\n")
    open_file(browser, tmp_path / f"{secret}.csv")
    wait(browser, lambda: find(browser, ".bf-scroll tbody tr"))
    written = [path for path in folder.rglob("*") if path.is_file() and "hf_budgetformer" not in path.parts]
    assert folder / "log" in written
    assert [path for path in written if secret in path.name or secret.encode() in path.read_bytes()] == []
