"""One figure, one file: what every plot here shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError
from griffin.files import whole_file

COLOURS = {"griffin": "#0b6e99", "hawk": "#d9730d", "transformer": "#448361", "nope": "#9065b0", "cg": "#c14c8a"}


@contextmanager
def figure(file: Path, title: str, columns: int = 1) -> Iterator[Any]:
    """Give axes (a list of them for several columns) and write `file`, a PNG.

    Raises:
        GriffinError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GriffinError('plots need matplotlib: pip install "griffin-lm[experiments]"') from error
    drawing = Figure(figsize=(6.4 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = [drawing.add_subplot(1, columns, column + 1) for column in range(columns)]
    drawing.suptitle(title)
    yield axes[0] if columns == 1 else axes
    for each in axes:
        each.grid(alpha=0.3)
        if each.get_legend_handles_labels()[0]:
            each.legend()
    with whole_file(file) as temporary:
        # No date and no version: the same results give the same bytes.
        drawing.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
