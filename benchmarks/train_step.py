"""A training step (forward, loss, backward) of one 110M Griffin beside transformers', and the memory it takes.

    python -m benchmarks.train_step                   # B x T of 4x512, 1x2048 and 1x8192, two threads
    python -m benchmarks.train_step --shapes 1x1024 --rounds 5 --no-memory

RecurrentGemma of transformers has the same weights and sees the same keys; its Gemma is a Transformer of the same
widths. fp32, and bf16: ours with bf16 activations and fp32 weights, theirs under torch.autocast. Freed memory is kept
for the next step, as `griffin train` does, for all models of a process alike.
Rows of more than 4096 tokens run in a process per model, and transformers' RecurrentGemma there once, without a step to
warm up. Peak memory is that of a process which does two steps of one model and nothing else, over what it had before
the model was made; "recompute" keeps one input per block.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, timing
from griffin import Griffin
from griffin.loss import cross_entropy
from griffin.memory import keep_freed_memory, return_freed_memory
from griffin.train.parallel import prepare_blocks

OURS, RECOMPUTE, OURS_BF16 = "griffin fp32", "griffin fp32, recompute", "griffin bf16 activations"
LONG = 4096  # tokens of a row: T x T scores and weights of transformers' four layers take 13 GB at twice as many


def our_loss(model: Griffin, inputs: Tensor, targets: Tensor) -> Tensor:
    nats, count = cross_entropy(model(inputs), model.embedding, targets, soft_cap=model.config.logits_soft_cap)
    return nats / count


def stepper(model: Any, shape: str, bf16: bool = False) -> Callable[[], float]:
    """One step on fixed random tokens; returns the loss."""
    B, T = _size(shape)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, peers.CONFIG.vocab_size, (B, T + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    loss_of = our_loss if isinstance(model, Griffin) else peers.autocast_loss if bf16 else peers.hf_loss

    def step() -> float:
        model.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        return loss.item()

    return step


def make(name: str) -> Any:
    if name == RECOMPUTE:
        return_freed_memory()
    else:
        keep_freed_memory()
    if name in (peers.THEIRS, peers.THEIRS_BF16):
        return peers.twins()[1].train()
    if name == peers.GEMMA:
        return peers.gemma().train()
    model = Griffin(peers.CONFIG, activation_dtype=torch.bfloat16 if name == OURS_BF16 else None).train()
    prepare_blocks(model, recompute="all" if name == RECOMPUTE else "none")
    return model


def alone(name: str, shape: str, threads: int, steps: int = 2) -> dict[str, Any] | None:
    """Do so many steps in a process of their own: the bytes at its peak, and the seconds of the last step.

    None: the system ended it, for want of memory.
    """
    command = [sys.executable, "-m", "benchmarks.train_step", "--alone", name, "--shapes", shape]
    done = subprocess.run(
        [*command, "--steps", str(steps), "--threads", str(threads)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode == -signal.SIGKILL:
        return None
    done.check_returncode()
    return dict(json.loads(done.stdout.splitlines()[-1]))


def speeds(shapes: Sequence[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    found = []
    names = (OURS, OURS_BF16, peers.THEIRS, peers.THEIRS_BF16, peers.GEMMA)
    for shape in sorted(shapes, key=lambda shape: -_size(shape)[1]):  # while this process is small
        B, T = _size(shape)
        seconds: dict[str, list[float]] = {}
        if T > LONG:
            for name in names:
                result = alone(name, shape, threads, 1 if name == peers.THEIRS else 2)
                seconds[name] = [] if result is None else [result["s"]]
        else:
            steps = {name: stepper(make(name), shape, name == peers.THEIRS_BF16) for name in names}
            for step in steps.values():
                step()
            seconds = timing.interleaved(steps, rounds=rounds, warmup=0)
        tokens_per_s = {name: B * T / timing.median(s) if s else None for name, s in seconds.items()}
        found.append({"shape": shape, "tokens_per_s": tokens_per_s})
    return found[::-1]


def _size(shape: str) -> tuple[int, int]:
    B, T = (int(part) for part in shape.split("x"))
    return B, T


def memory(shapes: Sequence[str], threads: int) -> list[dict[str, Any]]:
    names = (OURS, RECOMPUTE, peers.THEIRS, peers.GEMMA)
    return [
        {"shape": shape, "peak_bytes": {name: (alone(name, shape, threads) or {}).get("peak_bytes") for name in names}}
        for shape in shapes
    ]


def report(steps: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> str:
    rows = []
    for step in steps:
        base = step["tokens_per_s"].get(peers.THEIRS)
        for name, v in step["tokens_per_s"].items():
            over = "" if base is None or v is None else f"{v / base:.2f}x"
            rows.append([step["shape"], name, "out of memory" if v is None else f"{v:.0f}", over])
    text = timing.table(["B x T", "model", "tokens/s", "over RecurrentGemma"], rows)
    if peaks:
        rows = []
        for found in peaks:
            base = found["peak_bytes"][peers.THEIRS]
            rows += [
                [found["shape"], name, f"{v / 1e6:.0f}", f"{v / base:.2f}"]
                for name, v in found["peak_bytes"].items()
                if v is not None and base is not None
            ]
        text += "\n\n" + timing.table(["B x T", "model", "peak MB", "over RecurrentGemma"], rows)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048", "1x8192"], help="B x T, several")
    parser.add_argument("--memory-shapes", nargs="*", default=["4x512", "1x2048"], help="of the peaks; none: no peaks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        before = timing.peak_bytes()
        step = stepper(make(args.alone), args.shapes[0], args.alone == peers.THEIRS_BF16)
        for _ in range(args.steps):
            start = time.perf_counter()
            step()
        print(json.dumps({"s": time.perf_counter() - start, "peak_bytes": timing.peak_bytes() - before}))
        return
    steps = speeds(args.shapes, args.rounds, args.threads)
    peaks = memory(args.memory_shapes, args.threads)
    print(report(steps, peaks))
    shape = {"parameters": peers.CONFIG.num_parameters(), "dtype": "fp32"}
    print(timing.save("train_step", {"shape": shape, "steps": steps, "peaks": peaks}))


if __name__ == "__main__":
    main()
