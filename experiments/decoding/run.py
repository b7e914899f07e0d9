"""E7. Griffin's figures 1b and 4: time and memory of a token against what has been read, and a very long generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.timing import interleaved
from experiments.experiment import Experiment
from experiments.families import FAMILIES, NAMES
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Session
from experiments.small import WINDOW, size_s
from experiments.verdict import Claim, judge
from griffin.infer.step import DecodeStep
from griffin.memory import keep_freed_memory
from griffin.model import Griffin
from griffin.state import State

# Fixed before any result.
FLAT = 0.05  # of the recurrent families' time per token, past the window
LINEAR = 0.98  # R^2 of a straight line through the Transformer's time per token
SPEEDUP = 5.0  # at 8,192 tokens, 8 rows: expected 5 to 9
CROSSOVER = 2.0  # measured over predicted from bytes, and the other way round: at most
PREFILL = 0.15  # of the Transformer's speed at 2,048 tokens
LONG_TOKENS, LONG_FLAT = 100_000, 0.10  # the slowest tenth of a long generation over its fastest: at most 10% more


@dataclass(frozen=True)
class Size:
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    steps: int  # tokens in one timing
    rounds: int
    prefill: tuple[int, ...]
    generations: tuple[tuple[int, int], ...]  # (prompt, tokens)
    long_tokens: int


SIZES = {
    "smoke": Size((16, 32, 64), (1, 2), 2, 2, (64,), ((0, 16),), 200),
    "cpu": Size(
        (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        (1, 8, 32),
        8,
        7,
        (2048, 8192),
        ((0, 4096), (4096, 4096)),
        LONG_TOKENS,
    ),
    "gpu": Size(
        (512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        (1, 16, 128),
        32,
        7,
        (2048, 8192),
        ((0, 4096), (4096, 4096)),
        LONG_TOKENS,
    ),
}


def run(session: Session) -> None:
    keep_freed_memory()
    size, smoke = SIZES[session.scale], session.scale == "smoke"
    device = "cuda" if session.scale == "gpu" else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    models = {
        family: Griffin(size_s(family, smoke=smoke), device=device, generator=generator).eval() for family in FAMILIES
    }
    session.total = len(size.rows) * len(size.contexts) + len(size.prefill) + len(size.generations) + 2
    session.once("sizes", lambda: _sizes(models, size))
    for rows in size.rows:
        for context in size.contexts:
            session.once(f"decode rows={rows} context={context}", lambda r=rows, c=context: _decode(models, size, r, c))
    for tokens in size.prefill:
        session.once(f"prefill tokens={tokens}", lambda t=tokens: _prefill(models, size, t))
    for prompt, tokens in size.generations:
        session.once(f"generate prompt={prompt} tokens={tokens}", lambda p=prompt, t=tokens: _generate(models, p, t))
    session.once(f"long tokens={size.long_tokens}", lambda: _long(models["griffin"], size.long_tokens))


def state_after(model: Griffin, rows: int, context: int, room: int) -> State:
    """A state as after `context` tokens: numbers at random in it, as in the weights; time does not depend on them."""
    state = model.new_state(rows)
    state.reserve_(context + room)
    for tensor in state.tensors().values():
        if tensor.is_floating_point():
            tensor.normal_(0.0, 0.1)
    state.position.fill_(context)
    state.longest = context
    return state


def _sizes(models: Mapping[str, Griffin], size: Size) -> dict[str, Any]:
    return {
        "parameter_bytes": {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()},
        # Of one row after so many tokens; the recurrent families' windows are counted as far as they are full.
        "state_bytes": {
            name: {str(context): _used_bytes(model, context) for context in size.contexts}
            for name, model in models.items()
        },
    }


def _used_bytes(model: Griffin, context: int) -> int:
    config, kinds = model.config, model.config.block_types
    seen = context if config.window is None else min(context, config.window + 1)
    key_value = 2 * config.num_kv_heads * config.head_width * 4 * seen
    recurrent = 4 * config.lru_width * config.conv_width  # h and the convolution's inputs, fp32
    return kinds.count("attention") * key_value + kinds.count("recurrent") * recurrent


def _decode(models: Mapping[str, Griffin], size: Size, rows: int, context: int) -> dict[str, Any]:
    room = (size.rounds + 2) * size.steps + 2
    tasks: dict[str, Callable[[], object]] = {}
    for family, model in models.items():
        tasks[family] = _decoder(model, state_after(model, rows, context, room), size.steps)
    seconds = interleaved(tasks, rounds=size.rounds)
    return {"rows": rows, "context": context, "seconds": _per(seconds, size.steps)}


def _decoder(model: Griffin, state: State, steps: int) -> Callable[[], object]:
    step = DecodeStep(model, state, lambda logits: logits.argmax(dim=-1))
    tokens = step(torch.zeros(state.batch_size, dtype=torch.int64, device=model.device))

    def decode() -> None:
        nonlocal tokens
        for _ in range(steps):
            tokens = step(tokens)
        tokens.tolist()  # waits for a GPU

    return decode


@torch.no_grad()
def _prefill(models: Mapping[str, Griffin], size: Size, tokens: int) -> dict[str, Any]:
    text = {family: torch.randint(256, (1, tokens), device=model.device) for family, model in models.items()}

    def read(model: Griffin, text: torch.Tensor) -> None:
        state = model.new_state(1)
        for chunk in text.split(512, dim=1):
            hidden = model(chunk, state)
        model.logits(hidden[:, -1]).tolist()

    tasks = {family: lambda f=family: read(models[f], text[f]) for family in models}
    return {"tokens": tokens, "seconds": _per(interleaved(tasks, rounds=size.rounds), tokens)}


def _generate(models: Mapping[str, Griffin], prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds until 1/8, 2/8 .. of the tokens are there, one row each, the prompt's reading not counted."""
    found = {}
    for family, model in models.items():
        state = state_after(model, 1, prompt, tokens + 2)
        decode, times = _decoder(model, state, max(1, tokens // 8)), []
        began = time.perf_counter()
        for _ in range(8):
            decode()
            times.append(round(time.perf_counter() - began, 4))
        found[family] = times
    return {"prompt": prompt, "tokens": tokens, "seconds": found}


def _long(model: Griffin, tokens: int) -> dict[str, Any]:
    """A generation of one row: seconds a token and memory of the process, for each tenth."""
    state = model.new_state(1)
    decode, seconds, memory = _decoder(model, state, tokens // 10), [], []
    for _ in range(10):
        began = time.perf_counter()
        decode()
        seconds.append((time.perf_counter() - began) / (tokens // 10))
        memory.append(_resident_bytes())
    tenths = {"seconds": [_short(each) for each in seconds], "memory_bytes": memory}
    return {"tokens": tokens, **tenths, "state_bytes": state.nbytes}


def _resident_bytes() -> int:
    """Of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def _per(seconds: Mapping[str, list[float]], count: int) -> dict[str, list[float]]:
    return {name: [_short(value / count) for value in values] for name, values in seconds.items()}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def times(results: Results, rows: int) -> dict[str, dict[int, float]]:
    """Median seconds of a step by family and context."""
    found: dict[str, dict[int, float]] = {family: {} for family in FAMILIES}
    for entry in results["runs"].values():
        if entry.get("rows") == rows:
            for family in FAMILIES:
                found[family][entry["context"]] = median(entry["seconds"][family])
    return {family: dict(sorted(values.items())) for family, values in found.items()}


def best_throughput(results: Results) -> dict[int, float]:
    """Tokens a second, the best number of rows of each family, Griffin's over the Transformer's, by context."""
    found: dict[int, float] = {}
    by_rows = {rows: times(results, rows) for rows in SIZES[results["scale"]].rows}
    for context in SIZES[results["scale"]].contexts:
        best = {
            family: max((rows / at[family].get(context, float("inf")) for rows, at in by_rows.items()), default=0.0)
            for family in FAMILIES
        }
        if all(best.values()):
            found[context] = best["griffin"] / best["transformer"]
    return found


def predicted_crossover(results: Results, rows: int) -> float | None:
    """Where the bytes read for a step are as many: parameters and the rows' states. None: nowhere measured."""
    sizes = results["runs"]["sizes"]
    return _crossing(
        {
            family: {
                int(context): sizes["parameter_bytes"][family] + rows * count
                for context, count in sizes["state_bytes"][family].items()
            }
            for family in FAMILIES
        }
    )


def _crossing(values: Mapping[str, Mapping[int, float]]) -> float | None:
    """The context from which the Transformer's value is above Griffin's, between two measured ones on a line."""
    before: tuple[int, float] | None = None
    for context, griffin in values["griffin"].items():
        more = values["transformer"][context] - griffin
        if more >= 0:
            if before is None:
                return float(context)
            return before[0] + (context - before[0]) * -before[1] / (more - before[1])
        before = (context, more)
    return None


def _straightness(values: Mapping[int, float]) -> float:
    """R^2 of the best straight line."""
    x, y = torch.tensor(list(values), dtype=torch.float64), torch.tensor(list(values.values()), dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)


def _tokens(value: float | None) -> str:
    return "nowhere" if value is None else f"{value:.0f}"


def verdict(results: Results) -> list[Claim]:
    size, rows = SIZES[results["scale"]], 16 if results["scale"] == "gpu" else 8
    at = times(results, rows)
    there = results["scale"] != "smoke" and all(len(at[family]) == len(size.contexts) for family in FAMILIES)
    claims = []
    for family in ("griffin", "hawk"):
        past = [seconds for context, seconds in at[family].items() if context > WINDOW] if there else []
        spread = max(past) / min(past) - 1 if past else None
        claims.append(
            judge(
                f"{NAMES[family]}'s time per token does not grow past its window",
                f"slowest over fastest context past {WINDOW} tokens, {rows} rows: at most {1 + FLAT:.2f}",
                "no run yet" if spread is None else f"{1 + spread:.3f}",
                None if spread is None else spread <= FLAT,
            )
        )
    straight = _straightness(at["transformer"]) if there else None
    claims.append(
        judge(
            "the Transformer's time per token grows linearly",
            f"R^2 of a straight line, {rows} rows: at least {LINEAR}",
            "no run yet" if straight is None else f"{straight:.4f}",
            None if straight is None else straight >= LINEAR,
        )
    )
    faster = at["transformer"][8192] / at["griffin"][8192] if there else None
    claims.append(
        judge(
            "Griffin decodes faster after a long context",
            f"at 8,192 tokens, {rows} rows: at least {SPEEDUP:g} times the Transformer's speed",
            "no run yet" if faster is None else f"{faster:.2f} times",
            None if faster is None else faster >= SPEEDUP,
        )
    )
    measured, predicted = (_crossing(at), predicted_crossover(results, rows)) if there else (None, None)
    off = None if measured is None or predicted is None else max(measured / predicted, predicted / measured)
    claims.append(
        judge(
            "the crossing is where memory traffic says (paper's eq. 5)",
            f"context from which Griffin is faster, {rows} rows: within {CROSSOVER:g} times of the bytes' crossing",
            f"{_tokens(measured)} measured, {_tokens(predicted)} predicted" if there else "no run yet",
            None if not there else off is not None and off <= CROSSOVER,
        )
    )
    ratios = list(best_throughput(results).items()) if there else []
    long = [(context, ratio) for context, ratio in ratios if context >= 512]
    claims.append(
        judge(
            "the advantage in throughput grows with length",
            "best rows of each, Griffin over Transformer: higher at each doubling from 512 tokens",
            ", ".join(f"{ratio:.2f} at {context:,}" for context, ratio in long) or "no run yet",
            all(a < b for (_, a), (_, b) in pairwise(long)) if long else None,
        )
    )
    read = results["runs"].get("prefill tokens=2048")
    speed = median(read["seconds"]["transformer"]) / median(read["seconds"]["griffin"]) if read and there else None
    claims.append(
        judge(
            "a prompt is read about as fast",
            f"2,048 tokens: Griffin's speed over the Transformer's within 1 +- {PREFILL}",
            "no run yet" if speed is None else f"{speed:.2f}",
            None if speed is None else abs(speed - 1) <= PREFILL,
        )
    )
    long_run = results["runs"].get(f"long tokens={LONG_TOKENS}")
    text, holds = "no run yet", None
    if long_run:
        slower = max(long_run["seconds"]) / min(long_run["seconds"])
        grown = long_run["memory_bytes"][-1] - long_run["memory_bytes"][0]
        text = f"slowest tenth {slower:.3f} of the fastest, memory {grown / 1e6:+.1f} MB from first tenth to last"
        holds = slower <= 1 + LONG_FLAT and grown < 2**22
    claims.append(
        judge(
            f"{LONG_TOKENS:,} tokens are generated at constant memory and speed",
            f"slowest tenth at most {1 + LONG_FLAT:.2f} of the fastest; less than 4 MB more memory",
            text,
            holds,
        )
    )
    return claims


def show_table(results: Results) -> str:
    lines = []
    sizes = results["runs"].get("sizes", {}).get("state_bytes", {})
    for rows in SIZES[results["scale"]].rows:
        at = times(results, rows)
        for context in at["griffin"]:
            lines.append(
                [
                    rows,
                    f"{context:,}",
                    *(f"{1000 * at[family][context]:.2f}" for family in FAMILIES),
                    f"{at['transformer'][context] / at['griffin'][context]:.2f}",
                    *(f"{sizes[family][str(context)] / 1000:,.0f}" for family in FAMILIES),
                ]
            )
    header = ["rows", "context", *(f"{NAMES[family]}, ms a step" for family in FAMILIES), "Griffin's advantage"]
    return table([*header, *(f"{NAMES[family]}, kB a row" for family in FAMILIES)], lines)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    rows = SIZES[results["scale"]].rows[1]
    with figure(file, "decoding, by tokens read before", columns=3) as (latency, memory, generation):
        for family, values in times(results, rows).items():
            look = {"color": COLOURS[family], "marker": "o", "label": NAMES[family]}
            latency.plot(list(values), [1000 * seconds for seconds in values.values()], **look)
            sizes = results["runs"]["sizes"]["state_bytes"][family]
            memory.plot([int(context) for context in sizes], [count / 1000 for count in sizes.values()], **look)
        for entry in results["runs"].values():
            if "prompt" in entry:
                for family, seconds in entry["seconds"].items():
                    tokens = [entry["tokens"] * (part + 1) // 8 for part in range(8)]
                    style = "-" if entry["prompt"] == 0 else "--"
                    label = f"{NAMES[family]}, prompt {entry['prompt']:,}"
                    generation.plot(tokens, seconds, style, color=COLOURS[family], label=label)
        latency.set_xlabel("context, tokens")
        latency.set_ylabel(f"ms a step of {rows} rows")
        memory.set_xlabel("context, tokens")
        memory.set_ylabel("state, kB a row")
        generation.set_xlabel("tokens generated, one row")
        generation.set_ylabel("seconds")


EXPERIMENT = Experiment(
    label="E7",
    question="What does a token cost, in time and memory, after a long context?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
