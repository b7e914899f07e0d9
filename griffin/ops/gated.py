"""geglu: one branch times the GELU of another, as in the gated MLP and at the output of the recurrent block."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops.cpu import library
from griffin.ops.cpu import pointwise as cpp
from griffin.ops.triton import serve


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Args:
        gate: any shape, bf16, fp16, fp32 or fp64.
        up: as gate.

    Returns:
        As gate; computed in fp32 (fp64 for fp64). The definition rounds gelu and the product to gate.dtype, the
        kernels the product only.

    Gradients for gate and up; only these two are kept for the backward pass.

    Raises:
        ValueError: gate and up differ in shape or dtype.

    Source: GLU variants, arXiv:2002.05202; Griffin, arXiv:2402.19427, sections 2.2 and 2.3.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {tuple(gate.shape)} {gate.dtype}, but up {tuple(up.shape)} {up.dtype}")
    if library.direct(gate, up):
        return cpp.geglu(gate, up)
    return torch.ops.griffin.geglu(gate, up)  # type: ignore[no-any-return]


# Composite, not a custom_op: where no kernel is registered, PyTorch differentiates, fuses and shards the definition.
_library = torch.library.Library("griffin", "FRAGMENT")
_library.define("geglu(Tensor gate, Tensor up) -> Tensor")


@torch.library.impl(_library, "geglu", "CompositeImplicitAutograd")
def _definition(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@torch.library.impl(_library, "geglu", "CPU")
@torch.library.impl(_library, "geglu", "CUDA")
def _without_gradient(gate: Tensor, up: Tensor) -> Tensor:
    kernels = _kernels(gate, up)
    return kernels.geglu(gate, up) if kernels is not None else _definition(gate, up)


@torch.library.impl(_library, "geglu", "AutogradCPU")
@torch.library.impl(_library, "geglu", "AutogradCUDA")
def _with_gradient(gate: Tensor, up: Tensor) -> Tensor:
    kernels = _kernels(gate, up)
    return _GeGLU.apply(kernels, gate, up) if kernels is not None else _definition(gate, up)  # type: ignore[no-untyped-call]


def _kernels(gate: Tensor, up: Tensor) -> ModuleType | None:
    """The file whose geglu and geglu_backward serve these tensors; None is the definition."""
    if serve.serves(gate, up):
        from griffin.ops.triton import geglu as kernels

        return kernels
    return cpp if library.serves(gate, up) else None


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        return kernels.geglu(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, *ctx.kernels.geglu_backward(dy, *ctx.saved_tensors)
