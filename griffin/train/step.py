"""One optimizer step: the arithmetic of training, without its bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED
from griffin.model import Griffin
from griffin.score import nats


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
        loss = nats(model, batch)
        (loss / num_tokens).backward()
        sums.append(loss.detach())
    total = float(torch.stack(sums).sum())
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, grad_clip, foreach=True))
    taken = math.isfinite(total) and math.isfinite(grad_norm)
    if taken:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return StepResult(total, num_tokens, grad_norm, taken)
