"""geglu: one branch times the GELU of another, as in the gated MLP and at the output of the recurrent block."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device
from griffin.ops.op import differentiable


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
    kernels = device.kernels("geglu", gate, up)
    if kernels is None:
        return F.gelu(gate, approximate="tanh") * up
    return differentiable(kernels.geglu, kernels.geglu_backward, gate, up)
