"""Stopping: one signal ends the run after the current step, a second one at once; one process per run folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from griffin.errors import GriffinError


@dataclass
class Stop:
    requested: bool = False


@contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into `Stop.requested`; the second does what it does elsewhere.

    Signals reach the main thread only; in another one nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for each, handler in before.items():
            signal.signal(each, handler)
        say("stopping after this step; press Ctrl-C again to stop at once")

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold the run folder; the hold ends with the process, however it ends.

    Raises:
        GriffinError: another process holds it.
    """
    try:
        import fcntl  # absent on Windows, where two processes in one folder are not noticed
    except ImportError:
        yield
        return
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GriffinError(f"another process is training in {run}; wait for it or choose another --run") from None
        yield
