"""Training steps of Griffin and a Transformer: 400M and 1.3B, 32k tokens a step, T = 2k to 8k (Griffin, figure 3)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu_timing import Part, peak_memory, reset_peak, seconds
from griffin import PRESETS, Griffin
from griffin.data.packing import Batch
from griffin.train.flops import flops_per_token, peak_flops
from griffin.train.objective import LanguageModel
from griffin.train.parallel import prepare_blocks
from griffin.train.step import take_step


def measure(device: torch.device, *, small: bool) -> Part:
    sizes, tokens, lengths = (("tiny",), 64, (32, 64)) if small else (("400m", "1.3b"), 2**15, (2048, 4096, 8192))
    found: list[dict[str, Any]] = []
    for size in sizes:
        for family in ("transformer", "griffin"):
            for T in lengths:
                found.append(step(f"{family}-{size}", T, tokens, device, small))
    rows = []
    for line in found:
        base = next(
            other["s"]
            for other in found
            if other["preset"] == line["preset"].replace("griffin-", "transformer-") and other["T"] == lengths[0]
        )
        over = "" if line["s"] is None or base is None else f"{line['s'] / base:.2f}"
        cells = [line["preset"], f"{line['T']:,}", "out of memory" if line["s"] is None else f"{1e3 * line['s']:.0f}"]
        share = "" if line["mfu"] is None else f"{line['mfu']:.0%}"
        memory = "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e9:.1f}"
        rows.append([*cells, over, share, memory])
    header = ["model", "T", "ms a step", f"over the Transformer at {lengths[0]:,}", "MFU", "peak GB"]
    return found, timing.table(header, rows), True


def step(preset: str, T: int, tokens: int, device: torch.device, small: bool) -> dict[str, Any]:
    """One optimizer step of `tokens` tokens: fp32 weights, bf16 activations, compiled blocks, cheap recomputation."""
    config = PRESETS[preset]
    reset_peak(device)
    line: dict[str, Any] = {"preset": preset, "T": T, "tokens": tokens, "s": None, "mfu": None, "peak_bytes": None}
    generator = torch.Generator(device).manual_seed(0)
    try:
        model = Griffin(config, device=device, activation_dtype=torch.bfloat16, generator=generator)
        prepare_blocks(model, recompute="cheap", compiled=not small)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        made = torch.randint(0, config.vocab_size, (2, tokens // T, T), device=device, generator=generator)
        batch = Batch(made[0], made[1], torch.arange(T, device=device).repeat(tokens // T, 1))
        time = seconds(
            {preset: lambda: take_step(model, LanguageModel(), optimizer, [batch], 1.0)},
            device,
            rounds=1 if small else 5,
            warmup=2,
        )
    except torch.OutOfMemoryError:
        return line
    if preset in time:
        line["s"], line["peak_bytes"] = time[preset], peak_memory(device)
        peak = peak_flops(device)
        line["mfu"] = None if peak is None else flops_per_token(config, T) * tokens / time[preset] / peak
    return line
