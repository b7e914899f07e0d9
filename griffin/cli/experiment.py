"""griffin experiment: one of the papers' claims, measured again."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from griffin.errors import GriffinError


class Scale(StrEnum):
    smoke = "smoke"
    cpu = "cpu"
    gpu = "gpu"


def experiment(
    name: Annotated[str | None, typer.Argument(help="Which one: a folder of experiments/. None: list them.")] = None,
    scale: Annotated[
        Scale, typer.Option(help="smoke: a minute, shows nothing; cpu: hours of one core; gpu: an hour of a large GPU.")
    ] = Scale.cpu,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind. A verdict needs 3.")] = 3,
    runs: Annotated[Path, typer.Option(help="Where checkpoints are kept, to go on from; with --out, there.")] = Path(
        "runs/experiments"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and plot. Default: the experiment's own, as committed.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For those that train on text: a folder with train/, val/ and long/ in it.")
    ] = None,
    docs: Annotated[
        bool, typer.Option("--docs", help="Run nothing: write plots, tables and verdicts anew from the results.")
    ] = False,
) -> None:
    """Run one experiment, or go on with it, and write down its results, plot and verdict.

    What the results hold already is not run again; a run that was stopped or killed goes on from its checkpoint with
    the same command. Experiments are part of a checkout of the source, not of the installed package.

    Examples:

        griffin experiment

        griffin experiment selective_copying --scale smoke --out /tmp/try

        griffin experiment induction_heads --seeds 3

        griffin experiment --docs
    """
    root = Path(__file__).parents[2]
    if not (root / "experiments" / "command.py").is_file():
        raise GriffinError(
            f"no experiments in {root}: they come with the source; clone the repository, pip install -e . there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    command = import_module("experiments.command")
    console = Console(highlight=False)
    if docs:
        command.write_docs(console)
    elif name is None:
        command.show(console)
    else:
        command.run(name, scale.value, seeds, runs if out is None else out / "runs", out, data, console)
