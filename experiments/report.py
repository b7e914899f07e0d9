"""From results to what is read: plots, each README's table and verdict, docs/experiments.md's summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.experiment import Experiment
from experiments.results import FOLDER, Results
from experiments.verdict import Claim


def write_experiment(name: str, experiment: Experiment, results: Results, out: Path | None) -> Sequence[Claim]:
    folder = FOLDER / name if out is None else out
    experiment.plot(results, folder / f"figure-{results['scale']}.png")
    return experiment.verdict(results)
