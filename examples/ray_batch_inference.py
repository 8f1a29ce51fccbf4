"""Classifies the texts of parquet files with actors that hold a model each, on this machine or on a Ray cluster.

    python examples/ray_batch_inference.py my-model texts.parquet out --actors 2
    python examples/ray_batch_inference.py my-model /shared/texts /shared/out --actors 64 --address auto

`out/predictions/*.parquet` holds row, label, score and budget, what was spent as a share of the full model's work; rows
are counted from 0 through all input files, sorted by name. Rows without a text that can be read are set aside in
`out/rejected.parquet`, with the reason; it is written last: all is done when it is there. A run that was cut off goes
on where it was when the same command is given again. On a cluster all machines must see the same folders and have this
package with its extra [ray].
"""

import argparse
import json
import os
import secrets
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from transformers.utils import logging

from hf_budgetformer.tools.checkpoints import load_classifier, weights_digest
from hf_budgetformer.tools.prediction import predict
from hf_budgetformer.tools.results import write_json
from requested_budgets import budget


RUN_FILE = "run.json"
REJECTED = pa.schema({"row": pa.int64(), "reason": pa.string()})
PREDICTED = pa.schema({"row": pa.int64(), "label": pa.string(), "score": pa.float32(), "budget": pa.float32()})


def find_parts(source: Path, column: str, most: int) -> list[dict[str, Any]]:
    """Cuts the input into parts of at most `most` rows of one row group: what is done, or done again, as one."""
    parts, first = [], 0
    for path in sorted(source.rglob("*.parquet")) if source.is_dir() else [source]:
        metadata = pq.read_metadata(path)
        if column not in (names := metadata.schema.to_arrow_schema().names):
            raise ValueError(f"{path} needs a column {column!r}, it has {', '.join(names)}")
        for group in range(metadata.num_row_groups):
            count, place = metadata.row_group(group).num_rows, {"path": str(path), "group": group}
            starts = range(0, count, most)
            parts += [{**place, "start": x, "rows": min(most, count - x), "first": first + x} for x in starts]
            first += count
    return parts


def begin(output: Path, run: dict[str, Any]) -> None:
    """Makes the folder of a run, or goes on in that of the same one, whose whole parts are kept.

    Raises:
        ValueError: The folder holds something else.
    """
    if not output.is_dir() or not any(output.iterdir()):
        write_json(output / RUN_FILE, run)
    elif not (output / RUN_FILE).is_file():
        raise ValueError(f"output must be a new or empty folder, or that of this run, got {str(output)!r}")
    elif (before := json.loads((output / RUN_FILE).read_text("utf-8"))) != json.loads(json.dumps(run)):
        changed = ", ".join(sorted(name for name in {*run, *before} if run.get(name) != before.get(name)))
        raise ValueError(f"output must be of this run, got {str(output)!r} of one with another {changed}")
    (output / "predictions").mkdir(exist_ok=True)


def read_text(scalar: pa.Scalar) -> tuple[dict[str, str], str | None]:
    """A row as `predict` takes it: its text, or why it has none."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        return {}, "not UTF-8"
    if isinstance(value, str):
        return ({"text": value}, None) if value.strip() else ({}, "empty")
    return {}, "missing" if value is None else f"not a string but {scalar.type}"


def write_whole(rows: list[dict[str, Any]], schema: pa.Schema, target: Path) -> None:
    """Writes a parquet file that nobody sees half-written."""
    unfinished = target.with_name(f".{target.name}")
    pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
    os.replace(unfinished, target)


class Classifier:
    """Holds one model, on one core, and takes part after part."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.options = options
        self.model, self.tokenizer = load_classifier(options.model, budgeted=True, device="cpu")
        self.read = lru_cache(maxsize=1)(  # the next part is mostly of the same row group
            lambda path, group: pq.ParquetFile(path).read_row_group(group, [options.column])[0]
        )

    def __call__(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """Writes the predictions of a part, and returns the rows that have none.

        If the actor dies, another does the part again. The file is named by its first row, so there is one of it.
        """
        values = self.read(part["path"], part["group"]).slice(part["start"], part["rows"])
        rows = [read_text(value) for value in values]
        target = self.options.output / "predictions" / f"part-{part['first']:012d}.parquet"
        if not target.exists():
            settings = {"max_length": self.options.max_length, "budget": self.options.budget, "spent": True}
            answers = predict(self.model, self.tokenizer, rows, skip_bad=True, first=part["first"], **settings)
            write_whole([answer for answer in answers if "error" not in answer], PREDICTED, target)
        return [{"row": row, "reason": fault} for row, (_, fault) in enumerate(rows, part["first"]) if fault]


def run(parts: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Has actors do all parts; returns the rejected rows, sorted. Starts a small Ray of its own without an address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # or Ray leaves one in the home folder
    try:
        import ray
    except ImportError:
        raise ImportError('Ray is not installed: pip install "hf-budgetformer[ray]".') from None
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        small: dict[str, Any] = {"num_cpus": max(2, options.actors), "object_store_memory": 100 * 2**20}
        settings = {} if options.address else {"include_dashboard": False, "_temp_dir": folder, **small}
        ray.init(options.address or "local", log_to_driver=False, **settings)
        try:
            # An actor takes a block of parts: few to keep count of, and enough for all to end at about the same time.
            blocks = ray.data.from_items(parts, override_num_blocks=min(len(parts), 32 * options.actors))
            pool = ray.data.ActorPoolStrategy(size=options.actors, max_tasks_in_flight_per_actor=1)
            rejected = blocks.flat_map(Classifier, fn_constructor_args=(options,), compute=pool, num_cpus=1)
            return sorted(rejected.iter_rows(), key=lambda row: row["row"])
        finally:
            ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    """Classifies, sets aside, counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a fine-tuned BudgetFormer")
    parser.add_argument("input", type=Path, help="parquet file, or folder of such files")
    parser.add_argument("output", type=Path, help="new folder, or that of the same run, which was cut off")
    parser.add_argument("--actors", type=int, default=2, help="models that work side by side, on a core each")
    parser.add_argument("--address", help="of a Ray cluster, auto or host:port; default: this machine")
    parser.add_argument("--column", default="text", help="that holds the texts")
    parser.add_argument("--budget", type=budget, help="share of the full model's work; default: a plain call")
    parser.add_argument("--max-length", type=int, default=128, help="tokens read of a text")
    parser.add_argument("--part-rows", type=int, default=2048, help="rows of an output file: what a lost actor costs")
    options = parser.parse_args(argv)
    options.input, options.output = options.input.resolve(), options.output.resolve()  # actors may start elsewhere
    options.model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    try:
        if min(options.actors, options.part_rows) < 1:
            raise ValueError(f"--actors and --part-rows must be >= 1, got {options.actors} and {options.part_rows}")
        model, _ = load_classifier(options.model, budgeted=True, device="cpu")  # or the actors would find out
        parts = find_parts(options.input, options.column, options.part_rows)
        if not parts:
            raise ValueError(f"{options.input} must hold at least one row, got none")
        files = {path: os.stat(path) for path in sorted({part["path"] for part in parts})}
        settings = {name: getattr(options, name) for name in ("column", "budget", "max_length", "part_rows")}
        stamps = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in files.items()]
        begin(options.output, {**settings, "weights": weights_digest(model), "input": stamps})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    start = time.perf_counter()
    rejected = run(parts, options)
    total = sum(part["rows"] for part in parts)
    done = sum(pq.read_metadata(path).num_rows for path in (options.output / "predictions").glob("part-*"))
    if done + len(rejected) != total:
        raise SystemExit(f"{total} rows came in, but {done} were classified and {len(rejected)} rejected.")
    write_whole(rejected, REJECTED, options.output / "rejected.parquet")
    print(f"{total} rows in {time.perf_counter() - start:.1f} s: {done} classified, {len(rejected)} rejected.")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
