"""Stopping: one signal ends the run after the current step, a second one at once; one process per run folder."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from griffin.errors import GriffinError


@dataclass
class Stop:
    signal: int | None = None  # that was received

    @property
    def requested(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP (of a terminal that was closed) into `Stop.signal`.

    The second Ctrl-C or SIGTERM does what it does elsewhere; not the second SIGHUP, as a terminal and its shell each
    send one. Under nohup SIGHUP is ignored, and stays so. Signals reach the main thread only; in another one nothing
    is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:  # SIGHUP once more
            return
        stop.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, before[each])
        say("stopping after this step; press Ctrl-C again to stop at once")

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold the run folder, which is made; the hold ends with the process, however it ends.

    A folder that was made here, and that an error leaves with nothing else in it, is removed again.

    Raises:
        GriffinError: another process holds it.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = run / ".lock"
    with lock.open("w") as file:
        if not _hold(file, lock):
            raise GriffinError(f"another process is training in {run}; wait for it or choose another --run")
        try:
            yield
        except BaseException:
            with suppress(OSError):  # of folders that somebody has put something into
                if [path.name for path in run.iterdir()] == [lock.name]:
                    lock.unlink()
                    for folder in made:
                        folder.rmdir()
            raise


def _hold(file: IO[str], lock: Path) -> bool:
    try:
        import fcntl  # absent on Windows, where two processes in one folder are not noticed
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())  # not one that its holder has just removed
    except OSError:
        return False
