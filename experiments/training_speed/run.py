"""E6. Griffin's figure 3: seconds of a training step of as many tokens, against the length of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.timing import interleaved
from experiments.experiment import Experiment
from experiments.families import FAMILIES, NAMES
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Session
from experiments.small import size_s
from experiments.verdict import Claim, judge
from griffin.config import PRESETS, GriffinConfig
from griffin.data.packing import Batch
from griffin.memory import keep_freed_memory
from griffin.model import Griffin
from griffin.train.objective import LanguageModel
from griffin.train.parallel import prepare_blocks
from griffin.train.step import take_step

# Fixed before any result. The upper end of the Transformer's range is of models of 400M parameters, whose attention is
# a smaller share of a step than that of small ones: at CPU scale the lower end alone is asked for.
GROWS = (1.25, 1.6)  # the Transformer, rows of 8,192 tokens over 2,048
FLAT = 0.05  # Griffin, rows of 2,048 to 8,192 tokens
AS_FAST = 1.10  # Griffin over the Transformer at 2,048 tokens: at most
SHORT, LONG = 2048, 8192


@dataclass(frozen=True)
class Size:
    lengths: tuple[int, ...]
    tokens: int  # of a step
    rounds: int


SIZES = {
    "smoke": Size((32, 128), 128, 2),
    "cpu": Size((512, 1024, 2048, 4096, 8192), 8192, 5),
    "gpu": Size((2048, 4096, 8192), 32_768, 20),
}


def _config(scale: str, family: str) -> GriffinConfig:
    return PRESETS[f"{family}-400m"] if scale == "gpu" else size_s(family, smoke=scale == "smoke")


def run(session: Session) -> None:
    keep_freed_memory()
    size, scale = SIZES[session.scale], session.scale
    session.total = len(size.lengths)
    missing = [length for length in size.lengths if _key(length) not in session.results["runs"]]
    if not missing:
        return
    device = "cuda" if scale == "gpu" else "cpu"
    models = {}
    for family in FAMILIES:
        generator = torch.Generator(device).manual_seed(0)
        models[family] = Griffin(_config(scale, family), device=device, generator=generator)
        if scale == "gpu":
            models[family].activation_dtype = torch.bfloat16
            prepare_blocks(models[family], compiled=True)
    for length in size.lengths:
        session.once(_key(length), lambda length=length: _measure(models, size, length))


def _key(length: int) -> str:
    return f"step length={length}"


def _measure(models: dict[str, Griffin], size: Size, length: int) -> dict[str, object]:
    tasks = {family: _stepper(model, size.tokens // length, length) for family, model in models.items()}
    seconds = interleaved(tasks, rounds=size.rounds, warmup=2)
    short = {family: [float(f"{value:.5g}") for value in values] for family, values in seconds.items()}
    parameters = {family: model.config.num_parameters() for family, model in models.items()}
    return {"length": length, "tokens": size.tokens, "seconds": short, "parameters": parameters}


def _stepper(model: Griffin, rows: int, length: int) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (rows, length + 1), device=model.device)
    positions = torch.arange(length, device=model.device).expand(rows, length).contiguous()
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions)
    # It reads a number back, and so waits for a GPU.
    return lambda: take_step(model, LanguageModel(), optimizer, [batch], 1.0)


def times(results: Results) -> dict[str, dict[int, float]]:
    """Median seconds by family and length."""
    entries = sorted(results["runs"].values(), key=lambda entry: entry["length"])
    return {family: {each["length"]: median(each["seconds"][family]) for each in entries} for family in FAMILIES}


def verdict(results: Results) -> list[Claim]:
    at = times(results)
    there = {SHORT, LONG} <= at["griffin"].keys()
    grown = at["transformer"][LONG] / at["transformer"][SHORT] if there else None
    wide = results["scale"] == "gpu"
    claims = [
        judge(
            "the Transformer's step grows with the length of rows",
            f"{LONG:,} over {SHORT:,} tokens: "
            + (f"{GROWS[0]} to {GROWS[1]}" if wide else f"at least {GROWS[0]} (at this width no upper end is known)"),
            "no run yet" if grown is None else f"{grown:.2f}",
            None if grown is None else GROWS[0] <= grown and (not wide or grown <= GROWS[1]),
        )
    ]
    for family in ("griffin", "hawk"):
        past = [seconds for length, seconds in at[family].items() if length >= SHORT] if there else []
        spread = max(past) / min(past) - 1 if past else None
        claims.append(
            judge(
                f"{NAMES[family]}'s step does not grow",
                f"slowest over fastest of {SHORT:,} to {LONG:,} tokens: at most {1 + FLAT:.2f}",
                "no run yet" if spread is None else f"{1 + spread:.3f}",
                None if spread is None else spread <= FLAT,
            )
        )
    ratio = at["griffin"][SHORT] / at["transformer"][SHORT] if there else None
    claims.append(
        judge(
            "Griffin trains as fast as the Transformer on short rows",
            f"seconds at {SHORT:,} tokens over the Transformer's: at most {AS_FAST:.2f}",
            "no run yet" if ratio is None else f"{ratio:.2f}",
            None if ratio is None else ratio <= AS_FAST,
        )
    )
    return claims


def show_table(results: Results) -> str:
    at = times(results)
    rows = [
        [f"{length:,}", *(f"{at[family][length]:.3f}" for family in FAMILIES), f"{seconds / at['griffin'][length]:.2f}"]
        for length, seconds in at["transformer"].items()
    ]
    return table(["tokens of a row", *(f"{NAMES[family]}, s" for family in FAMILIES), "Transformer over Griffin"], rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    with figure(file, "a training step of as many tokens") as axes:
        for family, values in times(results).items():
            axes.plot(list(values), list(values.values()), color=COLOURS[family], marker="o", label=NAMES[family])
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of a row")
        axes.set_ylabel("seconds a step")


EXPERIMENT = Experiment(
    label="E6",
    question="How long does a training step of as many tokens take, by the length of its rows?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
