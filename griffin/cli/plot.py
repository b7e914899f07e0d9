"""griffin plot: curves of one or several runs as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin.errors import GriffinError

if TYPE_CHECKING:
    from griffin.train.metrics import Line

# What is drawn, each where some run has it: (metric, title).
PANELS = (
    ("loss", "training loss"),
    ("validation_loss", "validation loss"),
    ("validation_bits_per_byte", "validation, bits per byte"),
    ("validation_accuracy", "validation, pairs ranked right"),
    ("learning_rate", "learning rate"),
    ("tokens_per_s", "tokens/s"),
)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="The picture to write, .png, .svg or .pdf.")] = Path("runs.png"),
) -> None:
    """Draw loss, validation, learning rate and throughput over the steps, all runs in one picture.

    Examples:

        griffin plot runs/shakespeare

        griffin plot runs/full runs/lora runs/state --output compared.png
    """
    from griffin.train.metrics import METRICS, read_metrics  # after --help has been answered

    if importlib.util.find_spec("matplotlib") is None:
        raise GriffinError('griffin plot needs a package: pip install "griffin-lm[plot]"')
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise GriffinError(f"--output {output}: a name that ends in .png, .svg or .pdf")
    lines = {}
    for run in runs:
        if not (run / METRICS).is_file():
            raise GriffinError(f"{run} has no {METRICS}: give the folder of a run")
        lines[str(run)] = read_metrics(run / METRICS)
        if not lines[str(run)]:
            raise GriffinError(f"{run / METRICS} has no lines yet; wait for the first")
    draw(lines, output)
    typer.echo(f"{output}: {', '.join(lines)}")


def draw(runs: Mapping[str, Sequence[Line]], output: Path) -> None:
    """Write the picture, whole or not at all; it needs no display."""
    from matplotlib.figure import Figure  # an optional dependency

    from griffin.files import whole_file

    panels = [
        (name, title)
        for name, title in PANELS
        if any(line.get(name) is not None for each in runs.values() for line in each)
    ]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, 2, squeeze=False)
    for axis, (name, title) in zip(axes.flat, panels, strict=False):
        for run, each in runs.items():
            points = [(line["step"], line[name]) for line in each if line.get(name) is not None]
            if points:
                marker = "o" if name.startswith("validation") else None
                axis.plot(*zip(*points, strict=True), label=run, marker=marker, markersize=3, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with whole_file(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:], dpi=120)
