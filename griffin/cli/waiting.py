"""Something to look at while a command is busy."""

from __future__ import annotations

from threading import Timer

from rich.console import Console
from rich.text import Text

from griffin.errors import printable

SLOW_S = 2.0  # what takes longer shows what it is at


class Waiting:
    """Say on stderr, if it is a terminal, what is being waited for, once that has taken two seconds.

    Args:
        what: is being done.
    """

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._what, self._status = what, console.status(_plain(what))
        self._timer = Timer(SLOW_S, self._status.start)
        self._timer.daemon = True
        if console.is_terminal:
            self._timer.start()

    def progress(self, done: int, total: int) -> None:
        self.update(f"{self._what}: {done:,} of {total:,}")

    def update(self, what: str) -> None:
        self._status.update(_plain(what))

    def stop(self) -> None:
        """Take it off the screen. Further calls change nothing."""
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()
        self._status.stop()


def _plain(text: str) -> Text:
    return Text(printable(text))  # a folder's name is no markup
