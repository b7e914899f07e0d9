"""Decoding with RecurrentGemma 2B's exact shape, random weights: one CUDA graph per batch size, sampling inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu_timing import Part, reset_peak, seconds
from griffin import PRESETS, Griffin, GriffinConfig, State
from griffin.infer.step import DecodeStep
from griffin.quantize import quantize

CONTEXTS = (128, 8192, 32_768, 131_072)
BATCHES = (1, 8, 64, 256, 1024)
LENGTHS = (4096, 8192, 16_384, 32_768)
STEPS = 32


def state_at(model: Griffin, rows: int, context: int) -> State:
    """A state whose slots hold anything finite, at a position: for the time it takes, only the position matters."""
    state = model.new_state(rows)
    state.reserve_(context + 16 * STEPS)
    for name, tensor in state.tensors().items():
        if name != "position":
            tensor.normal_()
    state.position.fill_(context)
    state.longest = context
    return state


def decoder(model: Griffin, rows: int, context: int, steps: int) -> Callable[[], Tensor]:
    """STEPS greedy tokens of each row."""
    step = DecodeStep(model, state_at(model, rows, context), lambda logits: logits.argmax(dim=-1))
    token = torch.randint(1, model.config.vocab_size, (rows,), device=model.device)

    def run() -> Tensor:
        nonlocal token
        for _ in range(steps):
            token = step(token)
        return token

    return run


def rate(model: Griffin, rows: int, context: int, device: torch.device, small: bool) -> float | None:
    """Tokens a second over all rows; None where the state does not fit the device."""
    steps = 2 if small else STEPS
    reset_peak(device)
    try:
        run = decoder(model, rows, context, steps)
        time = seconds({"decode": run}, device, rounds=1 if small else 5, warmup=1)
    except torch.OutOfMemoryError:
        return None
    return rows * steps / time["decode"] if "decode" in time else None


def make(config: GriffinConfig, form: str, device: torch.device) -> Griffin:
    model = Griffin(config, dtype=torch.bfloat16, device=device).eval()
    return model if form == "bf16" else quantize(model, form)


@torch.no_grad()
def measure(device: torch.device, *, small: bool) -> Part:
    config = PRESETS["griffin-tiny" if small else "recurrentgemma-2b"]
    contexts, batches = ((8, 40), (1, 3)) if small else (CONTEXTS, BATCHES)
    found: list[dict[str, Any]] = []
    rows = []
    for form in ("bf16", "int8", "int4"):
        model = make(config, form, device)
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        for B, context in [(1, context) for context in contexts] + [(B, contexts[0]) for B in batches[1:]]:
            value = rate(model, B, context, device, small)
            found.append({"weights": form, "weight_bytes": size, "rows": B, "context": context, "tokens_per_s": value})
            read = "" if value is None else f"{size * value / B / 1e9:.0f}"
            rows.append([form, str(B), f"{context:,}", "out of memory" if value is None else f"{value:.0f}", read])
        del model
    text = timing.table(["weights", "rows", "context", "tokens/s", "GB/s of weights"], rows)
    ratios, against = transformer(config, device, small)
    return {"decode": found, "transformer": ratios}, text + "\n\n" + against, True


def transformer(config: GriffinConfig, device: torch.device, small: bool) -> tuple[list[dict[str, Any]], str]:
    """The largest batch up to 256 that fits, at contexts, beside our own all-attention model of the same widths."""
    lengths, most = ((8, 40), 2) if small else (LENGTHS, 256)
    all_attention = replace(config, block_types=("attention",) * config.num_layers, window=None)
    models = {"griffin": make(config, "bf16", device), "transformer": make(all_attention, "bf16", device)}
    found, rows = [], []
    for context in lengths:
        line: dict[str, Any] = {"context": context}
        for name, model in models.items():
            B, value = most, None
            while value is None and B >= 1:
                value = rate(model, B, context, device, small)
                line[name] = {"rows": B, "tokens_per_s": value}
                B //= 2
        both = [line[name]["tokens_per_s"] for name in models]
        line["ratio"] = None if None in both else both[0] / both[1]
        found.append(line)
        rows.append(
            [f"{context:,}"]
            + [f"{line[name]['tokens_per_s'] or 0:.0f} ({line[name]['rows']} rows)" for name in models]
            + ["" if line["ratio"] is None else f"{line['ratio']:.2f}x"]
        )
    return found, timing.table(["context", "Griffin, tokens/s", "Transformer, tokens/s", "ratio"], rows)
