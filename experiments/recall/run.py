"""MQAR. Multi-query associative recall in zoology's table form: accuracy by width and by length and pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.experiment import Experiment
from experiments.families import FAMILIES, NAMES, paper_config
from experiments.markdown import table
from experiments.results import Results
from experiments.session import Run, Session
from experiments.synthetic import TaskSource, best_learning_rate, steps_to, train_config
from experiments.verdict import Claim, judge
from griffin.eval.synthetic.mqar import FIGURE_2, MQAR

# Fixed before any result. Griffin's papers make no claim about MQAR; zoology's is that attention solves all of it.
SOLVED = 0.99
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)  # zoology's: four of equal ratio


@dataclass(frozen=True)
class Size:
    tasks: tuple[MQAR, ...]
    widths: tuple[int, ...]
    rows: int
    sweep_steps: int
    steps: int
    every: int
    held_out_rows: int


_TASKS = tuple(MQAR(input_seq_len=length, num_kv_pairs=pairs, random_non_queries=False) for length, pairs in FIGURE_2)
SIZES = {
    "smoke": Size((MQAR(vocab_size=64, input_seq_len=16, num_kv_pairs=2),), (16,), 8, 20, 40, 20, 16),
    "cpu": Size(_TASKS, (64,), 64, 400, 4000, 200, 512),
    "gpu": Size(_TASKS, (64, 128, 256, 512), 256, 1000, 12_800, 400, 3000),
}


def run(session: Session) -> None:
    size = SIZES[session.scale]
    session.total = len(size.tasks) * len(size.widths) * len(FAMILIES) * (len(RATES) + session.num_seeds - 1)
    for task in size.tasks:
        for width in size.widths:
            for family in FAMILIES:
                arm = (size, task, width, family)
                runs = {rate: session.train(_run(*arm, rate, 0, size.sweep_steps)) for rate in RATES}
                rate = best_learning_rate(runs, size.sweep_steps)
                for seed in range(session.num_seeds):
                    session.train(_run(*arm, rate, seed, size.steps))


def _run(size: Size, task: MQAR, width: int, family: str, rate: float, seed: int, steps: int) -> Run:
    T = task.input_seq_len
    model = paper_config(
        family,
        pattern=("recurrent", "attention"),
        vocab_size=task.vocab_size,
        width=width,
        lru_width=width,
        num_heads=max(1, width // 64),
        num_gate_blocks=4,
        window=T // 2,
    )
    source = TaskSource(
        task=task, rows=size.rows, seed=seed, held_out={"accuracy": task}, held_out_rows=size.held_out_rows
    )
    config = train_config(
        model,
        task=str(task),
        learning_rate=rate,
        seed=seed,
        rows=size.rows,
        length=T,
        steps=steps,
        every=size.every,
    )
    about = {"family": family, "width": width, "length": T, "pairs": task.num_kv_pairs, "learning_rate": rate}
    return Run(
        key=f"{family} width={width} T={T} lr={rate:g} seed={seed}",
        config=config,
        source=source,
        about={**about, "seed": seed, "parameters": model.num_parameters()},
        segment=size.every,
        enough=lambda lines: steps_to(lines, SOLVED) is not None,
    )


def accuracies(results: Results, family: str, width: int, task: MQAR) -> list[float]:
    """The last of each seed's run that solved it or went to the end, at the rate of most steps."""
    size = SIZES[results["scale"]]
    runs = [
        entry
        for entry in results["runs"].values()
        if (entry["family"], entry["width"], entry["length"]) == (family, width, task.input_seq_len)
        and (entry["ended_early"] or entry["steps"] >= size.steps)
    ]
    best: dict[int, float] = {}
    for entry in runs:
        best[entry["seed"]] = max(best.get(entry["seed"], 0.0), entry["history"][-1]["accuracy"])
    return [best[seed] for seed in sorted(best)]


def verdict(results: Results) -> list[Claim]:
    size = SIZES[results["scale"]]
    found = {task: [accuracies(results, "transformer", width, task) for width in size.widths] for task in size.tasks}
    there = results["scale"] != "smoke" and all(len(each) >= 3 for values in found.values() for each in values)
    shown = ", ".join(
        f"{max(map(median, values)):.3f} at ({task.input_seq_len}, {task.num_kv_pairs})"
        for task, values in found.items()
        if there
    )
    return [
        judge(
            "attention solves MQAR (zoology's claim; Griffin's papers make none)",
            f"the Transformer's median accuracy at the best width >= {SOLVED:.0%} for every length",
            shown or "no run yet",
            all(max(map(median, values)) >= SOLVED for values in found.values()) if there else None,
        )
    ]


def show_table(results: Results) -> str:
    size = SIZES[results["scale"]]
    rows = []
    for family in FAMILIES:
        for width in size.widths:
            cells = [accuracies(results, family, width, task) for task in size.tasks]
            rows.append([NAMES[family], width, *(", ".join(f"{value:.3f}" for value in each) for each in cells)])
    header = ["sequence mixer", "d_model", *(f"({task.input_seq_len}, {task.num_kv_pairs})" for task in size.tasks)]
    return table(header, rows)


def plot(results: Results, file: Path) -> None:
    from experiments.figure import COLOURS, figure

    size = SIZES[results["scale"]]
    with figure(file, "MQAR: accuracy by input_seq_len") as axes:
        for family in FAMILIES:
            for width in size.widths:
                values = {task.input_seq_len: accuracies(results, family, width, task) for task in size.tasks}
                there = {length: median(each) for length, each in values.items() if each}
                label = f"{NAMES[family]}, {width} wide"
                axes.plot(list(there), list(there.values()), color=COLOURS[family], marker="o", label=label)
        axes.set_xlabel("input_seq_len")
        axes.set_ylabel("accuracy")


EXPERIMENT = Experiment(
    label="MQAR",
    question="How well do the families recall many pairs, in the table form of zoology?",
    run=run,
    verdict=verdict,
    table=show_table,
    plot=plot,
)
