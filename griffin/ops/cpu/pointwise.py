"""Calls of the kernels that treat each token or element by itself. Contracts are those of the ops of the same names."""

from __future__ import annotations

from torch import Tensor

from griffin.ops.cpu.library import Kernel, empty_like, fp32

_NORM_ROWS = 16  # rows of one backward task, as in csrc/rms_norm.cpp

_rms_norm_forward = Kernel("rms_norm_forward", "pp pp ii f")
_rms_norm_backward = Kernel("rms_norm_backward", "pppp ppp ii")
_geglu_forward = Kernel("geglu_forward", "pp p i")
_geglu_backward = Kernel("geglu_backward", "ppp pp i")
_rope = Kernel("rope", "ppp p iiii i")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give y and 1 / sqrt(mean(x^2) + eps) of each row."""
    w, D = fp32(weight), weight.shape[0]
    y, rstd = empty_like(x), w.new_empty(x.shape[:-1])
    _rms_norm_forward(x.dtype, x.contiguous(), w, y, rstd, rstd.numel(), D, eps)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    w, D, rows = fp32(weight), weight.shape[0], rstd.numel()
    dx, dweight = empty_like(x), empty_like(w)
    shares = w.new_empty((rows + _NORM_ROWS - 1) // _NORM_ROWS, D)  # scratch: each task's dweight
    _rms_norm_backward(x.dtype, dy.contiguous(), x.contiguous(), w, rstd, dx, shares, dweight, rows, D)
    return dx, dweight.to(weight.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    y = empty_like(gate)
    _geglu_forward(gate.dtype, gate.contiguous(), up.contiguous(), y, gate.numel())
    return y


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_like(gate), empty_like(up)
    inputs = (dy.contiguous(), gate.contiguous(), up.contiguous())
    _geglu_backward(gate.dtype, *inputs, dgate, dup, gate.numel())
    return dgate, dup


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    y, (B, T, H, K) = empty_like(x), x.shape
    _rope(x.dtype, x.contiguous(), fp32(cos), fp32(sin), y, B * T, H, K, cos.shape[-1], inverse)
    return y
