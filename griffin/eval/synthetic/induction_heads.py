"""Induction heads: what came after the special token the first time (Griffin, section 6.2; Mamba, appendix E.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from griffin.data.packing import Batch
from griffin.eval.synthetic.task import generator, make_batch
from griffin.loss import NOT_COUNTED


@dataclass(frozen=True, kw_only=True)
class InductionHeads:
    """T = length random tokens, a special one among them once and at the end: say the token that came after it.

    The special token is vocab_size - 1 and stands at p, uniform on 0 .. length - 3, and at length - 1; all others are
    drawn evenly from the rest of the vocabulary. Target: at the last position the token at p + 1, nowhere else.

    Raises:
        ValueError: the row is too short, or the vocabulary too small.
    """

    length: int = 256
    vocab_size: int = 16

    def __post_init__(self) -> None:
        if self.length < 3 or self.vocab_size < 3:
            raise ValueError(f"length={self.length} and vocab_size={self.vocab_size} must each be at least 3")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        draws, special, T = generator(seed, step), self.vocab_size - 1, self.length
        tokens = draws.integers(0, special, (rows, T))
        where = draws.integers(0, T - 2, rows)
        each = np.arange(rows)
        tokens[each, where] = special
        tokens[:, -1] = special
        targets = np.full_like(tokens, NOT_COUNTED)
        targets[:, -1] = tokens[each, where + 1]
        return make_batch(tokens, targets)
