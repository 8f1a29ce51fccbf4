"""Serves the stock model with a BudgetFormer's full encoder, as `examples/serve.py` serves ours: for comparison."""

import argparse
import signal
import sys
from typing import Any

import torch
from measure import ROOT

from hf_budgetformer.tools.narrowing import stock_model


sys.path.append(str(ROOT / "examples"))
import serve


class StockClassifier(serve.Classifier):
    """The stock model; requests with a budget are not for it."""

    def setup(self, device: str) -> None:
        """As for ours, which is then let go."""
        super().setup(device)
        self.model = stock_model(self.model)

    @torch.no_grad()
    def predict(self, x: list[serve.Pending], **kwargs: Any) -> list[Any]:
        """For each question its answer."""
        answers: list[Any] = list(x)
        logits = self.model(**self.pad(x).to(self.model.device)).logits
        self.tell(answers, list(range(len(x))), logits, [1.0] * len(x), 1)
        return answers


def main() -> None:
    """Serves until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--max-wait-ms", type=float, required=True)
    options = parser.parse_args()
    server = serve.build_server(
        StockClassifier(options.checkpoint, (), options.max_batch, options.max_wait_ms / 1000), timeout=60.0
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, serve.stop)
    server.run("127.0.0.1", options.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
