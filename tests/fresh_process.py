"""Run as a script, `python -I fresh_process.py TASK.json`: what test_hub.py needs a process of its own for."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path


class NotInstalled:
    """An import finder asked before all others, for which hf_budgetformer does not exist."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_budgetformer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def is_importable():
    try:
        return importlib.util.find_spec("hf_budgetformer") is not None
    except ModuleNotFoundError:
        return False


def pull(task):
    """Loads every source with its own code, in a process that knows nothing of the package; reports what it got."""
    sys.meta_path.insert(0, NotInstalled())
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

    auto_classes = {"config": AutoConfig, "base": AutoModel, "classifier": AutoModelForSequenceClassification}
    report = {"importable": is_importable(), "refusals": {}, "loaded": {}}
    modules = Path(task["modules"])
    for source in set(task["sources"]) - set(task["sources"].values()):  # what this process saves is not there yet
        for name, auto_class in auto_classes.items():
            try:
                report["refusals"][source, name] = f"loaded a {type(auto_class.from_pretrained(source)).__name__}"
            except ValueError as error:
                report["refusals"][source, name] = str(error)
    report["code_after_refusals"] = [str(path) for path in modules.rglob("*budgetformer*")]

    for source, folder in task["sources"].items():
        loaded = {
            name: auto_class.from_pretrained(source, trust_remote_code=True)
            for name, auto_class in auto_classes.items()
        }
        tokenizer = AutoTokenizer.from_pretrained(source)
        inputs = tokenizer(task["texts"], padding=True, return_tensors="pt")
        with torch.no_grad():
            outputs = {
                "logits": loaded["classifier"](**inputs).logits,
                "logits_in_full": loaded["classifier"](**inputs, budget=1.0).logits,
                "logits_narrow": loaded["classifier"](**inputs, budget=0.25).logits,
                "hidden": loaded["base"](**inputs).last_hidden_state,
            }
        answers = pipeline("text-classification", source, tokenizer=tokenizer, trust_remote_code=True)(task["texts"])
        report["loaded"][source] = {
            **outputs,
            "classes": {name: (type(thing).__module__, type(thing).__name__) for name, thing in loaded.items()},
            "labels": [answer["label"] for answer in answers],
            "state": loaded["classifier"].state_dict(),
        }
        loaded["classifier"].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    report["package_files"] = [file for file in files if file and Path(file).is_relative_to(task["package"])]
    torch.save(report, task["report"])


def embed(task):
    """Asks sentence-transformers for scores and embeddings of folders that bring their own code."""
    sys.meta_path.insert(0, NotInstalled())
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    report = {"importable": is_importable()}
    try:
        CrossEncoder(task["reranker"], device="cpu")
    except ValueError as error:
        report["refusal"] = str(error)
    reranker = CrossEncoder(task["reranker"], trust_remote_code=True, device="cpu")
    report["scores"] = reranker.predict(task["pairs"], convert_to_tensor=True)
    report["ranking"] = reranker.rank(task["pairs"][0][0], [passage for _, passage in task["pairs"]])
    encoder = SentenceTransformer(task["encoder"], trust_remote_code=True, device="cpu")
    pool = encoder.start_multi_process_pool(["cpu"]) if task["pool"] else None
    for name, options in (("full", {}), ("narrow", {"budget": 0.25})):
        report[name] = torch.from_numpy(encoder.encode(task["texts"], pool=pool, **options))
    if pool is not None:
        encoder.stop_multi_process_pool(pool)
    report["classes"] = [type(module[0].model).__module__ for module in (reranker, encoder)]
    torch.save(report, task["report"])


def push(task):
    """Pushes in three ways: by hand, by the example, by a Trainer that has trained a little."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    from hf_budgetformer import BudgetFormerForSequenceClassification

    model = BudgetFormerForSequenceClassification.from_pretrained(task["by_hand"])
    tokenizer = AutoTokenizer.from_pretrained(task["by_hand"])
    model.push_to_hub("loopback/by_hand")
    tokenizer.push_to_hub("loopback/by_hand")

    sys.argv = ["push_and_load.py", "--model", task["by_example"], "--repo", "by_example"]
    runpy.run_path(task["example"], run_name="__main__")

    model = BudgetFormerForSequenceClassification.from_pretrained(task["by_trainer"])
    rows = Dataset.from_dict({**tokenizer(task["texts"]), "label": task["labels"]})
    args = TrainingArguments(
        task["output_dir"], hub_model_id="loopback/by_trainer", max_steps=2, report_to="none", use_cpu=True
    )
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    torch.save(model.state_dict(), task["report"])


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    {"embed": embed, "pull": pull, "push": push}[task["do"]](task)
