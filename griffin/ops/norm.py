"""rms_norm: each token divided by its root mean square, times 1 + weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device
from griffin.ops.op import differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute y = x / sqrt(mean(x^2) + eps) * (1 + weight) over the last axis.

    Args:
        x: (..., D) bf16, fp16, fp32 or fp64.
        weight: (D,) any floating dtype; zero leaves the scale at 1.
        eps: added to the mean square.

    Returns:
        (..., D) in x.dtype; computed in fp32 (fp64 for fp64) and rounded once.

    Gradients for x and weight.

    Raises:
        ValueError: weight does not fit x.

    Source: RMSNorm, arXiv:1910.07467; 1 + weight as in Google's Gemma and RecurrentGemma.
    """
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"weight is {tuple(weight.shape)}; this x {tuple(x.shape)} needs {tuple(x.shape[-1:])}")
    kernels = device.kernels("rms_norm", x, size=x.shape[-1])
    if kernels is None:
        return _definition(x, weight, eps)
    return differentiable(kernels.rms_norm, kernels.rms_norm_backward, x, weight, eps)


def _definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, 1 + weight.to(dtype), eps).to(x.dtype)
