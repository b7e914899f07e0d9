"""Selective copying: find the data among noise, and say it again in order (Griffin, section 6.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from griffin.data.packing import Batch
from griffin.eval.synthetic.task import generator, make_batch
from griffin.loss import NOT_COUNTED

NOISE = 0


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying:
    """T = length tokens: length - data slots of noise with `data` data tokens among them, then `data` markers.

    Token 0 is noise, vocab_size - 1 the marker, the others are data, drawn evenly. The slots of the data are drawn
    evenly without repetition. Targets: at the k-th marker the k-th data token, nowhere else. The paper's row has 1,024
    tokens (whether with its markers it does not say; here with them) and 16 data tokens.

    Raises:
        ValueError: the data does not fit.
    """

    length: int = 1024
    data: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        if self.data < 1 or 2 * self.data > self.length:
            raise ValueError(f"data={self.data} tokens and as many markers do not fit length={self.length}")
        if self.vocab_size < 4:
            raise ValueError(f"vocab_size={self.vocab_size} must have noise, a marker and two data tokens: at least 4")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        draws, slots = generator(seed, step), self.length - self.data
        where = np.sort(np.argsort(draws.random((rows, slots)), axis=1)[:, : self.data], axis=1)
        data = draws.integers(1, self.vocab_size - 1, (rows, self.data))
        tokens = np.full((rows, self.length), NOISE, dtype=np.int64)
        np.put_along_axis(tokens, where, data, axis=1)
        tokens[:, slots:] = self.vocab_size - 1
        targets = np.full_like(tokens, NOT_COUNTED)
        targets[:, slots:] = data
        return make_batch(tokens, targets)
