"""What the synthetic tasks have in common: rows from (seed, step), where the loss counts, and how right a model is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED, cross_entropy
from griffin.model import Griffin

Ints = NDArray[np.int64]


class Task(Protocol):
    """One task at one size: a frozen dataclass whose fields say all about its rows."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chance(self) -> float:
        """The accuracy of a guess that knows the rules and not the row."""

    def batch(self, seed: int, step: int, rows: int) -> Batch:
        """Make (rows, T) tokens, a function of (the task's fields, seed, step, rows); targets only where counted."""


def generator(seed: int, step: int) -> np.random.Generator:
    """The source of one batch's draws: other (seed, step), other rows."""
    return np.random.default_rng([seed, step])


def make_batch(tokens: Ints, targets: Ints) -> Batch:
    """(B, T) tokens and targets, each row a document of its own."""
    B, T = tokens.shape
    positions = torch.arange(T, dtype=torch.int64, device="cpu").expand(B, T).contiguous()
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), positions)


def distinct(draws: np.random.Generator, rows: int, population: int, count: int) -> Ints:
    """(rows, count) numbers below `population`, no two alike in a row, in random order, every choice as likely."""
    return np.argsort(draws.random((rows, population)), axis=1)[:, :count].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Accuracy:
    tokens: float  # share of the counted tokens whose likeliest token is right
    rows: float  # share of the rows in which all of them are
    nats: float  # mean loss of a counted token
    num_rows: int


@torch.no_grad()
def accuracy(model: Griffin, batches: Iterable[Batch]) -> Accuracy:
    """Compare the likeliest token with the target wherever the target is counted (targets are the next tokens)."""
    right = tokens = rows_right = rows = 0
    nats = 0.0
    for batch in batches:
        hidden = model(batch.tokens, positions=batch.positions)
        counted = batch.targets != NOT_COUNTED  # (B, T)
        hits = torch.zeros_like(counted)
        hits[counted] = model.logits(hidden[counted]).argmax(-1) == batch.targets[counted]
        total, _ = cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)
        nats += float(total)
        right, tokens = right + int(hits.sum()), tokens + int(counted.sum())
        rows_right, rows = rows_right + int(_all_hit(hits, counted).sum()), rows + len(counted)
    return Accuracy(right / tokens, rows_right / rows, nats / tokens, rows)


def _all_hit(hits: Tensor, counted: Tensor) -> Tensor:
    return (hits | ~counted).all(1) & counted.any(1)
