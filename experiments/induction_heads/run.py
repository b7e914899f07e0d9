"""E2. Griffin's figure 6b: all learn induction heads; beyond the training length the Transformer fails, alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from experiments.experiment import Experiment
from experiments.families import FAMILIES, NAMES, paper_config
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.synthetic import (
    LEARNING_RATES,
    TaskSource,
    held_out_batches,
    sweep,
    train_config,
)
from experiments.verdict import Claim, judge
from griffin import checkpoint
from griffin.eval.synthetic.induction_heads import InductionHeads
from griffin.eval.synthetic.task import accuracy

# Fixed before any result.
SOLVED = 0.99  # at the training length and shorter, all
FAILS, FAILS_AT = 0.50, 4  # the Transformer at 4 times the length: at most
HAWK_HOLDS, HAWK_AT = 0.99, 64
GRIFFIN_HOLDS, GRIFFIN_AT = 0.90, 16
PATTERN = ("recurrent", "recurrent", "attention", "recurrent", "recurrent")


@dataclass(frozen=True)
class Size:
    task: InductionHeads
    window: int
    rows: int
    sweep_steps: int
    steps: int
    every: int
    watched: tuple[int, ...]  # lengths measured while training, as multiples of the task's
    watched_rows: int
    tested: Mapping[str, tuple[int, ...]]  # lengths measured at the end
    tested_rows: int


_SMOKE = dict.fromkeys(FAMILIES, (1, 2))
_ALL = {"griffin": (1, 2, 4, 8, 16, 32, 64), "hawk": (1, 2, 4, 8, 16, 32, 64), "transformer": (1, 2, 4, 8, 16)}
SIZES = {
    "smoke": Size(InductionHeads(length=16), 8, 8, 20, 40, 20, (1, 2), 16, _SMOKE, 16),
    "cpu": Size(InductionHeads(length=64), 32, 16, 1000, 10_000, 500, (1, 2, 4, 8, 16), 64, _ALL, 256),
    "gpu": Size(InductionHeads(length=256), 128, 64, 3000, 30_000, 1000, (1, 2, 4, 8, 16), 256, _ALL, 256),
}


def run(session: Session) -> None:
    size = SIZES[session.scale]
    session.total = len(FAMILIES) * (len(LEARNING_RATES) + session.num_seeds)
    steps = size.sweep_steps
    chosen = sweep(session, FAMILIES, lambda family, rate: _run(size, family, rate, 0, steps, "sweep "), steps)
    for seed in range(session.num_seeds):
        for family in FAMILIES:
            each = _run(size, family, chosen[family], seed, size.steps)
            session.train(each, lambda folder, family=family: {"lengths": test(folder, size, family)})


def test(folder: Path, size: Size, family: str) -> dict[str, float]:
    """Accuracy by length, on rows of their own."""
    model = checkpoint.load(folder)
    lengths = [size.task.length * times for times in size.tested[family]]
    return {
        str(length): accuracy(model, held_out_batches(replace(size.task, length=length), size.tested_rows)).tokens
        for length in lengths
    }


def _run(size: Size, family: str, rate: float, seed: int, steps: int, what: str = "") -> Run:
    model = paper_config(
        family,
        pattern=PATTERN,
        vocab_size=size.task.vocab_size,
        width=64,
        lru_width=80,
        num_heads=4,
        num_gate_blocks=4,
        window=size.window,
    )
    held_out = {
        "accuracy" if times == 1 else f"accuracy_{times}x": replace(size.task, length=times * size.task.length)
        for times in (size.watched if not what else (1,))
    }
    source = TaskSource(task=size.task, rows=size.rows, seed=seed, held_out=held_out, held_out_rows=size.watched_rows)
    config = train_config(
        model,
        task=str(size.task),
        learning_rate=rate,
        seed=seed,
        rows=size.rows,
        length=size.task.length,
        steps=steps,
        every=size.every,
    )
    about = {"family": family, "learning_rate": rate, "seed": seed, "parameters": model.num_parameters()}
    return Run(
        key=f"{what}{family} lr={rate:g} seed={seed}",
        config=config,
        source=source,
        about={**about, "sweep": bool(what)},
        segment=size.every,
    )


def finals(results: Results) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for entry in sorted(results["runs"].values(), key=lambda entry: entry["seed"]):
        if not entry["sweep"]:
            found[entry["family"]].append(entry)
    return found


def verdict(results: Results) -> list[Claim]:
    runs, length = finals(results), SIZES[results["scale"]].task.length
    enough = results["scale"] != "smoke" and all(len(entries) >= 3 for entries in runs.values())

    def middle(family: str, times: int) -> float | None:
        values = [entry["lengths"].get(str(length * times)) for entry in runs[family]]
        return median(values) if values and None not in values else None

    def part(family: str, text: str, times: int, bound: float, least: bool) -> Claim:
        value = middle(family, times)
        holds = None if value is None or not enough else value >= bound if least else value <= bound
        return judge(
            text,
            f"median accuracy at {times} times the length {'>=' if least else '<='} {bound:.0%}",
            "no run yet" if value is None else f"{value:.1%}",
            holds,
        )

    return [
        *(part(family, f"{NAMES[family]} solves it at the training length", 1, SOLVED, True) for family in FAMILIES),
        part("transformer", "the Transformer fails beyond it", FAILS_AT, FAILS, False),
        part("hawk", "Hawk extrapolates far", HAWK_AT, HAWK_HOLDS, True),
        part("griffin", "Griffin extrapolates", GRIFFIN_AT, GRIFFIN_HOLDS, True),
    ]


def show_table(results: Results) -> str:
    size = SIZES[results["scale"]]
    lengths = [str(size.task.length * times) for times in max(size.tested.values(), key=len)]
    rows = [
        [
            NAMES[family],
            f"{entry['parameters']:,}",
            f"{entry['learning_rate']:g}",
            entry["seed"],
            f"{entry['steps']:,}",
            *(f"{entry['lengths'][each]:.3f}" if each in entry["lengths"] else "" for each in lengths),
            f"{entry['cpu_seconds']:.0f}",
        ]
        for family, entries in finals(results).items()
        for entry in entries
    ]
    header = ["model", "parameters", "learning rate", "seed", "steps", *(f"T={each}" for each in lengths), "CPU s"]
    return table(header, rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    size = SIZES[results["scale"]]
    far = max(times for times in size.watched if times <= 16)
    with figure(file, f"induction heads, trained at T={size.task.length}", columns=2) as (over_length, over_step):
        for family, entries in finals(results).items():
            for index, entry in enumerate(entries):
                label = NAMES[family] if index == 0 else None
                lengths = sorted((int(length), value) for length, value in entry["lengths"].items())
                over_length.plot(*zip(*lengths, strict=True), color=COLOURS[family], marker="o", label=label)
                history = [line for line in entry["history"] if f"accuracy_{far}x" in line]
                over_step.plot(
                    [line["step"] for line in history],
                    [line[f"accuracy_{far}x"] for line in history],
                    color=COLOURS[family],
                    label=label,
                )
        over_length.set_xscale("log", base=2)
        over_length.axvline(size.task.length, color="grey", linestyle=":")
        over_length.set_xlabel("length tested")
        over_step.set_xlabel(f"training step (accuracy at {far} times the length)")
        over_length.set_ylabel("accuracy")
        over_step.axhline(size.task.chance, color="grey", linestyle=":", label="chance")


EXPERIMENT = Experiment(
    label="E2",
    question="Do all three families learn induction heads, and what remains of it beyond the length trained on?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
