"""Which rows a step reads: a pure function of (seed, step, rank, world), so resuming needs one integer."""

from __future__ import annotations

_MASK = 2**64 - 1
_ROUNDS = 6


def permute(index: int, size: int, key: int) -> int:
    """Give the place of `index` in a permutation of 0 .. size - 1 that `key` chooses.

    A Feistel network over the next power of four, walked until it falls inside: no table, O(1) memory, and on average
    under four rounds trips.

    Raises:
        ValueError: index is not in 0 .. size - 1.
    """
    if not 0 <= index < size:
        raise ValueError(f"index={index} is not in 0 .. {size - 1}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key + round_) ^ right) & mask)
        index = left << half | right
        if index < size:
            return index


def step_rows(num_rows: int, batch_rows: int, step: int, *, seed: int, rank: int = 0, world: int = 1) -> list[int]:
    """Give the rows that `rank` of `world` reads in `step`.

    The ranks' batches laid side by side, step after step, are one endless sequence: every row once per epoch, in a new
    order each epoch. A step may hold the end of one epoch and the beginning of the next.

    Args:
        num_rows: rows of the data set.
        batch_rows: rows that one rank reads in one step.
        step: counted from 0.

    Raises:
        ValueError: num_rows or batch_rows is not positive, step is negative, or rank is not in 0 .. world - 1.
    """
    if num_rows < 1 or batch_rows < 1 or step < 0 or not 0 <= rank < world:
        raise ValueError(f"num_rows={num_rows}, batch_rows={batch_rows}, step={step}, rank={rank} of world={world}")
    first = (step * world + rank) * batch_rows
    rows = []
    for place in range(first, first + batch_rows):
        epoch, index = divmod(place, num_rows)
        rows.append(permute(index, num_rows, _mix(_mix(seed) + epoch)))
    return rows


def _mix(x: int) -> int:
    """Scramble 64 bits (splitmix64's finaliser)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31
