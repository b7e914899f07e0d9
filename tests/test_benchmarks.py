"""Benchmarks run to their end: a rented machine is no place to find out that they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_toy_sizes() -> None:
    """Every part of it, on the CPU; its check of every op against fp64 must hold there too."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--device", "cpu", "--no-save"]
    # Without the interpreter of Triton, which these tests run in: every kernel would be timed in it, for minutes, and
    # its products of bf16 are wrong (tests/ops/triton/bfloat16.py mends that for the kernels' own tests).
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for part in ("check", "kernels", "prefill", "decode", "peers", "train"):
        assert f"## {part}: cpu" in done.stdout
    assert "WRONG" not in done.stdout
    assert "is left out: " not in done.stdout, done.stdout  # a task that raised
    assert "out of memory" not in done.stdout


@pytest.mark.slow
def test_the_engines_benchmark_runs_at_toy_sizes() -> None:
    command = [sys.executable, "-m", "benchmarks.engine", "--small", "--no-save", "--threads", "1", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for part in ("one after the other", "long prompt", "requests, all", "a JSON list"):
        assert part in done.stdout


def test_the_benchmark_inside_transformers_runs_at_toy_sizes() -> None:
    sizes = ["--shapes", "2x24", "--generate", "1x8", "2x8", "--tokens", "4", "--rounds", "1", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.huggingface", "--small", "--no-save", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("| before |") == 5
    assert done.stdout.count("| after, no logits |") == 1
