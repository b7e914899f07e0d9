"""The benchmark of a GPU runs to its end: a rented machine is no place to find out that it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_sizes() -> None:
    """Every part of it, on the CPU; its check of every op against fp64 must hold there too."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--device", "cpu", "--no-save"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for part in ("check", "kernels", "decode", "peers", "train"):
        assert f"## {part}: cpu" in done.stdout
    assert "WRONG" not in done.stdout
    assert "is left out: " not in done.stdout, done.stdout  # a task that raised
    assert "out of memory" not in done.stdout
