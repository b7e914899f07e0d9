"""How well a model predicts text: nats of packed rows, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from griffin.data.batches import Rows, stream_rows
from griffin.data.packing import Batch
from griffin.data.shards import Shard
from griffin.errors import GriffinError
from griffin.loss import NOT_COUNTED, bits_per_byte, cross_entropy
from griffin.model import Griffin
from griffin.state import State
from griffin.tokenizer import Tokenizer


def nats(model: Griffin, batch: Batch, state: State | None = None) -> Tensor:
    """Sum over the counted tokens of packed rows of -log p(token | its document so far): () fp32, with a gradient.

    With a state, each row is one document that goes on from its row of the state, which is advanced.
    """
    hidden = model(batch.tokens, positions=batch.positions) if state is None else model(batch.tokens, state)
    return cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)[0]


def row_nats(model: Griffin, batch: Batch) -> Tensor:
    """The same by row: (B,) fp32. Where the embedding is trained, each row keeps a gradient of its size."""
    hidden, embedding = model(batch.tokens, positions=batch.positions), model.embedding
    cap = model.config.logits_soft_cap
    rows = [
        cross_entropy(hidden[row : row + 1], embedding, batch.targets[row : row + 1], soft_cap=cap)[0]
        for row in range(len(hidden))
    ]
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Validation:
    """A fixed set of rows: the same ones every time, spread evenly over a shard."""

    batches: list[Batch]
    num_tokens: int  # predicted
    num_bytes: int  # of the text that the predicted tokens stand for

    @classmethod
    def of(
        cls,
        shard: Shard,
        tokenizer: Tokenizer,
        *,
        num_rows: int,
        row_tokens: int,
        batch_rows: int,
        device: torch.device,
    ) -> Validation:
        rows = stream_rows(shard, row_tokens)
        return cls.over(rows, tokenizer, num_rows=num_rows, batch_rows=batch_rows, device=device, where=shard.folder)

    @classmethod
    def over(
        cls,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        num_rows: int,
        batch_rows: int,
        device: torch.device,
        where: Path,
    ) -> Validation:
        num_rows = min(num_rows, rows.count)
        chosen = [index * rows.count // num_rows for index in range(num_rows)]
        batches = [rows.batch(chosen[at : at + batch_rows]) for at in range(0, num_rows, batch_rows)]
        predicted = [batch.targets[batch.targets != NOT_COUNTED].tolist() for batch in batches]
        num_bytes = sum(tokenizer.token_bytes(ids) for ids in predicted)
        if not num_bytes:
            raise GriffinError(f"{where}: the text to validate on has nothing to predict; give more of it")
        return cls([batch.to(device) for batch in batches], sum(map(len, predicted)), num_bytes)

    @torch.no_grad()
    def measure(self, model: Griffin, loss: Callable[[Griffin, Batch], Tensor] = nats) -> tuple[float, float]:
        """Give nats per token and bits per byte of text; an end of document is predicted too and has no bytes.

        `loss` gives the sum of nats of a batch.
        """
        total = math.fsum(float(loss(model, batch)) for batch in self.batches)
        return total / self.num_tokens, bits_per_byte(total, self.num_bytes)
