"""Seconds on a device, interleaved: by CUDA events where there is CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Part = tuple[object, str, bool]  # what is saved, what is printed, whether all was correct


def seconds(
    tasks: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 20, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each task; the tasks take turns. A task that raises is left out, and the reason printed."""
    going = dict(tasks)
    found: dict[str, list[float]] = {}
    for round_ in range(warmup + rounds):
        for name in list(going):
            try:
                elapsed = _once(going[name], device)
            except Exception as error:  # of a peer, say: the others are measured all the same
                print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
                del going[name]
                found.pop(name, None)
                continue
            if round_ >= warmup:
                found.setdefault(name, []).append(elapsed)
    return {name: statistics.median(values) for name, values in found.items()}


def _once(task: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        task()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    task()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def peak_memory(device: torch.device) -> int | None:
    """Bytes since `reset_peak`; None where PyTorch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
