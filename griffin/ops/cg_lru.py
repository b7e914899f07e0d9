"""cg_lru: the Complex-Gated Linear Recurrent Unit after its gate matmuls: a definition over `linear_scan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops.rg_lru import LEAST, C
from griffin.ops.scan import accumulation_dtype, linear_scan


def cg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    recurrent_angle: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    max_sqrt_gradient: float | None = 1000.0,
    unscaled_first_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the gated recurrence of complex numbers, x~ = x[:R/2] + i x[R/2:], given the gates before their sigmoids.

        r_t = sigmoid(recurrent_gate_t), i_t = sigmoid(input_gate_t), real
        log |a_t| = -8 r_t softplus(recurrent_param),  arg a_t = r_t recurrent_angle
        h~_t = a_t h~_{t-1} + sqrt(1 - |a_t|^2) (i_t x~_t);  y_t = [Re h~_t, Im h~_t]
        at a reset: h~_t = i_t x~_t if unscaled_first_token, else sqrt(1 - |a_t|^2) (i_t x~_t)

    With the angle turned so far, A_t = sum of arg a_s, and h~_t = exp(i A_t) g_t, two real recurrences are left:
    g_t = |a_t| g_{t-1} + exp(-i A_t) (h~'s input). A is summed in fp64 from the first token of the call on, so that it
    is as exact after a million tokens.

    Args:
        x: (B, T, R), R even; bf16, fp16, fp32 or fp64. All arithmetic is in fp32 (fp64 for fp64).
        input_gate, recurrent_gate: (B, T, R / 2) in x.dtype. A recurrent_gate of -inf passes the state unchanged.
        recurrent_param: (R / 2,) as in `rg_lru`.
        recurrent_angle: (R / 2,) radians at r = 1: the paper's c theta.
        h0: (B, R) fp32 (fp64 for fp64), [Re, Im] of the state before the first token; None means zeros.
        reset: (B, T) bool, True where a document starts; None means nowhere.
        max_sqrt_gradient: bound of the derivative of the square root in the backward pass; None means no bound.
        unscaled_first_token: whether the factor of a reset token is 1.

    Returns:
        y: (B, T, R) in x.dtype.
        h_last: (B, R) fp32 (fp64 for fp64), before rounding.

    Raises:
        ValueError: R is odd, or shapes disagree.

    Source: Griffin, arXiv:2402.19427, appendix B.
    """
    half = x.shape[-1] // 2
    if x.dim() != 3 or x.shape[2] % 2 or input_gate.shape != (*x.shape[:2], half):
        raise ValueError(f"x {tuple(x.shape)}, input_gate {tuple(input_gate.shape)}: must be (B, T, R), (B, T, R / 2)")
    if recurrent_gate.shape != input_gate.shape or not recurrent_param.shape == recurrent_angle.shape == (half,):
        raise ValueError(
            f"recurrent_gate {tuple(recurrent_gate.shape)}, recurrent_param {tuple(recurrent_param.shape)}, "
            f"recurrent_angle {tuple(recurrent_angle.shape)}: must be {tuple(input_gate.shape)}, ({half},), ({half},)"
        )
    dtype = accumulation_dtype(x)
    r = torch.sigmoid(recurrent_gate.to(dtype))
    log_a = r * (-C * F.softplus(recurrent_param.to(dtype)))  # (B, T, R / 2)
    a, scale = log_a.exp(), _BoundedSqrt.apply(-torch.expm1(2 * log_a), max_sqrt_gradient)  # type: ignore[no-untyped-call]
    if reset is not None:
        a = a.masked_fill(reset[..., None], 0.0)
        scale = scale.masked_fill(reset[..., None], 1.0) if unscaled_first_token else scale
    i = torch.sigmoid(input_gate.to(dtype)) * scale
    real, imaginary = (i * part.to(dtype) for part in x.split(half, dim=2))
    angle = (r.double() * recurrent_angle.double()).cumsum(dim=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    turned_back = torch.cat([real * cos + imaginary * sin, imaginary * cos - real * sin], dim=2)
    g, g_last = linear_scan(turned_back, torch.cat([a, a], dim=2), h0)
    return _turn(g, cos, sin).to(x.dtype), _turn(g_last, cos[:, -1], sin[:, -1])


def _turn(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = g.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


class _BoundedSqrt(torch.autograd.Function):
    """sqrt(v), with a derivative of at most `bound`."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, bound: float | None) -> Tensor:
        ctx.save_for_backward(v)
        ctx.least = max(0.0 if bound is None else bound**-2, LEAST**2)
        return v.sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return grads[0] / (4 * v).clamp_min(ctx.least).sqrt(), None
