"""Times examples/ray_batch_inference.py: ray_inference.py experiments/ray/X.json -> results/ray/X.json.

From a parquet file to parquet files, in turn: a plain loop in one process with one thread, and Ray with one actor or
more, a thread each. What does not give every row once, and the first part as the masked reference does, is not timed.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from inputs import keep_quiet, read_texts
from measure import ROOT, Agreement, environment, interleave, ratio, read_filled, spread

from hf_budgetformer.tools.data import write_json


sys.path.append(str(ROOT / "examples"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "examples"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
)
from ray_batch_inference import Classifier, find_parts, run  # Ray's workers import it too


SETTINGS: dict[str, Any] = {
    "title": "", "data": "ag_news/train", "rows": 20000, "max_length": 128, "budget": None, "part_rows": 1024,
    "actors": [1, 2], "repeats": 3, "seed": 0,
}  # fmt: skip


def read_answers(output: Path, rows: int) -> torch.Tensor:
    """Score and share of heads of each row, (rows, 2), in the order of the rows, of which each must be there once."""
    table = pq.read_table(output / "predictions").sort_by("row").to_pydict()
    if table["row"] != list(range(rows)):
        raise SystemExit(f"{output.name}: of {rows} rows some are missing, or there twice.")
    return torch.tensor([table["score"], table["head_budget"]]).T


def rate_when_running(output: Path, workers: int) -> float:
    """Rows per second from when each worker had written about one part, without what it takes to start."""
    ends = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in output.glob("predictions/*"))
    return sum(rows for _, rows in ends[workers:]) / (ends[-1][0] - ends[workers - 1][0])


def measure(settings: dict[str, Any], checkpoint: str, data: Path) -> dict[str, Any]:
    """Rows per second of every way, with and without its start."""
    source = data if data.is_file() else data / f"{settings['data']}.parquet"
    texts, origin = read_texts(settings["data"], source, settings["rows"], settings["seed"])
    agreement, running, heads = Agreement("float32"), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"text": texts}), f"{folder}/texts.parquet", row_group_size=4 * settings["part_rows"])
        parts = find_parts(Path(folder, "texts.parquet"), "text", settings["part_rows"])

        def prepare(name: str, actors: int) -> argparse.Namespace:
            asked = {name: settings[name] for name in ("budget", "max_length")}
            output = Path(folder, name)
            (output / "predictions").mkdir(parents=True)
            return argparse.Namespace(
                model=checkpoint, output=output, column="text", address=None, actors=actors, **asked
            )

        def timed(name: str, actors: int, round_number: int) -> float:
            chosen, options = parts if round_number else parts[:2], prepare(f"{name} {round_number}", actors)
            start = time.perf_counter()
            run(chosen, options) if actors else list(map(Classifier(options), chosen))
            seconds = time.perf_counter() - start
            found = read_answers(options.output, sum(part["rows"] for part in chosen))
            agreement.check(name, found[: len(expected)], expected)
            if round_number:
                heads[name] = found[:, 1].mean().item()
                running.setdefault(name, []).append(rate_when_running(options.output, max(1, actors)))
            return seconds

        reference = Classifier(prepare("masked", 0))
        reference.model.config.executor = "masked"
        reference(parts[0])
        expected = read_answers(reference.options.output, parts[0]["rows"])
        ways = {"plain loop": 0, **{f"actors: {actors}": actors for actors in settings["actors"]}}
        times = interleave({way: partial(timed, way, actors) for way, actors in ways.items()}, settings["repeats"])
    figures = {
        way: {
            "rows_per_second": spread([len(texts) / x for x in times[way]]),
            "ratio": ratio(times, way, "plain loop"),
            "rows_per_second_when_running": spread(running[way]),
            "ratio_when_running": spread([x / y for x, y in zip(running[way], running["plain loop"], strict=True)]),
            "heads": round(heads[way], 4),
        }
        for way in ways
    }
    return {"agreement": agreement.to_dict(), "data": origin, "figures": figures}


def main(arguments: list[str] | None = None) -> None:
    """Runs one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="a JSON file, see benchmarks/experiments/ray")
    parser.add_argument("--checkpoint", required=True, help="a trained BudgetFormer, tokenizer included")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, or one parquet file")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ray")
    options = parser.parse_args(arguments)
    settings = read_filled(options.experiment, SETTINGS)
    keep_quiet()
    machine, start = environment(), time.perf_counter()
    machine["packages"] |= {name: version(name) for name in ("ray", "pyarrow")}
    found = measure(settings, str(Path(options.checkpoint).resolve()), options.data)
    settings["checkpoint"], seconds = Path(options.checkpoint).name, round(time.perf_counter() - start)
    result = {"experiment": options.experiment.stem, "settings": settings, "environment": machine, "seconds": seconds}
    write_json(options.output / options.experiment.name, {**result, **found})
    for way, x in found["figures"].items():
        medians = [x[name]["median"] for name in ("rows_per_second", "rows_per_second_when_running")]
        print("{}: {:.0f} rows/s, {:.0f} when running".format(way, *medians))


if __name__ == "__main__":
    main()
