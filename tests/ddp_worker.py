"""One of the processes of a distributed training; started by test_trainer.py."""

import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoTokenizer, Trainer

from hf_budgetformer import BudgetFormerForSequenceClassification
from test_trainer import GradientsAtFirstStep, OutsideTrainer, trainer_for


def main(folder: Path) -> None:
    """Trains three steps on half of each batch, twice, and leaves behind what the test compares."""
    for kind in (Trainer, OutsideTrainer):
        keeper = GradientsAtFirstStep()
        model = BudgetFormerForSequenceClassification.from_pretrained(folder / "model")
        trainer = trainer_for(
            model,
            folder / "two",
            AutoTokenizer.from_pretrained(folder / "model"),
            load_from_disk(folder / "data"),
            callbacks=[keeper],
            trainer=kind,
            max_steps=3,
            per_device_train_batch_size=8,
            max_grad_norm=0.0,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
        )
        trainer.train()
        kept = {"gradients": keeper.gradients, "steps": model.narrow.steps.item(), "weights": model.state_dict()}
        torch.save(kept, folder / f"{kind.__name__}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
