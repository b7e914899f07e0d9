"""E1. Griffin's figure 6a: all three learn selective copying; Hawk needs more steps, Griffin about as many as MQA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.experiment import Experiment
from experiments.families import FAMILIES, NAMES, paper_config
from experiments.markdown import number, table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.synthetic import (
    LEARNING_RATES,
    TaskSource,
    best_learning_rate,
    median_or_none,
    steps_to,
    sweep,
    train_config,
)
from experiments.verdict import Claim, judge
from griffin.eval.synthetic.selective_copying import SelectiveCopying

# Fixed before any result.
SOLVED = 0.99  # token accuracy
HAWK_SLOWER, GRIFFIN_SLOWER = 2.0, 1.5  # median steps to SOLVED over the Transformer's: at least, at most
PATTERN = ("recurrent", "recurrent", "attention", "recurrent", "recurrent")  # section 6.2: attention in block 3


@dataclass(frozen=True)
class Size:
    task: SelectiveCopying
    window: int
    rows: int
    sweep_steps: int
    steps: int
    every: int
    held_out_rows: int


SIZES = {
    "smoke": Size(SelectiveCopying(length=24, data=2), 12, 8, 20, 40, 20, 16),
    "cpu": Size(SelectiveCopying(length=128, data=8), 64, 32, 400, 3000, 50, 256),
    "gpu": Size(SelectiveCopying(length=512, data=16), 256, 64, 3000, 30_000, 100, 256),
}


def run(session: Session) -> None:
    size = SIZES[session.scale]
    session.total = len(FAMILIES) * (len(LEARNING_RATES) + session.num_seeds - 1)
    steps = size.sweep_steps
    chosen = sweep(session, FAMILIES, lambda family, rate: _run(size, family, rate, 0, steps), steps)
    session.done, session.total = 0, len(FAMILIES) * session.num_seeds
    for seed in range(session.num_seeds):
        for family in FAMILIES:
            session.train(_run(size, family, chosen[family], seed, size.steps))


def _run(size: Size, family: str, rate: float, seed: int, steps: int) -> Run:
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
    source = TaskSource(
        task=size.task,
        rows=size.rows,
        seed=seed,
        held_out={"accuracy": size.task},
        held_out_rows=size.held_out_rows,
    )
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
    return Run(
        key=f"{family} lr={rate:g} seed={seed}",
        config=config,
        source=source,
        about={"family": family, "learning_rate": rate, "seed": seed, "parameters": model.num_parameters()},
        segment=4 * size.every if steps > 4 * size.every else size.every,
        enough=lambda lines: steps_to(lines, SOLVED) is not None,
    )


def finals(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The runs of each family at its chosen learning rate, by seed: those that solved it or ran to the end."""
    steps = SIZES[results["scale"]].steps
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for entry in sorted(results["runs"].values(), key=lambda entry: entry["seed"]):
        ended = entry["ended_early"] or entry["steps"] >= steps
        if ended and entry["learning_rate"] == choice(results, entry["family"]):
            found[entry["family"]].append(entry)
    return found


def choice(results: Results, family: str) -> float | None:
    """The sweep's learning rate; None while the sweep lacks a run."""
    sweep = {
        entry["learning_rate"]: entry
        for entry in results["runs"].values()
        if entry["family"] == family and entry["seed"] == 0
    }
    if len(sweep) < len(LEARNING_RATES):
        return None
    return best_learning_rate(sweep, SIZES[results["scale"]].sweep_steps)


def verdict(results: Results) -> list[Claim]:
    runs = finals(results)
    enough = results["scale"] != "smoke" and all(len(entries) >= 3 for entries in runs.values())
    reached = {family: [steps_to(entry["history"], SOLVED) for entry in runs[family]] for family in FAMILIES}
    middle = {family: median_or_none(steps) if steps else None for family, steps in reached.items()}
    steps = {family: ", ".join(number(step, 0) for step in reached[family]) or "none yet" for family in FAMILIES}
    claims = [
        judge(
            "all three families solve selective copying",
            f"token accuracy >= {SOLVED:.0%} in the median of 3 seeds",
            "; ".join(f"{NAMES[family]} at step {steps[family]}" for family in FAMILIES),
            all(value is not None for value in middle.values()) if enough else None,
        )
    ]
    for family, text, bound, sign in (
        ("hawk", "Hawk learns it more slowly", HAWK_SLOWER, ">="),
        ("griffin", "Griffin learns it about as fast as the Transformer", GRIFFIN_SLOWER, "<="),
    ):
        ratio, holds = None, None
        if enough and middle[family] is not None and middle["transformer"] is not None:
            ratio = middle[family] / middle["transformer"]
            holds = ratio >= bound if sign == ">=" else ratio <= bound
        elif enough:  # one never reached it
            holds = (sign == ">=") == (middle[family] is None)
        measured = "not both reached" if ratio is None else f"{ratio:.2f} times"
        claims.append(
            judge(text, f"median steps to {SOLVED:.0%} {sign} {bound:g} times the Transformer's", measured, holds)
        )
    return claims


def show_table(results: Results) -> str:
    rows = []
    for family, entries in finals(results).items():
        for entry in entries:
            last = entry["history"][-1]
            rows.append(
                [
                    NAMES[family],
                    f"{entry['parameters']:,}",
                    f"{entry['learning_rate']:g}",
                    entry["seed"],
                    number(steps_to(entry["history"], 0.5), 0),
                    number(steps_to(entry["history"], SOLVED), 0),
                    f"{last['accuracy']:.3f} at {last['step']:,}",
                    f"{entry['cpu_seconds']:.0f}",
                ]
            )
    header = ["model", "parameters", "learning rate", "seed", "steps to 50%", "steps to 99%", "accuracy", "CPU s"]
    return table(header, rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    with figure(file, "selective copying: accuracy on held-out rows") as axes:
        for family, entries in finals(results).items():
            for index, entry in enumerate(entries):
                axes.plot(
                    [line["step"] for line in entry["history"]],
                    [line["accuracy"] for line in entry["history"]],
                    color=COLOURS[family],
                    alpha=0.8,
                    label=NAMES[family] if index == 0 else None,
                )
        axes.axhline(SIZES[results["scale"]].task.chance, color="grey", linestyle=":", label="chance")
        axes.set_xlabel("training step")
        axes.set_ylabel("token accuracy")


EXPERIMENT = Experiment(
    label="E1",
    question="Do all three families learn selective copying, and how fast?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
