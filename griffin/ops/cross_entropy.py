"""cross_entropy: nats of the targets under rows of logits, and their gradient in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops import device

NOT_COUNTED = -1  # the target of a token that has nothing to predict


def cross_entropy(
    logits: Tensor, targets: Tensor, cap: float | None, slopes: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Compute logsumexp(c) - c[target] with c = cap tanh(logits / cap), and its gradient in the logits:

        (softmax(c) - onehot(target)) (1 - tanh^2(logits / cap))

    Both are zero for a target that is NOT_COUNTED.

    Args:
        logits: (n, V) fp32 or fp64; may be overwritten.
        targets: (n,) int64 in 0 .. V - 1, or NOT_COUNTED.
        cap: None means c = logits.
        slopes: the dtype of the gradient; None means that it is not wanted.

    Returns:
        nats: (n,) in logits.dtype.
        d_logits: (n, V) in `slopes`, or None.

    PyTorch records no gradient of it: `griffin.loss.cross_entropy` has that.
    """
    if (kernels := device.kernels("cross_entropy", logits)) is not None:
        return kernels.cross_entropy(logits, targets, cap, slopes)
    counted = targets != NOT_COUNTED
    target = targets.clamp(min=0)[:, None]
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    nats = (normalizer - logits.gather(1, target))[:, 0] * counted
    if slopes is None:
        return nats, None
    d_logits = torch.exp(logits - normalizer)
    d_logits.scatter_add_(1, target, d_logits.new_full((), -1.0).expand_as(target))
    if cap is not None:
        d_logits.mul_(logits.div_(cap).square_().neg_().add_(1))  # d tanh = 1 - tanh^2
    d_logits.mul_(counted[:, None])
    return nats, d_logits.to(slopes)
