"""How well a model predicts text: nats of packed rows, bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.data.packing import Batch, count_rows, pack
from griffin.data.shards import Shard
from griffin.errors import GriffinError
from griffin.loss import NOT_COUNTED, bits_per_byte, cross_entropy
from griffin.model import Griffin
from griffin.tokenizer import Tokenizer


def nats(model: Griffin, batch: Batch) -> Tensor:
    """Sum over the counted tokens of packed rows of -log p(token | its document so far): () fp32, with a gradient."""
    hidden = model(batch.tokens, positions=batch.positions)
    return cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)[0]


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
        there = count_rows(shard, row_tokens)
        num_rows = min(num_rows, there)
        rows = [index * there // num_rows for index in range(num_rows)]
        batches = [pack(shard, rows[at : at + batch_rows], row_tokens) for at in range(0, num_rows, batch_rows)]
        predicted = [batch.targets[batch.targets != NOT_COUNTED].tolist() for batch in batches]
        num_bytes = sum(tokenizer.token_bytes(ids) for ids in predicted)
        if not num_bytes:
            raise GriffinError(f"{shard.folder}: the text to validate on has nothing to predict; give more of it")
        return cls([batch.to(device) for batch in batches], sum(map(len, predicted)), num_bytes)

    @torch.no_grad()
    def measure(self, model: Griffin) -> tuple[float, float]:
        """Give nats per token and bits per byte of text; an end of document is predicted too and has no bytes."""
        total = math.fsum(float(nats(model, batch)) for batch in self.batches)
        return total / self.num_tokens, bits_per_byte(total, self.num_bytes)
