"""soft_cap: logits kept within a bound, smoothly."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops import device


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Compute cap * tanh(logits / cap); None gives the logits as they are.

    Args:
        logits: any shape and floating dtype.
        cap: the bound.

    Gradient for logits.

    Source: Gemma 2, arXiv:2408.00118, section 2; RecurrentGemma caps at 30.
    """
    if cap is None:
        return logits
    if logits.dtype == torch.float32 and (kernels := device.kernels("soft_cap", logits)) is not None:
        return kernels.soft_cap(logits, cap)
    return cap * torch.tanh(logits / cap)
