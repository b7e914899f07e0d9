"""What every experiments/<question>/run.py gives: EXPERIMENT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from experiments.results import FOLDER, Results
from experiments.session import Session
from experiments.verdict import Claim
from griffin.errors import GriffinError


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question to the papers. All but `run` are functions of the results alone, of no runs too."""

    label: str  # E1 .. E9
    question: str
    run: Callable[[Session], None]  # records into the session; what is recorded already is not run again
    verdict: Callable[[Results], Sequence[Claim]]
    table: Callable[[Results], str]  # Markdown
    plot: Callable[[Results, Path], None]  # writes a PNG


def names() -> list[str]:
    """All experiments, E1 first."""
    return sorted((path.parent.name for path in FOLDER.glob("*/run.py")), key=lambda name: load(name).label)


def load(name: str) -> Experiment:
    """Import one.

    Raises:
        GriffinError: there is none of that name.
    """
    if not (FOLDER / name / "run.py").is_file():
        raise GriffinError(f"no experiment {name!r}; there are {', '.join(names())}")
    return import_module(f"experiments.{name}.run").EXPERIMENT
