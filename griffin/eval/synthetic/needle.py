"""A needle in a haystack: one fact at a known depth, asked for at the end; as tokens, and in any text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from griffin.data.packing import Batch
from griffin.eval.synthetic.task import generator, make_batch
from griffin.loss import NOT_COUNTED

DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class Needle:
    """T = length tokens of hay with a marker and `digits` digits in it; the marker again asks for the digits.

    Tokens 0 .. 9 are digits, 10 the marker, 11 .. vocab_size - 1 hay, all drawn evenly. The needle begins at depth *
    (the last place where it fits), rounded down; at a place drawn evenly where depth is None. The row ends with the
    marker and all digits but the last. Targets: there, at each of these tokens the digit that follows, nowhere else.

    Raises:
        ValueError: the sizes do not fit, or depth is not in 0 .. 1.
    """

    length: int = 256
    digits: int = 4
    depth: float | None = None
    vocab_size: int = 64

    def __post_init__(self) -> None:
        if self.digits < 1 or self.length < 2 * (self.digits + 1) or self.vocab_size < DIGITS + 2:
            raise ValueError(
                f"length={self.length} must hold {self.digits} digits and a marker, twice, and vocab_size="
                f"{self.vocab_size} ten digits, the marker and hay"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must be in 0 .. 1, or None")

    @property
    def chance(self) -> float:
        return 1 / DIGITS

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        draws, T, digits = generator(seed, step), self.length, self.digits
        last = T - 2 * digits - 1  # where the needle may begin at the latest: before the marker and digits - 1 digits
        tokens = draws.integers(DIGITS + 1, self.vocab_size, (rows, T))
        secret = draws.integers(0, DIGITS, (rows, digits))
        begins = draws.integers(0, last + 1, rows) if self.depth is None else np.full(rows, int(self.depth * last))
        needle = np.concatenate([np.full((rows, 1), DIGITS), secret], axis=1)
        np.put_along_axis(tokens, begins[:, None] + np.arange(digits + 1), needle, axis=1)
        tokens[:, T - digits :] = needle[:, :-1]
        targets = np.full_like(tokens, NOT_COUNTED)
        targets[:, T - digits :] = secret
        return make_batch(tokens, targets)


def needle_prompt(
    hay: Sequence[int], needle: Sequence[int], question: Sequence[int], *, length: int, depth: float
) -> list[int]:
    """Put a needle into a text of ids: length ids in all, hay, needle, hay, question.

    Args:
        hay: the text, cut where there is enough of it.
        needle: the fact, such as the ids of "The magic number of Lisbon is 4821.".
        question: what the prompt ends with.
        length: ids in all.
        depth: where the needle begins, as a share of the hay: 0 first, 1 right before the question.

    Raises:
        ValueError: there is not enough hay, or length is too short for needle and question.
    """
    count = length - len(needle) - len(question)
    if not 0 <= count <= len(hay):
        raise ValueError(
            f"length={length} with a needle of {len(needle)} and a question of {len(question)} ids needs {count} ids "
            f"of hay; there are {len(hay)}"
        )
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be in 0 .. 1")
    at = int(depth * count)
    return [*hay[:at], *needle, *hay[at:count], *question]
