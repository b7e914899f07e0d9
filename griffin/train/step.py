"""One optimizer step: the arithmetic of training, without its bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from griffin.data.packing import Batch
from griffin.loss import NOT_COUNTED
from griffin.model import Griffin
from griffin.train.objective import Objective


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float  # summed
    count: int  # of what `loss` is a sum: predicted tokens, or pairs
    num_tokens: int  # predicted
    grad_norm: float  # before clipping
    taken: bool  # False: a number was not finite or there was nothing to learn, and nothing has changed


def take_step(
    model: Griffin,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    grad_clip: float,
) -> StepResult:
    """Change what is trained once, by the gradient of the objective's mean over all batches.

    Several batches give what one large batch gives: each sum is divided by the count of all of them. If the loss or the
    gradient's norm is not finite, or nothing counts (weight decay alone would then move the weights), neither weights
    nor optimizer change.

    Args:
        model: the model; gradients that it holds are cleared, before and after.
        objective: what is made small.
        optimizer: with the learning rate of this step.
        batches: on the model's device.
        grad_clip: a longer gradient is scaled to this 2-norm.
    """
    count = sum(map(objective.count, batches))
    num_tokens = sum(int((batch.targets != NOT_COUNTED).sum()) for batch in batches)
    parameters = [*model.parameters(), *objective.parameters()]
    _forget(parameters)
    if not count:
        return StepResult(0.0, 0, 0, 0.0, taken=False)
    sums = []
    for batch in batches:
        loss = objective.loss(model, batch)
        (loss / count).backward()
        sums.append(loss.detach())
    total = float(torch.stack(sums).sum())
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    grad_norm = float(torch.nn.utils.clip_grad_norm_(moved, grad_clip, foreach=True))
    taken = math.isfinite(total) and math.isfinite(grad_norm)
    if taken:
        optimizer.step()
    _forget(parameters)
    return StepResult(total, count, num_tokens, grad_norm, taken)


def _forget(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
