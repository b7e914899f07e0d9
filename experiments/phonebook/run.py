"""E3. Griffin's figure 6c, for models trained on the task: a number looked up in a book of more and more entries."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from experiments.experiment import Experiment
from experiments.families import FAMILIES, NAMES, paper_config
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.synthetic import LEARNING_RATES, TaskSource, held_out_batches, sweep, train_config
from experiments.verdict import Claim, judge
from griffin import checkpoint
from griffin.eval.synthetic.phonebook import ENTRY, Phonebook
from griffin.eval.synthetic.task import accuracy

# Fixed before any result. Exact matches of the four digits, in the median of the seeds.
TRANSFORMER_KNOWS, TRANSFORMER_FAILS = 0.95, 0.20  # to the training length, and at twice it
GRIFFIN_KNOWS = 0.95  # while the whole prompt is within the window


@dataclass(frozen=True)
class Size:
    task: Phonebook
    width: int
    lru_width: int
    window: int
    rows: int
    sweep_steps: int
    steps: int
    every: int
    tested: tuple[int, ...]  # entries of the books tested
    tested_rows: int


SIZES = {
    "smoke": Size(Phonebook(most=2), 64, 80, 16, 8, 20, 40, 20, (1, 2, 4), 16),
    "cpu": Size(Phonebook(most=12), 64, 80, 48, 32, 500, 4000, 250, (1, 2, 3, 6, 9, 12, 18, 26, 40, 60), 256),
    "gpu": Size(Phonebook(most=30), 128, 160, 64, 64, 2000, 20_000, 500, (1, 2, 4, 5, 10, 20, 30, 44, 60, 120), 512),
}
PATTERN = ("recurrent", "recurrent", "attention", "recurrent", "recurrent", "attention")


def run(session: Session) -> None:
    size = SIZES[session.scale]
    session.total = len(FAMILIES) * (len(LEARNING_RATES) + session.num_seeds - 1)
    steps = size.sweep_steps
    chosen = sweep(session, FAMILIES, lambda family, rate: _run(size, family, rate, 0, steps), steps)
    session.done, session.total = 0, len(FAMILIES) * session.num_seeds
    for seed in range(session.num_seeds):
        for family in FAMILIES:
            each = _run(size, family, chosen[family], seed, size.steps)
            session.train(each, lambda folder: {"entries": test(folder, size)})


def test(folder: Path, size: Size) -> dict[str, float]:
    """Share of books whose whole number is right, by their entries."""
    model = checkpoint.load(folder)
    tasks = {entries: Phonebook(least=entries, most=entries) for entries in size.tested}
    return {str(n): accuracy(model, held_out_batches(task, size.tested_rows)).rows for n, task in tasks.items()}


def prompt_tokens(entries: int) -> int:
    """What comes before the last digit: book, two examples, query, three digits."""
    return ENTRY * (entries + 3) - 1


def _run(size: Size, family: str, rate: float, seed: int, steps: int) -> Run:
    model = paper_config(
        family,
        pattern=PATTERN,
        vocab_size=size.task.vocab_size,
        width=size.width,
        lru_width=size.lru_width,
        num_heads=4,
        num_gate_blocks=4,
        window=size.window,
    )
    source = TaskSource(
        task=size.task, rows=size.rows, seed=seed, held_out={"accuracy": size.task}, held_out_rows=size.tested_rows
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
        segment=size.every,
    )


def finals(results: Results) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for entry in sorted(results["runs"].values(), key=lambda entry: entry["seed"]):
        if "entries" in entry:
            found[entry["family"]].append(entry)
    return found


def verdict(results: Results) -> list[Claim]:
    size, runs = SIZES[results["scale"]], finals(results)
    enough = results["scale"] != "smoke" and all(len(entries) >= 3 for entries in runs.values())
    most, within = size.task.most, [n for n in size.tested if prompt_tokens(n) <= size.window]
    twice = min((n for n in size.tested if prompt_tokens(n) >= 2 * size.task.length), default=size.tested[-1])
    between = [n for n in size.tested if prompt_tokens(n) > size.window and n <= most]

    def at(family: str, entries: int) -> float:
        return median(entry["entries"][str(entries)] for entry in runs[family])

    def claim(text: str, threshold: str, pairs: list[tuple[str, int]], holds: bool | None) -> Claim:
        shown = (f"{NAMES[family]} {at(family, n):.1%} at {n} entries" for family, n in pairs if enough)
        return judge(text, threshold, ", ".join(shown) or "no run yet", holds if enough else None)

    def holds(condition: Any) -> bool | None:
        return condition() if enough else None

    return [
        claim(
            "the Transformer looks up all of the length trained on",
            f"exact match at {most} entries >= {TRANSFORMER_KNOWS:.0%}",
            [("transformer", most)],
            holds(lambda: at("transformer", most) >= TRANSFORMER_KNOWS),
        ),
        claim(
            "the Transformer fails at twice the length",
            f"exact match at {twice} entries < {TRANSFORMER_FAILS:.0%}",
            [("transformer", twice)],
            holds(lambda: at("transformer", twice) < TRANSFORMER_FAILS),
        ),
        claim(
            "Griffin looks up what its window holds",
            f"exact match >= {GRIFFIN_KNOWS:.0%} at {', '.join(map(str, within))} entries (prompts within the window)",
            [("griffin", n) for n in within],
            holds(lambda: all(at("griffin", n) >= GRIFFIN_KNOWS for n in within)),
        ),
        claim(
            "between window and training length Griffin is below the Transformer",
            f"exact match below the Transformer's at {', '.join(map(str, between))} entries",
            [(family, n) for n in between for family in ("griffin", "transformer")],
            holds(lambda: all(at("griffin", n) < at("transformer", n) for n in between)),
        ),
        claim(
            "beyond the training length Griffin is above the Transformer",
            f"exact match at {twice} entries above the Transformer's",
            [("griffin", twice), ("transformer", twice)],
            holds(lambda: at("griffin", twice) > at("transformer", twice)),
        ),
        claim(
            "Hawk forgets with every entry, and is nowhere above Griffin",
            "exact match falls from each tested number of entries to the next (by any amount, or stays), <= Griffin's",
            [("hawk", n) for n in size.tested],
            holds(
                lambda: (
                    all(at("hawk", a) >= at("hawk", b) for a, b in pairwise(size.tested))
                    and all(at("hawk", n) <= at("griffin", n) for n in size.tested)
                )
            ),
        ),
        Claim(
            text="zero-shot phonebook of pre-trained models (the paper's 7B)",
            threshold="no threshold: models of this size score about 0",
            measured="not run: griffin.eval.synthetic.phonebook.phonebook_text makes the prompts",
            outcome="not testable at this scale",
        ),
    ]


def show_table(results: Results) -> str:
    size = SIZES[results["scale"]]
    rows = [
        [NAMES[family], entry["seed"], f"{entry['learning_rate']:g}", f"{entry['parameters']:,}"]
        + [f"{entry['entries'][str(n)]:.3f}" for n in size.tested]
        + [f"{entry['cpu_seconds']:.0f}"]
        for family, entries in finals(results).items()
        for entry in entries
    ]
    return table(["model", "seed", "learning rate", "parameters", *(f"n={n}" for n in size.tested), "CPU s"], rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    size = SIZES[results["scale"]]
    with figure(file, f"phonebook, trained to {size.task.most} entries") as axes:
        for family, entries in finals(results).items():
            for index, entry in enumerate(entries):
                numbers = [prompt_tokens(n) for n in size.tested]
                values = [entry["entries"][str(n)] for n in size.tested]
                label = NAMES[family] if index == 0 else None
                axes.plot(numbers, values, color=COLOURS[family], marker="o", label=label)
        axes.axvline(size.window, color="grey", linestyle="--", label="window")
        axes.axvline(size.task.length, color="grey", linestyle=":", label="training length")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("exact match")


EXPERIMENT = Experiment(
    label="E3",
    question="Who can look up a number in a book, within its window and beyond its training length?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
