"""Documents to rows: concatenated and split, so that every token is used; a document's start is a reset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from griffin.data.shards import Shard
from griffin.loss import NOT_COUNTED


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward pass."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, the next token of the same document, or NOT_COUNTED
    positions: Tensor  # (B, T) int64, offset since the document's or the row's start; 0 resets the model
    reference: Tensor | None = None  # (B,) fp32, log p(row) by the reference model; of preference pairs only

    def to(self, device: torch.device) -> Batch:
        reference = None if self.reference is None else self.reference.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), self.positions.to(device), reference)


def count_rows(shard: Shard, row_tokens: int) -> int:
    """How many rows hold all tokens; the last one may be filled up."""
    return -(-shard.meta.num_tokens // row_tokens)


def pack(shard: Shard, rows: Sequence[int], row_tokens: int) -> Batch:
    """Cut rows out of the documents laid end to end: row r holds the tokens r * T .. (r + 1) * T - 1.

    A row reads nothing of the row before it: its first position is 0 even inside a document. The target of a row's last
    token is the next row's first, so every token but a document's first is predicted once per epoch. Behind the data's
    end the last row is filled with token 0 at position 0, not counted.

    Args:
        shard: the documents.
        rows: B indices in 0 .. count_rows - 1.
        row_tokens: T.

    Raises:
        ValueError: a row is out of range, or there is none.
    """
    T, num_tokens, num_rows = row_tokens, shard.meta.num_tokens, count_rows(shard, row_tokens)
    if not rows or min(rows) < 0 or max(rows) >= num_rows:
        raise ValueError(f"rows {list(rows)} must be in 0 .. {num_rows - 1}, and at least one")
    tokens, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    targets = np.full((len(rows), T), NOT_COUNTED, dtype=np.int64)
    for b, row in enumerate(rows):
        first = row * T
        length = min(T, num_tokens - first)
        after = shard.tokens[first + 1 : first + length + 1]
        tokens[b, :length] = shard.tokens[first : first + length]
        targets[b, : after.size] = after
        # Documents that start after the row's first token, up to and with the token after the row.
        low, high = np.searchsorted(shard.starts, (first, first + length), side="right")
        starts = shard.starts[low:high] - first
        targets[b, starts - 1] = NOT_COUNTED
        if shard.counted is not None:
            targets[b, : after.size][~shard.counted[first + 1 : first + length + 1]] = NOT_COUNTED
        inside = starts[starts < length]
        document_start = np.zeros(length, dtype=np.int64)
        document_start[inside] = inside
        positions[b, :length] = np.arange(length) - np.maximum.accumulate(document_start)
    return Batch(*(torch.from_numpy(array) for array in (tokens, targets, positions)))
