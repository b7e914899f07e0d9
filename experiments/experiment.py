"""What every experiments/<question>/run.py gives: EXPERIMENT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.results import Results
from experiments.session import Session
from experiments.verdict import Claim


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question to the papers. All but `run` are functions of the results alone."""

    label: str  # E1 .. E9
    question: str
    run: Callable[[Session], None]  # records into the session; what is recorded already is not run again
    verdict: Callable[[Results], Sequence[Claim]]
    table: Callable[[Results], str]  # Markdown
    plot: Callable[[Results, Path], None]  # writes a PNG
