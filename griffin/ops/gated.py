"""geglu: one branch times the GELU of another, as in the gated MLP and at the output of the recurrent block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops.cpu import library
from griffin.ops.cpu import pointwise as cpp


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu(gate) * up with gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    Args:
        gate: any shape, bf16, fp16, fp32 or fp64.
        up: as gate.

    Returns:
        As gate; computed in fp32 (fp64 for fp64). The definition rounds gelu and the product to gate.dtype, the CPU's
        kernel the product only.

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
def _cpu(gate: Tensor, up: Tensor) -> Tensor:
    return cpp.geglu(gate, up) if library.serves(gate, up) else _definition(gate, up)


@torch.library.impl(_library, "geglu", "AutogradCPU")
def _autograd_cpu(gate: Tensor, up: Tensor) -> Tensor:
    return _GeGLU.apply(gate, up) if library.serves(gate, up) else _definition(gate, up)  # type: ignore[no-untyped-call]


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return cpp.geglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return cpp.geglu_backward(dy, *ctx.saved_tensors)
