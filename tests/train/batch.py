"""A batch that tests train on."""

from __future__ import annotations

import torch

from griffin import Griffin
from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED


def batch_of(model: Griffin, B: int = 2, T: int = 24) -> Batch:
    """Two documents a row, of which the later tokens are learnt."""
    tokens = torch.randint(0, model.config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(T).expand(B, T) % (T // 2)
    targets = torch.where(positions < 3, NOT_COUNTED, tokens[:, 1:])
    return Batch(tokens[:, :-1].contiguous(), targets, positions.contiguous())
