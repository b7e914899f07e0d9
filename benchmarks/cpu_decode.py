"""Decode on a CPU: one token for each row of a batch, at several contexts, in every format of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, timing
from griffin import Griffin, State
from griffin.infer.step import DecodeStep

CONTEXTS = (128, 8192, 32_768, 131_072)


def our_decoder(model: Griffin, rows: int, context: int = 0) -> Callable[[int], None]:
    step, token = DecodeStep(model, state_at(model, rows, context)), torch.randint(1, model.config.vocab_size, (rows,))

    def run(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = step(token).argmax(dim=-1)

    run(2)  # recorded
    return run


def forward_decoder(model: Griffin, rows: int) -> Callable[[int], None]:
    """What a loop over model(tokens, state) gets, without a DecodeStep."""
    state, token = model.new_state(rows), torch.randint(1, model.config.vocab_size, (rows, 1))

    @torch.no_grad()
    def run(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = model.logits(model(token, state)).argmax(dim=-1)

    return run


@torch.no_grad()
def state_at(model: Griffin, rows: int, context: int) -> State:
    """A state after `context` tokens: windows full of real keys, then the position set, as time is all that differs."""
    state = model.new_state(rows)
    window = model.config.window or 0
    read = min(context, window + 8)
    if read:
        model(torch.randint(1, model.config.vocab_size, (rows, read)), state)
    state.position.fill_(context)
    state.longest = context
    return state


def weight_bytes(model: Griffin) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def batches(
    models: dict[str, Griffin],
    others: dict[str, Any],
    read: Callable[[], int],
    steps: int,
    rounds: int,
    gemma_cpp: Path | None = None,
) -> list[dict[str, Any]]:
    """Tokens a second with 1 and 8 rows; `read` streams memory once and says how many bytes: it takes its turn too.

    `gemma_cpp` is the program that benchmarks/gemma_cpp builds, or None to leave that engine out.
    """
    found = []
    for rows in (1, 8):
        tasks: dict[str, Callable[[int], object]] = {name: our_decoder(model, rows) for name, model in models.items()}
        tasks["griffin fp32, model(tokens, state)"] = forward_decoder(models["griffin fp32"], rows)
        for name, peer in others.items():
            tasks[name] = peers.google_decoder(peer, rows) if name == peers.GOOGLE else peers.hf_decoder(peer, rows)
        tasks["read"] = lambda count: [read() for _ in range(count)]
        with ExitStack() as children:
            if gemma_cpp is not None:
                for name, form in peers.GEMMA_CPP.items():
                    tasks[name] = children.enter_context(peers.gemma_cpp_decoder(gemma_cpp, rows, form))
            speeds = _speeds(tasks, rows, steps, rounds, rest_s=0.0 if gemma_cpp is None else 0.1)
        bytes_per_s = speeds.pop("read") / rows * read()
        for name, speed in speeds.items():
            model = models.get(name)
            share = None if model is None or rows > 1 else speed * weight_bytes(model) / bytes_per_s
            ratio = speed / speeds[peers.THEIRS]
            found.append(
                {
                    "rows": rows,
                    "model": name,
                    "tokens_per_s": speed,
                    "ratio": ratio,
                    "of_read": share,
                    "read_bytes_per_s": bytes_per_s,
                }
            )
    return found


def contexts(models: dict[str, Griffin], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second at each context over those at the shortest, one row."""
    found = []
    for name, model in models.items():
        tasks = {str(context): our_decoder(model, 1, context) for context in CONTEXTS}
        speeds = _speeds(tasks, 1, steps, rounds)
        base = speeds[str(CONTEXTS[0])]
        found += [
            {"model": name, "context": int(context), "tokens_per_s": speed, "over_shortest": speed / base}
            for context, speed in speeds.items()
        ]
    return found


def _speeds(
    tasks: Mapping[str, Callable[[int], object]], rows: int, steps: int, rounds: int, rest_s: float = 0.0
) -> dict[str, float]:
    turns = {name: lambda run=run: run(steps) for name, run in tasks.items()}
    seconds = timing.interleaved(turns, rounds=rounds, rest_s=rest_s)
    return {name: rows * steps / timing.median(values) for name, values in seconds.items()}


def table(decode: list[dict[str, Any]], by_context: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{row['rows']}",
            row["model"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}x",
            "" if row["of_read"] is None else f"{row['of_read']:.2f}",
        ]
        for row in decode
    ]
    text = timing.table(["batch", "model", "tokens/s", "over RecurrentGemma", "weights read over streaming read"], rows)
    rows = [
        [row["model"], f"{row['context']:,}", f"{row['tokens_per_s']:.1f}", f"{row['over_shortest']:.3f}"]
        for row in by_context
    ]
    return text + "\n\n" + timing.table(["model", "context", "tokens/s", f"over {CONTEXTS[0]}"], rows)
