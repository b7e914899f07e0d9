"""What a run measures: one JSON line at a time, the same for TensorBoard, and a curve in the terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError, one_line
from griffin.files import whole_file
from griffin.reading import parse_json

METRICS = "metrics.jsonl"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
Line = Mapping[str, float | int]


class Metrics:
    """run/metrics.jsonl, written line by line, and TensorBoard where asked for.

    A line that cannot be written, on a full disk say, is kept and written later, with the next one: it does not end a
    run. TensorBoard, which has the same numbers, is given up at its first error. Both are said.

    Training lines have step, loss (nats per token over the steps since the line before), learning_rate, grad_norm (the
    last step's), tokens and skipped (so far), seconds (of training, so far), tokens_per_s and, where the device's peak
    is known, mfu (of the last step; see `griffin.train.flops`). Validation lines have step, validation_loss (nats per
    token) and validation_bits_per_byte. A number that is not finite is written as null.

    Args:
        run: the run's folder.
        step: where the run goes on; lines after it, which a killed run left, are removed.
        tensorboard: also write run/tensorboard.
        say: told what is lost.

    Raises:
        GriffinError: tensorboard is asked for and not installed.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool, say: Callable[[str], None]) -> None:
        self._say, self._unwritten, self._late = say, b"", False
        self._board = None
        if tensorboard:
            check_tensorboard()
            from torch.utils.tensorboard import SummaryWriter  # an optional dependency

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        file = run / METRICS
        lines, damaged = _read(file)
        for number in damaged:
            say(f"{file}: line {number} is damaged and left out")
        with whole_file(file) as temporary:
            kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
            temporary.write_text(kept, encoding="utf-8")
        self._file = file.open("ab", buffering=0)  # how much of a line was written must be known

    def write(self, line: Line) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._unwritten += (json.dumps(finite) + "\n").encode()
        self._write()
        if self._board is not None:
            try:
                for name, value in line.items():
                    if name != "step":
                        self._board.add_scalar(name, value, line["step"])
            except Exception as error:  # its own thread's, whatever that met
                self._board = None
                self._say(f"TensorBoard is given up: {one_line(error)}")

    def close(self) -> None:
        self._write()
        if self._unwritten:
            self._say(f"{METRICS} lacks its last {self._unwritten.count(10)} lines")
        self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except Exception as error:
                self._say(f"TensorBoard's last numbers are lost: {one_line(error)}")

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._late = False
        except OSError as error:
            if not self._late:
                self._say(f"{METRICS} cannot be written now, and will be later: {one_line(error)}")
            self._late = True


def check_tensorboard() -> None:
    """Raise GriffinError if it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise GriffinError('tensorboard=true needs a package: pip install "griffin-lm[train]"')


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the lines; damaged ones, and a last one that a kill cut short, are left out. No file has no lines."""
    return _read(file)[0]


def _read(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines, and the numbers, from 1, of damaged ones: a line that does not end is not damaged, but cut short."""
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    content = io.BytesIO(file.read_bytes() if file.exists() else b"")
    for number, data in enumerate(content, start=1):  # a line feed ends a line, and nothing else
        if not data.endswith(b"\n"):
            continue
        try:
            line = parse_json(data.decode(), str(file))
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                raise GriffinError("no line of metrics")
        except (GriffinError, UnicodeDecodeError):
            damaged.append(number)
        else:
            lines.append(line)
    return lines, damaged


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
