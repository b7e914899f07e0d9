"""Rows with padding anywhere, and the same rows with their tokens moved to the left: the form our model takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label that transformers does not count


@dataclass(frozen=True, slots=True)
class Rows:
    """Which columns of B rows hold tokens. The others do not exist: they change no state and no result."""

    lengths: Tensor  # (B,) int64, tokens of each row
    order: Tensor  # (B, T) int64: the column of each row's first, second, ... token; then those of the padding
    latest: Tensor  # (B, T) int64: how many tokens there are up to each column, less one; -1 before the first

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Read a (B, T) mask of bool, True for tokens."""
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        return cls(mask.sum(1), order, mask.cumsum(1) - 1)

    def left(self, values: Tensor) -> Tensor:
        """Move (B, T, ...) values of tokens to the left."""
        return values.gather(1, self._index(self.order, values))

    def back(self, values: Tensor, before: Tensor | None = None) -> Tensor:
        """Put (B, T, D) results back: each column gets the result of the latest token up to it.

        So the last column of a row padded on the right is that of its last token, from which `generate` goes on.

        Args:
            values: (B, T, D), results of the tokens moved to the left.
            before: (B, D), what columns before a row's first token get; None means zeros.
        """
        found = values.gather(1, self._index(self.latest.clamp(min=0), values))
        none_yet = (self.latest < 0)[..., None]
        return found.masked_fill(none_yet, 0) if before is None else torch.where(none_yet, before[:, None], found)

    @staticmethod
    def _index(columns: Tensor, values: Tensor) -> Tensor:
        return columns.view(*columns.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])


def targets(labels: Tensor, rows: Rows | None, starts: Tensor | None) -> Tensor:
    """Say what each column predicts: the label of the next token of its document.

    Args:
        labels: (B, T) int64, what each token is, or IGNORED.
        rows: where there is padding; None: nowhere.
        starts: (B, T) bool, by column: the token begins a document, and nothing predicts it. None: only the first does.

    Returns:
        (B, T) int64, IGNORED where nothing is predicted.

    Raises:
        ValueError: a column of padding has a label.
    """
    if starts is not None:
        labels = labels.masked_fill(starts, IGNORED)
    if rows is None:
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    moved = rows.left(labels)
    columns = torch.arange(labels.shape[1], dtype=torch.int64, device=labels.device)
    if (counted := (columns >= rows.lengths[:, None]) & (moved != IGNORED)).any():
        b, t = (int(i) for i in counted.nonzero()[0])
        raise ValueError(
            f"labels[{b}, {int(rows.order[b, t])}]={int(moved[b, t])} is of a token that attention_mask says is "
            f"padding; set the labels of padding to {IGNORED}"
        )
    following = torch.nn.functional.pad(moved[:, 1:], (0, 1), value=IGNORED)
    return torch.empty_like(labels).scatter_(1, rows.order, following)
