"""Training in two processes of `accelerate launch` is the training of one, sharded or not."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, set_seed

from conftest import LONGEST, batch_of, budgetformer, stock_folder
from hf_budgetformer import BudgetFormerForSequenceClassification
from hf_budgetformer.tools.narrowing import order_units


EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # scripts import what lies beside them
train_distributed = import_module("train_distributed")


@pytest.fixture(scope="module")
def folder(texts, tokenizer, tmp_path_factory):
    """A checkpoint, a teacher, and texts."""
    folder = tmp_path_factory.mktemp("accelerate")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        texts.to_parquet(folder / "data" / f"{split}.parquet")
    set_seed(0)
    tokenizer.save_pretrained(stock_folder("bert", folder / "stock"))
    return folder


def options(folder, **changes):
    given = {
        "model": folder / "stock", "dataset": folder / "data", "max_length": LONGEST, "max_steps": 6, "save_steps": 3,
        "logging_steps": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 8, "disable_tqdm": True, **changes,
    }  # fmt: skip
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def launch(config, arguments):
    """Two processes; what they printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / config]
    finished = subprocess.run(
        [*command, EXAMPLES / "train_distributed.py", *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=220, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def logged(output):
    """The loss of each step, unrounded, and the norm of its gradient."""
    history = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if "loss" in entry for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def ddp(folder):
    launch("ddp.yaml", options(folder, output_dir=folder / "ddp"))
    return folder / "ddp"


@pytest.fixture(scope="module")
def sharded(folder):
    launch("fsdp2.yaml", options(folder, output_dir=folder / "fsdp2"))
    return folder / "fsdp2"


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# Nothing of ours changes in place what a layer returns.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("budget", [0.25, 0.09])
def test_a_sharded_model_has_the_gradients_of_the_whole_one(budget, backbone_type, process_group):
    """Layer by layer, also those that a budget closes whole: the others would wait for their gradients."""
    gradients = []
    for sharding in (False, True):
        set_seed(0)
        model = budgetformer(backbone_type, trained=False).train()
        model.base_model.embeddings.requires_grad_(False)
        counts = model.narrow.order.look(budget).counts
        assert (0 in counts.heads) is (budget == 0.09)
        if sharding:
            for module in [*model.base_model.encoder.layer, *model.narrow.layer, model]:
                fully_shard(module)
        batch = batch_of([5, 9, 7], backbone_type)
        outputs = model(**batch, labels=torch.tensor([0, 1, 2]), budget=budget)
        outputs.loss.backward()
        by_name = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
        assert not [name for name, gradient in by_name.items() if gradient is None]
        gradients.append({name: x.full_tensor() if sharding else x for name, x in by_name.items()})
        assert model.narrow.steps.item() == 1
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_units_of_a_sharded_model_can_be_ordered(process_group):
    batches = [{**batch_of([5, 9, 7]), "labels": torch.tensor([0, 1, 2])}]
    weights = []
    for sharding in (False, True):
        set_seed(0)
        model = budgetformer("bert", trained=False, narrow_budget=1.0)
        if sharding:
            for module in [*model.base_model.encoder.layer, *model.narrow.layer, model]:
                fully_shard(module)
        order_units(model, batches)
        parameters = dict(model.narrow.named_parameters())
        weights.append({name: x.full_tensor() if sharding else x for name, x in parameters.items()})
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name


def test_a_sharded_model_is_saved_with_its_own_code(process_group, tmp_path):
    model = budgetformer("bert")
    model.save_pretrained(tmp_path / "whole")
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    fully_shard(model).save_pretrained(tmp_path / "sharded", state_dict=weights)
    whole, sharded = ({x.name: x.read_bytes() for x in (tmp_path / y).iterdir()} for y in ("whole", "sharded"))
    assert sharded.keys() == whole.keys()
    assert sharded["config.json"] == whole["config.json"]
    assert type(model).__name__ == "FSDPBudgetFormerForSequenceClassification"  # still what it was


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [{}, {"freeze_full": True}], ids=["together", "frozen"])
@pytest.mark.parametrize(("config", "kind"), [("ddp.yaml", "MULTI_CPU"), ("fsdp2.yaml", "FSDP")])
def test_two_processes_have_the_losses_of_one(config, kind, frozen, folder, tmp_path):
    """One process takes the shares of both in one batch: each term is a mean over the same rows."""
    arguments = options(folder, teacher=folder / "stock", **frozen)
    printed = launch(config, [*arguments, "--output_dir", tmp_path / "two"])
    assert f"2 processes, {kind} on cpu" in printed
    arguments += ["--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "16"]
    train_distributed.main(arguments)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    one, two = (load_file(tmp_path / count / "model.safetensors") for count in ("one", "two"))
    assert one["narrow.steps"] == 6
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Softmax cancels a key's bias: its gradient is rounding, of which Adam makes steps of up to the learning rate.
        atol = 2 * 6 * 1e-4 if name.endswith(("key.bias", "qkv.bias")) else 1e-5
        torch.testing.assert_close(two[name], value, msg=name, rtol=1e-3, atol=atol)


@pytest.mark.slow
def test_sharded_training_learns_what_ddp_does(ddp, sharded):
    assert len(logged(ddp)) == 12
    assert logged(sharded) == pytest.approx(logged(ddp), rel=1e-4)


@pytest.mark.slow
def test_a_sharded_training_that_is_resumed_goes_on_to_the_same_losses(folder, sharded, tmp_path):
    resume = {"output_dir": tmp_path, "resume_from_checkpoint": sharded / "checkpoint-3"}
    launch("fsdp2.yaml", options(folder, **resume))
    assert logged(tmp_path) == pytest.approx(logged(sharded), rel=1e-5)
    before, after = (load_file(x / "model.safetensors") for x in (sharded, tmp_path))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, msg=name)


@pytest.mark.slow
def test_every_checkpoint_of_a_sharded_training_loads_in_one_process(ddp, sharded):
    batch = batch_of([5, 9])
    for name, steps in (("checkpoint-3", 3), ("checkpoint-6", 6), (".", 6)):
        model, loading = BudgetFormerForSequenceClassification.from_pretrained(sharded / name, output_loading_info=True)
        assert not any(loading.values())
        assert model.narrow.steps.item() == steps
        expected = AutoModelForSequenceClassification.from_pretrained(ddp / name)
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-3, atol=1e-4)
