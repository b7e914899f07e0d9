"""Rows by number, for whatever is trained: text cut anywhere, or examples kept whole in one row each.

An example that fits is never cut: an answer read without its question would teach the model to talk of nothing. Whole
examples are laid into rows best fit first, the longest before the others, so that few tokens are filler; each begins at
position 0, which resets the recurrence, the convolution and attention: a row of many gives what each gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from griffin.data.packing import Batch, count_rows, pack
from griffin.data.shards import Shard
from griffin.errors import GriffinError
from griffin.loss import NOT_COUNTED

Long = Literal["truncate", "drop", "split", "error"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What steps and validation read."""

    count: int  # rows there are
    batch: Callable[[Sequence[int]], Batch]  # rows 0 .. count - 1, by number


class Lost(NamedTuple):
    """What of a shard's examples its rows do not hold."""

    truncated: int  # examples cut at the row's end
    dropped: int  # left out: too long, or nothing to learn within a row's length
    tokens: int  # left out, of both
    filler: int  # places of rows that hold nothing


def stream_rows(shard: Shard, row_tokens: int) -> Rows:
    """Documents laid end to end and cut anywhere: see `griffin.data.packing.pack`."""
    return Rows(count_rows(shard, row_tokens), lambda rows: pack(shard, rows, row_tokens))


def whole_rows(shard: Shard, row_tokens: int, long: Long) -> tuple[Rows, Lost]:
    """As many whole examples to a row as fit.

    Args:
        shard: the examples, each a document. The last token of one is a target and is not read.
        row_tokens: T.
        long: what becomes of an example of more than T + 1 tokens: "truncate" keeps its beginning, "drop" leaves it
            out, "split" makes several of it, each begun anew, and "error" refuses.

    Raises:
        GriffinError: long is "error" and there is such an example; or none is left.
    """
    pieces, lost = _pieces(shard, row_tokens, long)
    order, starts = _best_fit(pieces.sizes, row_tokens)
    filler = (len(starts) - 1) * row_tokens - int(pieces.sizes.sum())
    rows = [order[first:end] for first, end in pairwise(starts)]
    laid = Rows(len(rows), lambda numbers: _lay(shard, pieces, [rows[n] for n in numbers], row_tokens))
    return laid, lost._replace(filler=filler)


def single_rows(shard: Shard, row_tokens: int, long: Long) -> tuple[Rows, Lost]:
    """One example to a row; a batch is as long as its longest. Arguments and errors as `whole_rows`."""
    pieces, lost = _pieces(shard, row_tokens, long)
    return Rows(len(pieces.sizes), lambda numbers: _lay(shard, pieces, [np.array([n]) for n in numbers])), lost


def pair_rows(
    shard: Shard, row_tokens: int, long: Long, reference: npt.NDArray[np.float32] | None = None
) -> tuple[Rows, Lost]:
    """Preference pairs, documents 2 n and 2 n + 1 of the shard: a batch of n has 2 n rows, chosen and rejected in turn.

    Args:
        shard, row_tokens, long: as for `whole_rows`; a pair of which one is left out is left out.
        reference: (documents,) log p of each document's counted tokens by the reference model; None: not known (yet).

    Raises:
        GriffinError: as `whole_rows`.
    """
    if long == "split":
        raise GriffinError("long=split: half an answer cannot be preferred; pairs are truncated or dropped")
    pieces, lost = _pieces(shard, row_tokens, long)
    chosen = pieces.documents % 2 == 0
    both = np.intersect1d(pieces.documents[chosen] // 2, pieces.documents[~chosen] // 2)
    if not len(both):
        raise GriffinError(f"{shard.folder}: no pair fits into row_tokens={row_tokens}; set it higher")
    place = np.full(shard.meta.num_documents, -1, dtype=np.int64)
    place[pieces.documents] = np.arange(len(pieces.documents))

    def batch(numbers: Sequence[int]) -> Batch:
        documents = (2 * both[list(numbers)][:, None] + np.arange(2)).ravel()
        laid = _lay(shard, pieces, [np.array([at]) for at in place[documents]])
        known = None if reference is None else torch.from_numpy(reference[documents])
        return Batch(laid.tokens, laid.targets, laid.positions, known)

    dropped = lost.dropped + len(pieces.documents) - 2 * len(both)
    return Rows(len(both), batch), lost._replace(dropped=dropped)


class _Pieces(NamedTuple):
    """What rows are made of: `sizes` tokens from `firsts` on are read, and the token after each is its target."""

    documents: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


def _pieces(shard: Shard, T: int, long: Long) -> tuple[_Pieces, Lost]:
    starts, sizes = shard.starts[:-1], np.diff(shard.starts) - 1
    documents = np.arange(len(sizes), dtype=np.int64)
    over = sizes > T
    if long == "error" and over.any():
        number = int(np.argmax(over))
        raise GriffinError(
            f"{shard.folder}: example {number} has {int(sizes[number]) + 1:,} tokens, more than "
            f"row_tokens + 1 = {T + 1:,}; set row_tokens higher, or long to truncate, split or drop"
        )
    keep = sizes >= 1
    truncated = 0
    tokens_left = 0
    if long == "drop":
        keep &= ~over
    elif long == "split":
        counts = np.where(over, -(-sizes // T), 1)
        documents = np.repeat(documents, counts)
        part = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = starts[documents] + part * T
        sizes = np.minimum(T, sizes[documents] - part * T)
        over, keep = over[documents], keep[documents]
    else:
        tokens_left = int((sizes[over] - T).sum())
        truncated = int(over.sum())
        sizes = np.minimum(sizes, T)
    if shard.counted is not None:  # every example has something to learn; its beginning, or a piece of it, may not
        for at in np.flatnonzero(over & keep):
            keep[at] = shard.counted[starts[at] + 1 : starts[at] + sizes[at] + 1].any()
    tokens_left += int((sizes[~keep] + 1).sum())
    truncated -= int((over & ~keep).sum()) if truncated else 0
    if not keep.any():
        raise GriffinError(f"{shard.folder}: no example fits into row_tokens={T}; set it higher")
    lost = Lost(truncated, int((~keep).sum()), tokens_left, 0)
    return _Pieces(documents[keep], starts[keep].astype(np.int64), sizes[keep].astype(np.int64)), lost


def _best_fit(sizes: npt.NDArray[np.int64], T: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Lay pieces into rows of T: their order, row after row, and where each row begins in it."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(T + 1)]  # by the room that is left
    there = 0  # bit n: some row has room for n
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = there >> size << size
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                there &= ~(1 << room)
        else:
            room, row = T, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > size:
            open_rows[room - size].append(row)
            there |= 1 << (room - size)
    starts = [0]
    for row_pieces in rows:
        starts.append(starts[-1] + len(row_pieces))
    return np.array([piece for row_pieces in rows for piece in row_pieces], dtype=np.int64), starts


def _lay(shard: Shard, pieces: _Pieces, rows: Sequence[npt.NDArray[np.int64]], row_tokens: int | None = None) -> Batch:
    T = row_tokens or max(int(pieces.sizes[row].sum()) for row in rows)
    tokens, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    targets = np.full((len(rows), T), NOT_COUNTED, dtype=np.int64)
    for b, row in enumerate(rows):
        at = 0
        for first, size in zip(pieces.firsts[row].tolist(), pieces.sizes[row].tolist(), strict=True):
            end = at + size
            tokens[b, at:end] = shard.tokens[first : first + size]
            targets[b, at:end] = shard.tokens[first + 1 : first + size + 1]
            if shard.counted is not None:
                targets[b, at:end][~shard.counted[first + 1 : first + size + 1]] = NOT_COUNTED
            positions[b, at:end] = np.arange(size)
            at = end
    return Batch(*map(torch.from_numpy, (tokens, targets, positions)))
