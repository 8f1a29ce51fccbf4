"""Exported looks answer as the model does, in a process that knows no torch; whatever is wrong with them is named."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, set_seed

from conftest import LONGEST, VOCABULARY, budgetformer, equal_shares, stock_config
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification
from hf_budgetformer.budgets import confidence
from hf_budgetformer.runtime import (
    AnswerQueue,
    ExportError,
    OnnxClassifier,
    OnnxGraph,
    OpenVINOClassifier,
    Seen,
    read_looks,
)
from hf_budgetformer.tools.batching import tokenized
from hf_budgetformer.tools.export import TracedModel, convert_onnx
from hf_budgetformer.tools.looking import answer_rows
from hf_budgetformer.tools.looks_export import export_looks
from hf_budgetformer.tools.narrowing import cut


pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SOURCES = Path(__file__).resolve().parents[1] / "src"
NAMES = ["low", "middle", "high"]
LONG = " ".join(f"w{number % 35}" for number in range(90))


def small(backbone_type, **fields):
    """One layer, for exporting takes seconds; its narrow encoder counts as trained."""
    set_seed(0)  # module fixtures come before the seed of a test
    if backbone_type == "distilbert":
        tiny = {"dim": 16, "n_layers": 1, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": LONGEST}
        stock = DistilBertConfig(vocab_size=VOCABULARY, initializer_range=0.3, num_labels=3, **tiny)
    else:
        stock = stock_config(backbone_type, num_hidden_layers=1)
    fields = {"narrow_budget": 0.5, "opening_order": equal_shares(layers=1), **fields}
    model = BudgetFormerForSequenceClassification(BudgetFormerConfig.from_backbone_config(stock, **fields)).eval()
    model.narrow.steps += 1
    model.config.id2label = dict(enumerate(NAMES))
    return model


def ask(model, tokenizer, texts, pairs=None, batch_size=7, budget=None):
    """Logits and what was spent, by torch."""
    columns = {"text": texts} if pairs is None else {"text": texts, "text_pair": pairs}
    logits, spent = torch.zeros(len(texts), model.num_labels), torch.zeros(len(texts))
    for answer in answer_rows(model, tokenized(columns, tokenizer), tokenizer, batch_size, budget):
        logits[answer.places], spent[answer.places] = answer.logits, answer.spent
    return logits, spent


def spread_answers(model, tokenizer, texts):
    """Centres and widens what both heads say, for models of random weights give all texts one label."""
    for head, budget in ((model.classifier, 1.0), (model.narrow.head, 0.25)):
        weight, bias = [*head.parameters()][-2:]
        logits, _ = ask(model, tokenizer, texts, budget=budget)
        scale = 2.0 / logits.std(0).mean()
        weight.data *= scale
        bias.data = scale * (bias.data - logits.mean(0))


def look_twice(model, tokenizer, texts):
    """Makes a plain call doubt half of the texts, with a threshold far from any margin."""
    logits, _ = ask(model, tokenizer, texts, budget=0.25)
    margins = confidence(logits, model.config.problem_type).sort().values
    middle = len(margins) // 2
    model.config.looks, model.config.confidence = [0.25, 1.0], [margins[middle : middle + 2].mean().item()]


@pytest.fixture(scope="module")
def some_texts(texts):
    return [*texts["text"], "", LONG]


@pytest.fixture(scope="module")
def export_of(tokenizer, some_texts, tmp_path_factory):
    """From a backbone's type to a model and its exported folder, each made once: tracing takes seconds."""
    made = {}

    def make(backbone_type):
        if backbone_type not in made:
            model = small(backbone_type)
            spread_answers(model, tokenizer, some_texts)
            look_twice(model, tokenizer, some_texts)
            folder = tmp_path_factory.mktemp(backbone_type) / "folder"
            export_looks(model, tokenizer, folder)
            made[backbone_type] = (model, folder)
        return made[backbone_type]

    return make


@pytest.fixture(params=["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("roberta", "distilbert"))])
def exported(request, export_of):
    """A model of each kind, and its exported folder."""
    return export_of(request.param)


@pytest.fixture
def folder_of_bert(export_of):
    return export_of("bert")


@pytest.fixture
def traced_before(folder_of_bert, monkeypatch):
    """Graphs of `small("bert")` need not be traced again."""

    def write(self, path):
        shutil.copyfile(folder_of_bert[1] / "onnx" / path.name, path)
        self.check(OnnxGraph(path))

    monkeypatch.setattr(TracedModel, "write", write)


def changed(folder, target, **fields):
    """A copy of an exported folder whose `looks.json` has other fields."""
    shutil.copytree(folder, target)
    path = target / "onnx" / "looks.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return target


def check_answers(answers, logits, spent):
    np.testing.assert_allclose(answers.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(answers.spent, spent)


@pytest.mark.parametrize("paired", [False, True])
def test_exported_looks_answer_as_the_model_does(exported, tokenizer, some_texts, paired):
    model, folder = exported
    pairs = some_texts[::-1] if paired else None
    logits, spent = ask(model, tokenizer, some_texts, pairs)
    assert len(set(spent.tolist())) == 2
    for batch_size in (7, 64):
        answers = OnnxClassifier(folder)(some_texts, pairs, batch_size)
        check_answers(answers, logits, spent)
        assert answers.labels.tolist() == [NAMES[label] for label in logits.argmax(-1)]
        np.testing.assert_allclose(answers.scores, logits.softmax(-1).amax(-1), atol=1e-4)


def test_the_folder_holds_what_others_look_for(exported, tokenizer):
    model, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model.config.backbone_model_type
    assert config["id2label"] == dict(zip("012", NAMES, strict=True))
    assert {path.name for path in (folder / "onnx").iterdir()} == {"look_1.onnx", "model.onnx", "looks.json"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_several_labels_and_regressions(folder_of_bert, tokenizer, some_texts, tmp_path):
    model, folder = folder_of_bert
    try:
        model.config.problem_type = "multi_label_classification"
        look_twice(model, tokenizer, some_texts)
        logits, spent = ask(model, tokenizer, some_texts)
        assert len(set(spent.tolist())) == 2
        several = {"problem_type": model.config.problem_type, "thresholds": model.config.confidence}
        answers = OnnxClassifier(changed(folder, tmp_path / "several", **several))(some_texts)
        check_answers(answers, logits, spent)
        assert answers.labels.tolist() == (logits > 0).tolist()
        np.testing.assert_allclose(answers.scores, logits.sigmoid(), atol=1e-5)
    finally:
        model.config.problem_type = None
        look_twice(model, tokenizer, some_texts)
    alone = {"problem_type": "regression", "graphs": ["model.onnx"], "costs": [1.0], "thresholds": []}
    answers = OnnxClassifier(changed(folder, tmp_path / "alone", **alone))(some_texts)
    check_answers(answers, ask(model, tokenizer, some_texts, budget=1.0)[0], np.ones(len(some_texts)))
    assert answers.labels is None
    np.testing.assert_array_equal(answers.scores, answers.logits)


def test_max_length_is_that_of_the_export(folder_of_bert, tokenizer, tmp_path):
    classifier = OnnxClassifier(changed(folder_of_bert[1], tmp_path / "cut", max_length=5))
    first, second = classifier(["w1 w2 w3 w4 w5", "w1 w2 w3"]).logits
    np.testing.assert_array_equal(first, second)


def test_wrong_questions_are_refused(folder_of_bert):
    classifier = OnnxClassifier(folder_of_bert[1])
    assert classifier([]).spent.shape == (0,)
    for texts in ("a text", [None], [b"bytes"]):
        with pytest.raises(ValueError, match="texts must be a list of strings"):
            classifier(texts)
    with pytest.raises(ValueError, match="text_pairs must be as many as texts, 2, got 1"):
        classifier(["w1", "w2"], ["w3"])
    for batch_size in (0, 2.0, None):
        with pytest.raises(ValueError, match=f"batch_size must be an integer >= 1, got {batch_size}"):
            classifier(["w1"], batch_size=batch_size)


# A process of its own

SERVE = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from hf_budgetformer.runtime import OnnxClassifier
answers = OnnxClassifier(sys.argv[1])(json.loads(sys.argv[2]))
import hf_budgetformer
refusals = []
for name in ("BudgetFormerConfig", "nothing"):
    try:
        getattr(hf_budgetformer, name)
    except (ImportError, AttributeError) as error:
        refusals.append(f"{type(error).__name__}: {error}")
found = {"logits": answers.logits.tolist(), "spent": answers.spent.tolist(), "refusals": refusals}
print(json.dumps({**found, "modules": sorted(sys.modules)}))
"""


def serve(python, environment, folder, texts):
    """What a process answers, in which nothing named torch or transformers can be imported."""
    ran = subprocess.run(
        [python, "-c", SERVE, str(folder), json.dumps(texts)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def check_served(report, folder_of_bert, tokenizer, texts):
    logits, spent = ask(folder_of_bert[0], tokenizer, texts)
    np.testing.assert_allclose(report["logits"], logits, rtol=1e-4, atol=1e-4)
    assert report["spent"] == spent.tolist()
    assert not {"torch", "transformers", "datasets"} & set(report["modules"])
    missing, unknown = report["refusals"]
    assert missing.startswith("ImportError: hf_budgetformer.BudgetFormerConfig needs torch and transformers: pip inst")
    assert unknown.startswith("AttributeError")


def test_serving_imports_neither_torch_nor_transformers(folder_of_bert, tokenizer, some_texts):
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    check_served(
        serve(sys.executable, environment, folder_of_bert[1], some_texts), folder_of_bert, tokenizer, some_texts
    )


@pytest.mark.slow
def test_an_environment_without_torch_serves(folder_of_bert, tokenizer, some_texts, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for name in ("numpy", "tokenizers", "onnxruntime"):
        installed = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in installed.files} - {".."}:
            (packages / top).symlink_to(installed.locate_file(top))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES)}
    assert not list(packages.glob("torch*"))
    check_served(serve(str(python), environment, folder_of_bert[1], some_texts), folder_of_bert, tokenizer, some_texts)


# Other forms of graphs, and thresholds of their own


def check_promise(looks, model, tokenizer, classifier, rows):
    """What was calibrated is the thresholds of these graphs: on the rows, the promise is kept."""
    assert looks.promise["rows"] >= 300
    assert looks.promise["looks"] == [0.25, 1.0]
    assert looks.promise["thresholds"] == looks.thresholds
    answers = classifier(rows)
    full, _ = ask(model, tokenizer, rows, budget=1.0)
    differing = answers.logits.argmax(-1) != full.argmax(-1).numpy()
    assert differing.mean() <= looks.promise["bound"] <= looks.promise["level"]
    doubted = (answers.spent > 1.0).mean()
    assert doubted == pytest.approx(looks.promise["doubted"] / looks.promise["rows"], abs=0.02)
    assert 0.0 < doubted < 1.0


def as_rows(texts, times=6):
    return texts.select(list(range(len(texts))) * times)


def modest(tokenizer, texts):
    """A model that promises little, for its narrow encoder was not trained."""
    model = small("bert")
    spread_answers(model, tokenizer, [*texts["text"], "", LONG])
    look_twice(model, tokenizer, list(texts["text"]))
    model.config.promise = {
        "risk": "disagreement", "level": 0.4, "confidence": 0.95, "rows": 1, "looks": model.config.looks,
        "thresholds": model.config.confidence, "bound": 0.4, "lost": 0.0, "doubted": 0,
    }  # fmt: skip
    return model


def test_int8_graphs_are_calibrated_anew(traced_before, tokenizer, texts, tmp_path):
    model, rows = modest(tokenizer, texts), as_rows(texts)
    result = export_looks(model, tokenizer, tmp_path / "served", dtype="int8", calibration=rows)
    looks = read_looks(tmp_path / "served" / "onnx" / "looks.json")
    assert looks == result.looks
    assert looks.graphs == ["look_1_quantized.onnx", "model_quantized.onnx"]
    assert (tmp_path / "served" / "onnx" / looks.graphs[0]).read_bytes().count(b"MatMulInteger") > 0
    assert 0.8 < min(looks.agreement) <= max(looks.agreement) <= 1.0
    assert looks.thresholds != model.config.confidence
    check_promise(looks, model, tokenizer, OnnxClassifier(tmp_path / "served"), list(rows["text"]))
    assert "labelled as in float32" in str(result)


def test_a_full_model_that_int8_changes_too_much_stays_in_float32(
    traced_before, tokenizer, texts, tmp_path, monkeypatch
):
    model, rows = modest(tokenizer, texts), as_rows(texts)

    def convert(source, target, dtype):
        """In place of the full model's int8 graph the narrow one's, which answers otherwise."""
        return convert_onnx(source.with_name("look_1.onnx"), target, dtype)

    monkeypatch.setattr("hf_budgetformer.tools.looks_export.convert_onnx", convert)
    model.config.promise["level"] = 0.25
    result = export_looks(model, tokenizer, tmp_path / "served", dtype="int8", calibration=rows)
    assert result.looks.graphs == ["look_1_quantized.onnx", "model.onnx"]
    assert result.looks.agreement[-1] == 1.0
    answers = OnnxClassifier(tmp_path / "served")(list(rows["text"]))
    full = ask(model, tokenizer, list(rows["text"]), budget=1.0)[0].argmax(-1).numpy()
    assert (answers.logits.argmax(-1) != full).mean() <= 0.25


def test_half_precision_and_openvino(traced_before, folder_of_bert, tokenizer, some_texts, tmp_path):
    pytest.importorskip("openvino")
    model, _ = folder_of_bert
    logits, spent = ask(model, tokenizer, some_texts)
    half = export_looks(model, tokenizer, tmp_path / "served", dtype="fp16")
    assert half.looks.graphs == ["look_1_fp16.onnx", "model_fp16.onnx"]
    assert half.looks.promise is None
    answers = OnnxClassifier(tmp_path / "served")(some_texts)
    same = answers.spent == spent.numpy()
    assert same.mean() > 0.9
    assert 1e-6 < np.abs(answers.logits - logits.numpy())[same].max() < 0.1
    environment = dict(os.environ)
    export_looks(model, tokenizer, tmp_path / "served", "openvino")  # beside the other
    assert dict(os.environ) == environment
    check_answers(OpenVINOClassifier(tmp_path / "served")(some_texts), logits, spent)
    assert OnnxClassifier(tmp_path / "served").looks == half.looks


@pytest.mark.slow
def test_int8_in_openvino_is_calibrated_anew(tokenizer, texts, tmp_path):
    for package in ("openvino", "nncf"):
        pytest.importorskip(package)
    model, rows = modest(tokenizer, texts), as_rows(texts)
    export_looks(model, tokenizer, tmp_path / "served", "openvino", "int8", rows)
    classifier = OpenVINOClassifier(tmp_path / "served")
    assert classifier.looks.graphs[0] == "look_1_quantized.xml"
    assert classifier.looks.promise["rows"] == len(rows) - 32
    check_promise(classifier.looks, model, tokenizer, classifier, list(rows["text"]))


# Files that are there already, and files that are not as they were


def test_a_graph_of_another_exporter_is_taken_if_it_answers_as_the_full_model(
    traced_before, folder_of_bert, tokenizer, tmp_path
):
    onnx = pytest.importorskip("onnx")
    model, folder = folder_of_bert
    theirs = tmp_path / "served" / "onnx" / "model.onnx"
    theirs.parent.mkdir(parents=True)
    graph = onnx.load(folder / "onnx" / "model.onnx")
    graph.doc_string = "theirs"
    onnx.save(graph, theirs)
    before = theirs.read_bytes()
    result = export_looks(model, tokenizer, tmp_path / "served")
    assert result.taken
    assert theirs.read_bytes() == before
    assert "it was there already" in str(result)
    assert OnnxClassifier(tmp_path / "served")(["w1"]).labels.shape == (1,)
    shutil.copyfile(folder / "onnx" / "look_1.onnx", theirs)
    with pytest.raises(ValueError, match=r"folder must not hold graphs of other exporters .*model.onnx"):
        export_looks(model, tokenizer, tmp_path / "served")


@pytest.mark.slow
def test_an_export_may_be_made_again(folder_of_bert, tokenizer, some_texts, tmp_path):
    shutil.copytree(folder_of_bert[1], tmp_path / "served")
    other = small("bert")
    other.classifier.bias.data += torch.tensor([0.0, 0.5, -0.5])
    other.config.looks = [1.0]
    assert not export_looks(other, tokenizer, tmp_path / "served").taken
    answers = OnnxClassifier(tmp_path / "served")(some_texts)
    check_answers(answers, *ask(other, tokenizer, some_texts))


@pytest.mark.parametrize("moved", range(5))
def test_an_export_that_is_cut_off_leaves_nothing_that_loads(
    traced_before, folder_of_bert, tokenizer, tmp_path, monkeypatch, moved
):
    model = folder_of_bert[0]
    target, replaced, replace = tmp_path / "served", [], os.replace

    def replace_some(source, goal):
        if target in Path(goal).parents and len(replaced) == moved:
            raise KeyboardInterrupt
        replaced.extend([goal] if target in Path(goal).parents else [])
        replace(source, goal)

    monkeypatch.setattr(os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        export_looks(model, tokenizer, target)
    with pytest.raises(ExportError, match=r"looks.json: looks cannot be read"):
        OnnxClassifier(target)
    monkeypatch.setattr(os, "replace", replace)
    export_looks(model, tokenizer, target)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    assert OnnxClassifier(target)(["w1"]).labels.shape == (1,)


def test_what_cannot_be_exported_is_named_before_anything_is_written(tokenizer, texts, tmp_path):
    model = small("bert")
    target = tmp_path / "served"
    wrong = [
        ({"runtime": "tvm"}, r"runtime must be one of \['onnx', 'openvino'\], got 'tvm'"),
        ({"dtype": "int4"}, r"dtype must be one of \['fp32', 'fp16', 'int8'\], got 'int4'"),
        ({"dtype": "int8"}, "calibration must be given with int8, .* got None"),
        ({"runtime": "openvino", "dtype": "int8"}, "calibration must be given with int8 in OpenVINO"),
        ({"max_length": 0}, "max_length must be None or an integer >= 1, got 0"),
        ({"calibration": texts.select([])}, "calibration must have rows, and a column 'text', got 0 rows"),
        (
            {"calibration": texts.rename_column("text", "words")},
            r"must have .* got 64 rows of \['words'",
        ),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            export_looks(model, tokenizer, target, **arguments)
    with pytest.raises(ValueError, match="model must have a narrow encoder beside a full one"):
        export_looks(cut(model, 0.25), tokenizer, target)
    with pytest.raises(ValueError, match="model must have a narrow encoder beside a full one"):
        export_looks(budgetformer("bert", router="layer"), tokenizer, target)
    with pytest.raises(ValueError, match="tokenizer must be a fast one with a pad token, got SimpleNamespace"):
        export_looks(model, SimpleNamespace(pad_token_id=0), target)
    model.config.looks, model.config.confidence = [0.25, 0.5, 1.0], [0.5, 0.5]
    with pytest.raises(ValueError, match=r"config.looks must be a first look and 1.0 .*, got \[0.25, 0.5, 1.0\]"):
        export_looks(model, tokenizer, target, calibration=texts)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="folder must be one, got the file"):
        export_looks(small("bert"), tokenizer, tmp_path / "file")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"folder must be a new one, .* with a config.json of type 'budgetformer'"):
        export_looks(model, tokenizer, tmp_path / "model")


def test_files_that_are_missing_or_changed_are_named(folder_of_bert, tmp_path):
    for name in ("onnx/looks.json", "onnx/model.onnx", "onnx/look_1.onnx", "tokenizer.json"):
        place = shutil.copytree(folder_of_bert[1], tmp_path / name.replace("/", "-"))
        content = (place / name).read_bytes()
        for bad in (b"", content[:-20], content[:50] + b"\x00" + content[51:]):
            (place / name).write_bytes(bad)
            with pytest.raises(ExportError, match=Path(name).name):
                OnnxClassifier(place)
        (place / name).unlink()
        with pytest.raises(ExportError, match=Path(name).name):
            OnnxClassifier(place)
        (place / name).mkdir()
        with pytest.raises(ExportError, match=Path(name).name):
            OnnxClassifier(place)
    with pytest.raises(ExportError, match=r"openvino/looks.json"):
        OpenVINOClassifier(folder_of_bert[1])


WRONG = [
    *[None, True, -1, 0, 2**40, 1.5, float("nan"), "x", "../../model.onnx", [], {}, [None], [0.5, 0.5, 0.5]],
    *[["onnx"], ["../looks.json", "model.onnx"], ["a.onnx", "b.onnx"], {"onnx/model.onnx": 1}, [[1]], "openvino"],
]


def try_out(place):
    """What an exported folder is refused for, if it is."""
    try:
        classifier = OnnxClassifier(place)
    except ExportError as error:
        message = str(error)
        return message if place.name in message else "no file is named"
    assert classifier(["w1 w2"]).spent.shape == (1,)
    return ""


def test_whatever_looks_json_holds_it_loads_or_names_itself(folder_of_bert, tmp_path):
    place = shutil.copytree(folder_of_bert[1], tmp_path / "served")
    path = place / "onnx" / "looks.json"
    sound = json.loads(path.read_text())
    harmless = {"agreement", "promise", "problem_type", "max_length", "pad_token_id", "truncation_side", "inputs"}
    refused = 0
    for name in sound:
        for wrong in [*WRONG, "missing"]:
            values = {**sound, name: wrong}
            if wrong == "missing":
                del values[name]
            path.write_text(json.dumps(values))
            message = try_out(place)
            refused += bool(message)
            assert message != "no file is named"
            assert len(message) < 1000
            assert message or name in harmless or values[name] == sound[name]
    assert refused > 0.8 * len(sound) * len(WRONG)
    for text in ("", "[" * 100_000, "null", "1" * 10_000, "{", '{"version": 1}', "[]"):
        path.write_text(text)
        with pytest.raises(ExportError, match=r"looks.json: "):
            OnnxClassifier(place)


def test_a_byte_of_looks_json_that_is_changed_is_refused_or_does_no_harm(folder_of_bert, tmp_path):
    place = shutil.copytree(folder_of_bert[1], tmp_path / "served")
    path = place / "onnx" / "looks.json"
    sound = path.read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for position in draw.integers(len(sound), size=150):
        path.write_bytes(sound[:position] + bytes([draw.integers(256)]) + sound[position + 1 :])
        refused += bool(try_out(place))
    assert refused > 75


def test_a_graph_that_answers_otherwise_than_looks_json_says_is_named(folder_of_bert, tmp_path):
    place = changed(folder_of_bert[1], tmp_path / "labels", labels=["a", "b"])
    with pytest.raises(ExportError, match=r"look_1.onnx: must give logits of \(1, 2\), got \(1, 3\)"):
        OnnxClassifier(place)
    classifier = OnnxClassifier(changed(folder_of_bert[1], tmp_path / "long", max_length=2**30))
    with pytest.raises(ExportError, match=r"look_1.onnx: the graph cannot answer a batch of \(1, 92\) tokens"):
        classifier([LONG])


# The queue


def test_a_queue_answers_as_a_call_does_from_many_threads(folder_of_bert, some_texts):
    classifier = OnnxClassifier(folder_of_bert[1], threads=1)
    expected = classifier(some_texts)
    futures = {}
    with AnswerQueue(classifier, batch_size=8, max_wait_ms=5.0) as queue:

        def submit(start):
            for place in range(start, len(some_texts), 4):
                futures[place] = queue.submit(some_texts[place])

        threads = [threading.Thread(target=submit, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pair = queue.submit("w1", "w2")
    for place in range(len(some_texts)):
        answer = futures[place].result(timeout=10)
        assert answer.label == expected.labels[place]
        assert answer.score == pytest.approx(expected.scores[place], abs=1e-5)
        assert answer.spent == expected.spent[place]
    assert pair.result(timeout=10).label == classifier(["w1"], ["w2"]).labels[0]
    with pytest.raises(RuntimeError, match="the queue is closed"):
        queue.submit("w1")


class Slow:
    """Records batches; texts are numbers, odd ones are doubted, and a look waits until it may go on."""

    def __init__(self):
        self.graphs, self.looks = [None, None], SimpleNamespace(costs=[0.25, 1.0])
        self.batches, self.may_go = [], threading.Semaphore(0)

    def encode(self, texts, text_pairs=None):
        return [int(text) for text in texts]

    def take_look(self, number, rows):
        self.may_go.acquire(timeout=10)
        if 13 in rows:
            raise ExportError("thirteen")
        self.batches.append((number, rows))
        return Seen(np.array(rows)[:, None], np.array([number == 0 and row % 2 == 1 for row in rows]))

    def make_answers(self, logits, spent):
        return SimpleNamespace(labels=None, scores=logits[:, 0])


def test_doubted_rows_of_several_batches_share_one_of_the_next_look():
    slow = Slow()
    queue = AnswerQueue(slow, batch_size=4, max_wait_ms=10_000.0)
    futures = [queue.submit("0")]  # its batch runs while the others come
    futures += [queue.submit(str(number)) for number in range(1, 15) if number != 13]
    for _ in range(10):
        slow.may_go.release()
    queue.close()
    assert [future.result().score for future in futures] == [*range(13), 14]
    seconds = [rows for number, rows in slow.batches if number == 1]
    assert sorted(row for rows in seconds for row in rows) == [1, 3, 5, 7, 9, 11]
    assert max(map(len, seconds)) == 4
    assert {future.result().spent for future in futures} == {0.25, 1.25}


def test_a_doubted_row_waits_no_longer_than_it_may():
    slow = Slow()
    with AnswerQueue(slow, batch_size=2, max_wait_ms=0.0) as queue:
        futures = [queue.submit(str(number)) for number in (1, 2, 4, 6, 8)]
        for _ in range(10):
            slow.may_go.release()
        assert futures[0].result(timeout=10).spent == 1.25
    place = slow.batches.index((1, [1]))
    assert place <= 2  # not behind all that had come by then
    assert len(slow.batches) > 3


def test_an_error_or_a_cancelled_question_ends_no_queue():
    slow = Slow()
    with AnswerQueue(slow, batch_size=1) as queue:
        first, bad, dropped, last = (queue.submit(number) for number in ("2", "13", "4", "6"))
        assert dropped.cancel()
        for _ in range(10):
            slow.may_go.release()
        assert first.result(timeout=10).score == 2
        with pytest.raises(ExportError, match="thirteen"):
            bad.result(timeout=10)
        assert last.result(timeout=10).score == 6
    assert 4 not in [row for _, rows in slow.batches for row in rows]
    for arguments, message in (((0,), "batch_size must be .* got 0"), ((1, -1.0), "max_wait_ms must be .* got -1.0")):
        with pytest.raises(ValueError, match=message):
            AnswerQueue(slow, *arguments)
