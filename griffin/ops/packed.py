"""Packed rows: the tokens of B rows laid one after another in a single row of T, without padding.

Row b is tokens offsets[b] .. offsets[b + 1]; it goes on from its own state and leaves its own. Per token nothing
changes: only what runs over time is told the offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor


def check_offsets(offsets: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `offsets` (B + 1,) int64 cut x (1, T, ...), a 0 first, T last, none below the one before.

    Values are checked on a CPU only; on a GPU that would wait for the device.
    """
    if x.shape[0] != 1 or offsets.dim() != 1 or not len(offsets) or offsets.dtype != torch.int64:
        raise ValueError(
            f"x is {tuple(x.shape)} and offsets {tuple(offsets.shape)} {offsets.dtype}; packed rows need (1, T, ...) "
            "and (B + 1,) torch.int64"
        )
    if offsets.device.type == "cpu":
        values = offsets.tolist()
        if values[0] != 0 or values[-1] != x.shape[1] or any(stop < start for start, stop in pairwise(values)):
            raise ValueError(f"offsets {values} must rise from 0 to T={x.shape[1]}")


def rows(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Give each row that has tokens, and which they are. On a GPU this waits for the device."""
    for b, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            yield b, slice(start, stop)


def each_alone(
    run: Callable[[slice, Tensor], tuple[Tensor, Tensor]], state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of every packed op: call it for each row alone.

    Args:
        run: for a row's tokens and its state (1, ...), gives y (1, t, ...) and the state after.
        state: (B, ...) before the rows' first tokens.
        offsets: (B + 1,).

    Returns:
        y: (1, T, ...) of all rows.
        state: (B, ...) after each; of a row without tokens as it was.
    """
    outputs, after = [], list(state.split(1))
    for b, tokens in rows(offsets):
        y, after[b] = run(tokens, after[b])
        outputs.append(y)
    return torch.cat(outputs, dim=1), torch.cat(after)
