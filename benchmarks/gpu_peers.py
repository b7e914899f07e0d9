"""transformers' RecurrentGemma beside ours, the same weights: a prompt of 2048, decoding, a training step."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu_timing import Part, peak_memory, reset_peak, seconds
from griffin import PRESETS


def measure(device: torch.device, *, small: bool) -> Part:
    if find_spec("transformers") is None:
        return None, "transformers is not installed: left out", True
    from benchmarks import peers
    from benchmarks.gpu_decode import decoder
    from griffin.loss import cross_entropy

    # transformers decodes only where the recurrence is as wide as the model.
    config = replace(PRESETS["griffin-tiny"], lru_width=32) if small else PRESETS["recurrentgemma-2b"]
    T, steps = (24, 2) if small else (2048, 32)
    ours, theirs = (model.to(device, torch.bfloat16) for model in peers.twins(config))
    ours.activation_dtype = torch.bfloat16
    tokens = torch.randint(1, config.vocab_size, (1, T + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    @torch.no_grad()
    def our_prefill() -> object:
        return ours.logits(ours(inputs, ours.new_state(1))[:, -1])

    @torch.no_grad()
    def their_prefill() -> object:
        return theirs(inputs, use_cache=True, logits_to_keep=1).logits

    def our_step() -> None:
        ours.zero_grad()
        nats, count = cross_entropy(ours(inputs), ours.embedding, targets, soft_cap=config.logits_soft_cap)
        (nats / count).backward()

    def their_step() -> None:
        theirs.zero_grad()
        peers.hf_loss(theirs, inputs, targets).backward()

    with torch.no_grad():
        their_decoder = peers.hf_decoder(theirs, 1, device=device)
        pairs: dict[str, dict[str, Any]] = {
            "prefill": {"griffin": our_prefill, "transformers": their_prefill},
            "decode": {"griffin": decoder(ours, 1, 0, steps), "transformers": lambda: their_decoder(steps)},
            "train": {"griffin": our_step, "transformers": their_step},
        }
    found, rows = [], []
    for what, tasks in pairs.items():
        times = seconds(tasks, device, rounds=1 if small else 5, warmup=1)
        memory = {}
        for name, task in tasks.items():
            if name in times:
                reset_peak(device)
                task()
                memory[name] = peak_memory(device)
        ratio = times["transformers"] / times["griffin"] if len(times) == 2 else None
        found.append({"what": what, "tokens": steps if what == "decode" else T, "s": times, "peak_bytes": memory})
        for name, time in times.items():
            peak = memory.get(name)
            rows.append([what, name, f"{1e3 * time:.1f}", "" if peak is None else f"{peak / 1e9:.2f}"])
        rows.append([what, "ours is faster by", "" if ratio is None else f"{ratio:.2f}x", ""])
    return found, timing.table(["what", "model", "ms", "peak GB"], rows), True
