"""What a person sees of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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

from griffin.data.text import Report

PATIENCE_S = 2.0  # what takes longer shows how far it is


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
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """Give a `Report` that shows a bar for what takes longer than PATIENCE_S."""
    bar = Progress(
        TextColumn("{task.description}"),
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
