"""What `griffin experiment` does: run one, list all, or write all down again from their results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from experiments.experiment import load, names
from experiments.report import draw, rewrite_documents
from experiments.results import read_results, results_file
from experiments.session import Scale, Session
from experiments.verdict import overall


def run(
    name: str, scale: Scale, num_seeds: int, runs: Path, out: Path | None, data: Path | None, console: Console
) -> None:
    """Run what the results lack, then write plot, tables and verdict. With `out`, no document is touched."""
    experiment = load(name)
    session = Session.open(name, scale, num_seeds, runs, console, out, data)
    experiment.run(session)
    draw(experiment, session.results, session.file.parent)
    for claim in experiment.verdict(session.results):
        session.say(f"{claim.outcome}: {claim.text} ({claim.threshold}): {claim.measured}")
    if out is None:
        rewrite_documents()


def show(console: Console) -> None:
    """One line for each experiment."""
    for name in names():
        experiment = load(name)
        outcome = overall(experiment.verdict(read_results(results_file(name, "cpu"), name, "cpu")))
        console.print(f"{experiment.label}  {name:20} {outcome:26} {experiment.question}", markup=False, soft_wrap=True)


def write_docs(console: Console) -> None:
    """Draw every plot and write every table anew."""
    for name in names():
        experiment = load(name)
        for scale in ("cpu", "gpu"):
            if (file := results_file(name, scale)).exists():
                draw(experiment, read_results(file, name, scale), file.parent)
    for path in rewrite_documents():
        console.print(f"written: {path}", markup=False, soft_wrap=True)
