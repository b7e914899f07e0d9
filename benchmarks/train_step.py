"""A training step (forward, loss, backward) of one 110M Griffin beside transformers', and the memory it takes.

    python -m benchmarks.train_step                   # B x T of 4x512, 1x2048 and 1x8192, two threads
    python -m benchmarks.train_step --shapes 1x1024 --rounds 5 --no-memory

RecurrentGemma of transformers has the same weights and sees the same keys; its Gemma is a Transformer of the same
widths. fp32. Peak memory is that of a process which does two steps of one model and nothing else, over what it had
before the model was made; "recompute" keeps one input per block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, timing
from griffin import Griffin
from griffin.loss import cross_entropy
from griffin.train.memory import return_freed_memory

OURS, RECOMPUTE = "griffin fp32", "griffin fp32, recompute"
SLOWEST = 4096  # tokens of a row up to which transformers' quadratic code is run


def our_loss(model: Griffin, inputs: Tensor, targets: Tensor) -> Tensor:
    nats, count = cross_entropy(model(inputs), model.embedding, targets, soft_cap=model.config.logits_soft_cap)
    return nats / count


def stepper(model: Any, shape: str) -> Callable[[], float]:
    """One step on fixed random tokens; returns the loss."""
    B, T = (int(part) for part in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, peers.CONFIG.vocab_size, (B, T + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    loss_of = our_loss if isinstance(model, Griffin) else peers.hf_loss

    def step() -> float:
        model.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        return loss.item()

    return step


def make(name: str) -> Any:
    if name == peers.THEIRS:
        return peers.twins()[1].train()
    if name == peers.GEMMA:
        return peers.gemma().train()
    if name == RECOMPUTE:
        return_freed_memory()  # as griffin train does
    return Griffin(peers.CONFIG, recompute=name == RECOMPUTE).train()


def peak(name: str, shape: str, threads: int) -> int:
    """Bytes at the peak of two steps, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--peak-of", name, "--shapes", shape]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def speeds(shapes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    ours, theirs = peers.twins()
    models = {OURS: ours.train(), peers.THEIRS: theirs.train(), peers.GEMMA: peers.gemma().train()}
    found = []
    for shape in shapes:
        B, T = (int(part) for part in shape.split("x"))
        steps = {name: stepper(model, shape) for name, model in models.items()}
        few = T > SLOWEST  # then theirs is left out: T x T scores and weights of four layers alone are 13 GB
        if few:
            steps.pop(peers.THEIRS)
        if not few:
            for step in steps.values():
                step()
        seconds = timing.interleaved(steps, rounds=1 if few else rounds, warmup=0)
        tokens_per_s = {name: B * T / timing.median(values) for name, values in seconds.items()}
        found.append({"shape": shape, "tokens_per_s": tokens_per_s})
    return found


def memory(shapes: Sequence[str], threads: int) -> list[dict[str, Any]]:
    names = (OURS, RECOMPUTE, peers.THEIRS, peers.GEMMA)
    return [{"shape": shape, "peak_bytes": {name: peak(name, shape, threads) for name in names}} for shape in shapes]


def report(steps: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> str:
    rows = []
    for step in steps:
        base = step["tokens_per_s"].get(peers.THEIRS)
        for name, v in step["tokens_per_s"].items():
            rows.append([step["shape"], name, f"{v:.0f}", "" if base is None else f"{v / base:.2f}x"])
    text = timing.table(["B x T", "model", "tokens/s", "over RecurrentGemma"], rows)
    if peaks:
        rows = []
        for found in peaks:
            base = found["peak_bytes"][peers.THEIRS]
            rows += [
                [found["shape"], name, f"{v / 1e6:.0f}", f"{v / base:.2f}"] for name, v in found["peak_bytes"].items()
            ]
        text += "\n\n" + timing.table(["B x T", "model", "peak MB", "over RecurrentGemma"], rows)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x512", "1x2048", "1x8192"], help="B x T, several")
    parser.add_argument("--memory-shapes", nargs="*", default=["4x512", "1x2048"], help="of the peaks; none: no peaks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        before = timing.peak_bytes()
        step = stepper(make(args.peak_of), args.shapes[0])
        step(), step()
        print(timing.peak_bytes() - before)
        return
    steps = speeds(args.shapes, args.rounds)
    peaks = memory(args.memory_shapes, args.threads)
    print(report(steps, peaks))
    shape = {"parameters": peers.CONFIG.num_parameters(), "dtype": "fp32"}
    print(timing.save("train_step", {"shape": shape, "steps": steps, "peaks": peaks}))


if __name__ == "__main__":
    main()
