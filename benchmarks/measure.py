"""How everything here is timed, compared and checked, and on what machine."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[1]
LEAST_ROUNDS = 3
PACKAGES = ("hf-budgetformer", "torch", "transformers", "numpy", "onnxruntime", "openvino", "nncf")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def read_json(path: Path) -> Any:
    """What a file of settings holds; ends with a message where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: not a readable JSON file ({error}).") from None


def read_filled(path: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings from a file, defaults filled in; ends with a message where it cannot be read or knows others."""
    given = read_json(path)
    if unknown := sorted(given.keys() - defaults.keys()):
        raise SystemExit(f"{path}: unknown settings {unknown}; there are {sorted(defaults)}.")
    return {**defaults, **given}


def stopwatch(run: Callable[[], Any], least_seconds: float = 0.0) -> Callable[[int], float]:
    """Makes `run` something `interleave` takes: its mean time over as many calls as fill `least_seconds`.

    The number of calls is found at round 0, which warms up.
    """
    calls = 1

    def timed(round_number: int) -> float:
        nonlocal calls
        if round_number == 0:
            run()  # pays for whatever is only paid once
            if least_seconds == 0.0:
                return 0.0
        start = time.perf_counter()
        for _ in range(calls):
            run()
        seconds = (time.perf_counter() - start) / calls
        if round_number == 0:
            calls = max(1, ceil(least_seconds / seconds))
        return seconds

    return timed


def interleave(
    variants: dict[str, Callable[[int], float]], repeats: int, seconds: float = inf
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, taken in turn, A B A B, so that a slow minute hits all alike.

    Args:
        variants: From the number of the round to seconds; round 0 warms up and does not count.
        repeats: Rounds that count, at most.
        seconds: No round begins once so much time has passed, but `LEAST_ROUNDS` count anyway.
    """
    for run in variants.values():
        run(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    for round_number in range(1, repeats + 1):
        if round_number > LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in variants.items():
            times[name].append(run(round_number))
    return times


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {name: float(f"{x:.5g}") for name, x in zip(("q1", "median", "q3"), quartiles, strict=True)}


def ratio(times: dict[str, list[float]], name: str, baseline: str) -> dict[str, float]:
    """Spread of baseline time / time of `name`, round by round."""
    return spread([base / variant for base, variant in zip(times[baseline], times[name], strict=True)])


class Agreement:
    """Refuses to go on where outputs differ from the reference, and remembers the largest difference.

    Args:
        dtype: Name of the number type, which decides the tolerance.
    """

    def __init__(self, dtype: str) -> None:
        self.tolerance, self.worst, self.checks = TOLERANCE[dtype], 0.0, 0

    def check(self, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Raises SystemExit unless the largest difference is within the tolerance; relative where values exceed 1."""
        scale = max(1.0, expected.float().abs().max().item())
        difference = (got.float() - expected.float()).abs().max().item() / scale
        if not difference <= self.tolerance:
            raise SystemExit(
                f"{name}: differs by {difference:.2g} from the reference, executor='masked', more than "
                f"{self.tolerance:g}. What is not right is not timed."
            )
        self.worst, self.checks = max(self.worst, difference), self.checks + 1

    def to_dict(self) -> dict[str, float]:
        """For the result."""
        return {"tolerance": self.tolerance, "max_difference": self.worst, "checks": self.checks}


def show_ratio(spread: dict[str, float] | None) -> str:
    """A ratio with its quartiles."""
    return "-" if spread is None else f"{spread['median']:.2f}x [{spread['q1']:.2f}-{spread['q3']:.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def fill(text: str, name: str, content: str) -> str:
    """A page with `content` between its markers `name`."""
    begin, end = f"<!-- [start:{name}] -->\n", f"<!-- [end:{name}] -->"
    before, rest = text.split(begin)
    return before + begin + content + end + rest.split(end)[1]


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read_cpu(field: str) -> str:
    """What /proc/cpuinfo says of the first processor; empty where there is no such file or field."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_read_cpu("flags").split()))


def environment() -> dict[str, Any]:
    """Versions, hardware, commit, and how busy the machine was at the start."""
    sources = ("src", "benchmarks", ":(exclude,glob)benchmarks/**/results/**", ":(exclude)docs")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _read_cpu("model name") or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "commit": _git("rev-parse", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain", "--", *sources, ":(exclude)benchmarks/*.png")),
    }
