"""Prefill and decode of one 110M Griffin on a CPU, ours and transformers', beside the machine's own limits, in one run.

    python -m benchmarks.cpu                            # two threads; a few minutes
    python -m benchmarks.cpu --threads 1 --prefill 512 --rounds 3

Random weights: width 768 = lru_width, 12 layers R R A, 6 heads, MLP 2304, vocabulary 32,000, window 1024. Limits: bytes
a streaming read gives per second (a sum over 512 MB), and fp32 GEMM operations per second (2048 x 768 by 768 x 2304).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import DynamicCache

from benchmarks import timing
from benchmarks.train_step import twins
from griffin import Griffin, GriffinConfig
from griffin.config import griffin_pattern

CONFIG = GriffinConfig(
    vocab_size=32_000,
    width=768,
    mlp_width=2304,
    lru_width=768,
    num_heads=6,
    num_gate_blocks=6,
    block_types=griffin_pattern(12),
    window=1024,
)


def limits() -> dict[str, float]:
    """Bytes read and fp32 multiply-adds times two, per second, best of several."""
    memory = torch.ones(128 * 2**20)
    a, b = torch.randn(2048, 768), torch.randn(768, 2304)
    seconds = timing.interleaved({"read": memory.sum, "gemm": lambda: a @ b}, rounds=7)
    return {
        "read_bytes_per_s": memory.nbytes / min(seconds["read"]),
        "gemm_flop_per_s": 2 * 2048 * 768 * 2304 / min(seconds["gemm"]),
    }


def our_decode(model: Griffin, rows: int, steps: int) -> Callable[[], object]:
    state = model.new_state(rows)
    token = torch.randint(1, CONFIG.vocab_size, (rows, 1))

    @torch.no_grad()
    def run() -> None:
        nonlocal token
        for _ in range(steps):
            token = model.logits(model(token, state)).argmax(dim=-1)

    return run


def their_decode(model, rows: int, steps: int) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    cache = DynamicCache(config=model.config)
    token = torch.randint(1, CONFIG.vocab_size, (rows, 1))
    position = 0

    @torch.no_grad()
    def run() -> None:
        nonlocal token, position
        for _ in range(steps):
            ids = torch.tensor([[position]])
            out = model(token, position_ids=ids, past_key_values=cache, use_cache=True)
            token, position = out.logits[:, -1:].argmax(dim=-1), position + 1

    return run


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=20, help="tokens decoded per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fp32, theirs = twins(CONFIG)
    fp32, theirs = fp32.eval(), theirs.eval()
    bf16 = Griffin(CONFIG, dtype=torch.bfloat16).eval()
    models = {"griffin fp32": fp32, "griffin bf16": bf16}
    limit = limits()
    read_bytes = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    flop_per_token = 2 * (CONFIG.num_parameters() - CONFIG.vocab_size * CONFIG.width)
    decode, rows = [], []
    for B in args.rows:
        tasks = {name: our_decode(model, B, args.steps) for name, model in models.items()}
        tasks["transformers fp32"] = their_decode(theirs, B, args.steps)
        seconds = timing.interleaved(tasks, rounds=args.rounds)
        speeds = {name: B * args.steps / timing.median(values) for name, values in seconds.items()}
        for name, speed in speeds.items():
            ratio = speed / speeds["transformers fp32"]
            share = speed / B * read_bytes[name] / limit["read_bytes_per_s"] if name in read_bytes else None
            decode.append({"rows": B, "model": name, "tokens_per_s": speed, "ratio": ratio, "of_read": share})
            shown = "" if share is None else f"{share:.2f}"
            rows.append([f"decode, batch {B}", name, f"{speed:.1f}", f"{ratio:.2f}x", shown])
    prefill = []
    for T in args.prefill:
        tokens = torch.randint(1, CONFIG.vocab_size, (1, T))
        tasks = {
            name: (lambda model=model, tokens=tokens: model.logits(model(tokens, model.new_state(1))[:, -1]))
            for name, model in models.items()
        }
        if T <= 2048:  # beyond, its T x T masks take minutes
            tasks["transformers fp32"] = lambda tokens=tokens: theirs(tokens, use_cache=False, logits_to_keep=1)
        seconds = timing.interleaved(tasks, rounds=3 if T <= 2048 else 1, warmup=1 if T <= 2048 else 0)
        speeds = {name: T / timing.median(values) for name, values in seconds.items()}
        for name, speed in speeds.items():
            ratio = speed / speeds["transformers fp32"] if "transformers fp32" in speeds else None
            share = speed * flop_per_token / limit["gemm_flop_per_s"]
            prefill.append({"T": T, "model": name, "tokens_per_s": speed, "ratio": ratio, "of_gemm": share})
            rows.append(
                [f"prefill {T}", name, f"{speed:.0f}", "" if ratio is None else f"{ratio:.2f}x", f"{share:.2f}"]
            )
    print(timing.table(["what", "model", "tokens/s", "over transformers", "of the machine's limit"], rows))
    print(timing.save("cpu", {"shape": "110M Griffin", "limits": limit, "decode": decode, "prefill": prefill}))


if __name__ == "__main__":
    main()
