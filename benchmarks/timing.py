"""Interleaved timing, a description of the machine, and results on disk: what every benchmark here shares."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    tasks: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, rest_s: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each task, one after another in every round, so that a machine's drift falls on all of them alike.

    Before each task, a rest: OpenMP's threads spin for some 20 ms when their work is done, which another process feels.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(warmup + rounds):
        for name, task in tasks.items():
            time.sleep(rest_s)
            start = time.perf_counter()
            task()
            elapsed = time.perf_counter() - start
            if round_ >= warmup:
                seconds[name].append(elapsed)
            print(f"\r{name}: round {round_ + 1} of {warmup + rounds}, {elapsed:.3f} s   ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    model = "unknown"
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": date.today().isoformat(),
    }


def peak_bytes() -> int:
    """The most memory this process has had (Linux). Not getrusage's, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def save(name: str, results: Mapping[str, Any], variant: str = "") -> Path:
    """Write results/NAME[-VARIANT]-DATE.json with the machine and the command."""
    RESULTS.mkdir(exist_ok=True)
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]  # no one's folders
    command = f"python -m benchmarks.{name} {' '.join(words)}".strip()
    path = RESULTS / f"{name}{variant and '-'}{variant}-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"command": command, "machine": machine(), **results}, indent=2) + "\n")
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
