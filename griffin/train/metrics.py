"""What a run measures: one JSON line at a time, the same for TensorBoard, and a curve in the terminal."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError
from griffin.files import whole_file

METRICS = "metrics.jsonl"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
Line = Mapping[str, float | int]


class Metrics:
    """run/metrics.jsonl, flushed line by line, and TensorBoard where asked for.

    Training lines have step, loss (nats per token over the steps since the line before), learning_rate, grad_norm (the
    last step's), tokens and skipped (so far), seconds (of training, so far), tokens_per_s and, where the device's peak
    is known, mfu (of the last step; see `griffin.train.flops`). Validation lines have step, validation_loss (nats per
    token) and validation_bits_per_byte. A number that is not finite is written as null.

    Args:
        run: the run's folder.
        step: where the run goes on; lines after it, which a killed run left, are removed.
        tensorboard: also write run/tensorboard.

    Raises:
        GriffinError: tensorboard is asked for and not installed.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        self._board = None
        if tensorboard:
            if importlib.util.find_spec("tensorboard") is None:
                raise GriffinError('tensorboard=true needs a package: pip install "griffin-lm[train]"')
            from torch.utils.tensorboard import SummaryWriter  # an optional dependency

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        file = run / METRICS
        kept = [line for line in read_metrics(file) if line["step"] <= step]
        with whole_file(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = file.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines; a last one that a kill cut short is left out, as is everything where there is no file."""
    lines: list[dict[str, Any]] = []
    if not file.exists():
        return lines
    for text in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def curve(lines: Sequence[Mapping[str, Any]], width: int, height: int = 16) -> str:
    """Draw the training and validation loss over the steps, or say what is missing to do so."""
    if importlib.util.find_spec("plotext") is None:
        return 'for the loss curve here: pip install "griffin-lm[train]"'
    import plotext  # an optional dependency

    figure = plotext.figure.clear()
    figure.plot_size(min(width, 100), height)
    figure.theme("colorless")
    drawn = False
    for name, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            marker = "braille" if name == "loss" else "o"
            signal = figure.signal(list(steps), list(values), marker=marker)
            figure.draw((signal.lines() if name == "loss" else signal).label(label))
            drawn = True
    if not drawn:
        return ""
    last = max(line["step"] for line in lines)
    ticks = [last * part // 4 for part in range(5)]
    figure.ruler("x").ticks(ticks, [f"{tick:,}" for tick in ticks])
    figure.legend(x=min(width, 100) - 24)  # out of the way of a curve that falls
    figure.title("loss, nats per token")
    figure.label("step", "x")
    return _ANSI.sub("", str(figure.build()))
