"""One optimizer step, and one measurement: the arithmetic of training, without its bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.data.packing import NOT_COUNTED, Batch, count_rows, pack
from griffin.data.shards import Shard
from griffin.errors import GriffinError
from griffin.loss import bits_per_byte, cross_entropy
from griffin.model import Griffin
from griffin.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class StepResult:
    nats: float  # summed over the tokens predicted
    num_tokens: int  # predicted
    grad_norm: float  # before clipping
    taken: bool  # False: a number was not finite or no token predicted, and nothing has changed


def take_step(
    model: Griffin, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], grad_clip: float
) -> StepResult:
    """Change the weights once, by the gradient of the mean loss over all tokens of all batches.

    Several batches give what one large batch gives: each sum of nats is divided by the number of tokens in all of them.
    If the loss or the gradient's norm is not finite, or no token is predicted (weight decay alone would then move the
    weights), neither weights nor optimizer change.

    Args:
        model: the model; gradients that it holds are cleared, before and after.
        optimizer: with the learning rate of this step.
        batches: on the model's device.
        grad_clip: a longer gradient is scaled to this 2-norm.
    """
    num_tokens = sum(int((batch.targets != NOT_COUNTED).sum()) for batch in batches)
    model.zero_grad(set_to_none=True)
    if not num_tokens:
        return StepResult(0.0, 0, 0.0, taken=False)
    sums = []
    for batch in batches:
        nats = _nats(model, batch)
        (nats / num_tokens).backward()
        sums.append(nats.detach())
    total = float(torch.stack(sums).sum())
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, grad_clip, foreach=True))
    taken = math.isfinite(total) and math.isfinite(grad_norm)
    if taken:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return StepResult(total, num_tokens, grad_norm, taken)


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
        nats = math.fsum(float(_nats(model, batch)) for batch in self.batches)
        return nats / self.num_tokens, bits_per_byte(nats, self.num_bytes)


def _nats(model: Griffin, batch: Batch) -> Tensor:
    hidden = model(batch.tokens, positions=batch.positions)
    return cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)[0]
