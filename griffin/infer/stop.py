"""Stop strings: text goes through a gate that holds back what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopGate:
    """Pass text on up to the first stop string, which is never passed, nor any part of it.

    First is the one that ends first, and of those the longest, so that the pieces in which text arrives change nothing.

    Args:
        stops: the strings.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError(f"stop={list(stops)} holds an empty string; every text would end at once")
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that is certain to come before any stop string. After one, `stopped` is true."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    @property
    def held(self) -> int:
        """How many characters are held back."""
        return len(self._held)

    def finish(self) -> str:
        """Return what was held back: nothing more comes, so it was no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
