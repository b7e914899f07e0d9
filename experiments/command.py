"""`griffin experiment`: one experiment run and written down, or all written down again from their results."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rich.console import Console

from experiments.experiment import Experiment
from experiments.report import write_experiment
from experiments.results import FOLDER
from experiments.session import Scale, Session
from griffin.errors import GriffinError


def names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/run.py"))


def load(name: str) -> Experiment:
    """Import one.

    Raises:
        GriffinError: there is none of that name.
    """
    if name not in names():
        raise GriffinError(f"no experiment {name!r}; there are {', '.join(names())}")
    return import_module(f"experiments.{name}.run").EXPERIMENT


def run(name: str, scale: Scale, num_seeds: int, runs: Path, out: Path | None, console: Console) -> None:
    """Run what the results lack, then write table, verdict and plot."""
    experiment = load(name)
    session = Session.open(name, scale, num_seeds, runs, console, out)
    experiment.run(session)
    for claim in write_experiment(name, experiment, session.results, out):
        session.say(f"{claim.outcome}: {claim.text} ({claim.threshold}): {claim.measured}")
