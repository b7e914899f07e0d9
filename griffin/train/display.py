"""What a person sees of a run. It can fail, and the run goes on: what is only shown cannot stop hours of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from griffin.data.sources import Report
from griffin.errors import printable

if TYPE_CHECKING:
    from griffin.data.batches import Lost, Rows
    from griffin.data.prepare import Data
    from griffin.train.config import TrainConfig

MOST_TOKENS = 200  # of an example that is shown
PATIENCE_S = 2.0  # what takes longer shows how far it is


@contextmanager
def going_on(console: Console) -> Iterator[Console]:
    """Let a console lose what its file does not take: the reader has left, the disk is full, the terminal is gone.

    rich ends the process where the reader has left (`| head -1`). An error in making the text, and KeyboardInterrupt,
    pass.
    """
    file = console.file
    console.file = _Undemanding(file)  # type: ignore[assignment]
    try:
        yield console
    finally:
        console.file = file


class _Undemanding:
    """A text file whose writing never fails. All else is the file's."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._try(self._file.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def _try(self, call: Any, *arguments: str) -> None:
        with suppress(OSError, ValueError, RuntimeError):  # ValueError: closed; RuntimeError: a signal while writing
            call(*arguments)


class Display:
    """The progress bar of a run, and lines above it; without a terminal, the lines alone."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[measures]}"),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(
            *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=steps, measures="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_s: float, mfu: float | None) -> None:
        share = "" if mfu is None else f"  {mfu:.0%} MFU"
        self._bar.update(self._task, completed=step, measures=f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s{share}")

    def say(self, text: str) -> None:
        """Print lines. What a model wrote, or somebody called a file, must not drive the terminal."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, text: Text) -> None:
        """Print lines in colour."""
        self._console.print(text, highlight=False, soft_wrap=True)


def describe(data: Data, rows: Rows, lost: Lost | None, config: TrainConfig) -> Text:
    """What examples there are, and three of them as the model reads them: what is learnt in green."""
    import numpy as np  # which --help need not wait for

    train, unit = data.train, 2 if config.objective in ("dpo", "ipo", "orpo") else 1
    meta = train.meta
    counted = meta.num_tokens if train.counted is None else int(np.count_nonzero(train.counted))
    held_out = data.validation.meta.num_documents // unit
    text = Text(
        f"examples   {meta.num_documents // unit:,}{' pairs' if unit == 2 else ''}, {meta.num_tokens:,} tokens, "
        f"{counted / meta.num_tokens:.0%} of them learnt; {held_out:,} to validate on\n"
    )
    if lost is not None:
        filler = f", {lost.filler / (rows.count * config.row_tokens):.1%} of them filler" if lost.filler else ""
        text.append(
            f"rows       {rows.count:,} of {config.row_tokens:,} tokens{filler}; "
            f"{lost.truncated:,} examples truncated, {lost.dropped:,} dropped ({lost.tokens:,} tokens)\n"
        )
    for number in sorted({0, meta.num_documents // 2 // unit * unit, meta.num_documents - unit}):
        text.append(f"--- example {number // unit + 1} ---\n", style="dim")
        first = int(train.starts[number])
        end = min(int(train.starts[number + 1]), first + MOST_TOKENS)
        marked = np.ones(end - first, dtype=np.bool_) if train.counted is None else train.counted[first:end]
        for learnt, group in groupby(range(first, end), key=lambda at: bool(marked[at - first])):
            shown = data.tokenizer.decode(train.tokens[list(group)].tolist(), skip_special=False)
            text.append(printable(shown), style="green" if learnt else "dim")
        text.append("…\n" if end < int(train.starts[number + 1]) else "\n")
    return text


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """Give a `Report` that shows a bar for what takes longer than PATIENCE_S."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not console.is_terminal,
    )
    task = None
    shown = ""
    began = time.monotonic()
    started = False

    def report(what: str, done: int, total: int) -> None:
        nonlocal started, task, shown
        if not started and time.monotonic() - began > PATIENCE_S:
            started = True
            bar.start()
            if not console.is_terminal:
                console.print(f"{what} ...", markup=False)
        if task is None or what != shown:  # with a speed of its own, and maybe no total
            if task is not None:
                bar.remove_task(task)
            task, shown = bar.add_task(what, total=total or None), what
        bar.update(task, completed=done)

    try:
        yield report
    finally:
        if started:
            bar.stop()
