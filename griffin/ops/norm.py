"""rms_norm: each token divided by its root mean square, times 1 + weight."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops.cpu import library
from griffin.ops.cpu import pointwise as cpp
from griffin.ops.triton import serve

_TRITON_WIDTH = 8192  # the largest D whose row stays in the registers of one program


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
    if library.direct(x, weight):
        return cpp.rms_norm(x, weight, eps)[0]
    return torch.ops.griffin.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


# Composite, not a custom_op: where no kernel is registered, PyTorch differentiates, fuses and shards the definition.
_library = torch.library.Library("griffin", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")


@torch.library.impl(_library, "rms_norm", "CompositeImplicitAutograd")
def _definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, 1 + weight.to(dtype), eps).to(x.dtype)


@torch.library.impl(_library, "rms_norm", "CPU")
@torch.library.impl(_library, "rms_norm", "CUDA")
def _without_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernels = _kernels(x)
    return kernels.rms_norm(x, weight, eps)[0] if kernels is not None else _definition(x, weight, eps)


@torch.library.impl(_library, "rms_norm", "AutogradCPU")
@torch.library.impl(_library, "rms_norm", "AutogradCUDA")
def _with_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernels = _kernels(x)
    return _RMSNorm.apply(kernels, x, weight, eps) if kernels is not None else _definition(x, weight, eps)  # type: ignore[no-untyped-call]


def _kernels(x: Tensor) -> ModuleType | None:
    """The file whose rms_norm and rms_norm_backward serve this tensor; None is the definition."""
    if serve.serves(x) and x.shape[-1] <= _TRITON_WIDTH:
        from griffin.ops.triton import rms_norm as kernels

        return kernels
    return cpp if library.serves(x) else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = kernels.rms_norm(x, weight, eps)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor, None]:
        return None, *ctx.kernels.rms_norm_backward(dy, *ctx.saved_tensors), None
