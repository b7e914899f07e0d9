"""Time to the first token: RecurrentGemma 2B's exact shape, random weights, prompts read as `generate` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu_decode import make
from benchmarks.gpu_timing import Part, peak_memory, reset_peak, seconds
from griffin import PRESETS, Griffin
from griffin.infer.prefill import prefill

LENGTHS = (128, 2048, 8192, 32_768)
RAGGED = tuple(range(128, 2049, 128))  # tokens of 16 prompts read together
CHUNKS = (512, 2048)


@torch.no_grad()
def first_tokens(model: Griffin, prompts: Sequence[Sequence[int]], chunk: int) -> list[int]:
    """Read whole prompts into a new state, and choose what follows each: on the host, where a user waits for it."""
    hidden = prefill(model, model.new_state(len(prompts)), prompts, chunk=chunk)
    tokens: list[int] = model.logits(hidden).argmax(dim=-1).tolist()
    return tokens


def measure(device: torch.device, *, small: bool) -> Part:
    config = PRESETS["griffin-tiny" if small else "recurrentgemma-2b"]
    batches = [[24], [8, 40]] if small else [*([T] for T in LENGTHS), list(RAGGED)]
    chunks = (16, 32) if small else CHUNKS
    found: list[dict[str, Any]] = []
    rows = []
    for form in ("bf16", "int8", "int4"):
        model = make(config, form, device)
        for lengths in batches:
            prompts = [torch.randint(1, config.vocab_size, (T,)).tolist() for T in lengths]
            tasks = {str(chunk): partial(first_tokens, model, prompts, chunk) for chunk in chunks}
            reset_peak(device)
            times = seconds(tasks, device, rounds=1 if small else 5, warmup=1)
            peak = peak_memory(device)
            what = f"{lengths[0]:,}" if len(lengths) == 1 else f"{len(lengths)} of {min(lengths)} to {max(lengths):,}"
            found.append({"weights": form, "prompts": lengths, "s_by_chunk": times, "peak_bytes": peak})
            for chunk, time in times.items():
                rows.append([form, what, chunk, f"{1e3 * time:.1f}", f"{sum(lengths) / time:,.0f}"])
    return (
        found,
        timing.table(["weights", "tokens of the prompts", "chunk", "ms to the first token", "tokens/s"], rows),
        True,
    )
