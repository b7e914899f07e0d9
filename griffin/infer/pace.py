"""How much of the prompts a turn reads: as much as the rows that decode can wait for, shared out fairly."""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEAST = 16  # tokens of a chunk: less would take as long
_FIRST = 64  # before anything has been measured


class Pace:
    """Chooses the chunk from what chunks and steps have taken so far.

    Args:
        gap: seconds that may pass between two tokens of a row: a chunk and a step. Infinite: prompts come first, in
            whole chunks.
        chunk: the most tokens of a prompt read at once, and of all prompts while gap is finite.
    """

    def __init__(self, gap: float, chunk: int) -> None:
        self.gap, self.chunk = gap, chunk
        self.prompts_first = math.isinf(gap)
        self._step_s = 0.0
        self._chunk_s: dict[int, float] = {}  # by its tokens, rounded up to a power of 2

    def stepped(self, seconds: float) -> None:
        self._step_s = mean(self._step_s or None, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        size = _power(tokens)
        self._chunk_s[size] = mean(self._chunk_s.get(size), seconds)

    def tokens(self, *, decoding: bool) -> int | None:
        """How many tokens the next chunk may have, of all prompts together. None: there is no limit."""
        if self.prompts_first:
            return None
        if not decoding:
            return self.chunk
        if not self._chunk_s:
            return min(_FIRST, self.chunk)
        size = min(_LEAST, self.chunk)
        while 2 * size <= self.chunk and self._expected_s(2 * size) <= self.gap - self._step_s:
            size *= 2
        return size

    def _expected_s(self, size: int) -> float:
        """At most in proportion to a smaller chunk; at most what a larger one took."""
        bounds = [seconds * max(1.0, size / known) for known, seconds in self._chunk_s.items()]
        return min(bounds)


def share(tenants: Sequence[str], wants: Sequence[int], budget: int | None, most: int) -> list[int]:
    """Share `budget` tokens out among prompts that want so many: evenly among tenants, then among each one's prompts.

    Nobody gets more than `most`, and what one does not want others get.
    """
    wants = [min(want, most) for want in wants]
    if budget is None:
        return wants
    mine = {tenant: [i for i, name in enumerate(tenants) if name == tenant] for tenant in dict.fromkeys(tenants)}
    parts = _fill([sum(wants[i] for i in rows) for rows in mine.values()], budget)
    given = [0] * len(wants)
    for rows, part in zip(mine.values(), parts, strict=True):
        for i, count in zip(rows, _fill([wants[i] for i in rows], part), strict=True):
            given[i] = count
    return given


def passes(counts: Sequence[int]) -> list[list[int]]:
    """Put pieces of so many tokens into as few groups as have at most as much padding as text; their indices."""
    groups: list[list[int]] = []
    for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
        group = groups[-1] if groups else []
        text = sum(counts[i] for i in group) + counts[index]
        if group and 2 * text >= (len(group) + 1) * counts[group[0]]:
            group.append(index)
        else:
            groups.append([index])
    return groups


def _fill(wants: Sequence[int], budget: int) -> list[int]:
    """Give each the same, but for those who want less; the earlier ones get what does not divide."""
    given, left = [0] * len(wants), budget
    for place, index in enumerate(sorted(range(len(wants)), key=lambda i: wants[i])):
        given[index] = min(wants[index], -(-left // (len(wants) - place)))
        left -= given[index]
    return given


def mean(before: float | None, now: float) -> float:
    """A running mean; of nothing before, what there is now."""
    return now if before is None else 0.7 * before + 0.3 * now


def _power(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
