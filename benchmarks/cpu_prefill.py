"""Prefill on a CPU: a prompt read as `generate` reads it, in every format, over the machine's matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers, timing
from griffin import Griffin
from griffin.infer.prefill import prefill

QUADRATIC = 2048  # tokens up to which transformers is timed: its T x T masks take minutes beyond


def flop_per_token(T: int) -> float:
    """Of the products: weights, and the keys within reach (half of them, on average, before the window is full)."""
    config = peers.CONFIG
    window = config.window or T
    reach = (min(T, window) ** 2 / 2 + max(0, T - window) * window) / T
    attention = config.block_types.count("attention") * 4 * config.width * reach
    gates = 2 * config.block_types.count("recurrent") * 2 * config.lru_width**2 / config.num_gate_blocks
    matrices = config.num_parameters() - config.vocab_size * config.width
    gate_weights = gates / 2
    return 2 * (matrices - gate_weights) + gates + attention


def measure(
    models: dict[str, Griffin], others: dict[str, Any], gemm: float, lengths: list[int], rounds: int
) -> list[dict[str, Any]]:
    found = []
    for T in lengths:
        tokens = torch.randint(1, peers.CONFIG.vocab_size, (1, T))
        prompt = tokens[0].tolist()
        tasks: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            tasks[name] = lambda model=model, prompt=prompt: model.logits(prefill(model, model.new_state(1), [prompt]))
        for name, peer in others.items():
            if name == peers.GOOGLE:
                positions = torch.arange(T)[None]
                if T <= QUADRATIC:
                    tasks[name] = lambda peer=peer, tokens=tokens, positions=positions: peer(tokens, positions)
            elif T <= QUADRATIC or (name == peers.GEMMA and T <= 4 * QUADRATIC):
                tasks[name] = lambda peer=peer, tokens=tokens: peer(tokens, use_cache=False, logits_to_keep=1)
        long = T >= 4 * QUADRATIC
        seconds = timing.interleaved(tasks, rounds=1 if long else rounds, warmup=0 if long else 1)
        speeds = {name: T / timing.median(values) for name, values in seconds.items()}
        for name, speed in speeds.items():
            found.append(
                {
                    "T": T,
                    "model": name,
                    "tokens_per_s": speed,
                    "over_fp32": speed / speeds["griffin fp32"],
                    "of_gemm": speed * flop_per_token(T) / gemm if name.startswith("griffin") else None,
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{row['T']:,}",
            row["model"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['over_fp32']:.2f}",
            "" if row["of_gemm"] is None else f"{row['of_gemm']:.2f}",
        ]
        for row in found
    ]
    return timing.table(["T", "model", "tokens/s", "over our fp32", "of fp32 GEMM"], rows)
