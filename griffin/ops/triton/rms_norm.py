"""y = x rstd (1 + weight), rstd = 1 / sqrt(mean(x^2) + eps); contract in griffin/ops/norm.py.

A row is one block of a program, so D is at most what the op's file allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.cpu.library import empty_like

_PROGRAMS = 512  # at most, of a backward pass: each sums dweight over its rows; to be tuned on a device


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Give y, and for its gradient x, the weight and 1 / sqrt(mean(x^2) + eps) of each row."""
    y, rstd, D = empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32), weight.shape[0]
    block = triton.next_power_of_2(D)
    with torch.cuda.device_of(x):
        _norm_forward[(rstd.numel(),)](
            x.contiguous(), weight.contiguous(), y, rstd, D, eps, BLOCK=block, num_warps=_warps(block)
        )
    return y, (x, weight, rstd)


def rms_norm_backward(needed: object, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, D, num_rows = empty_like(x), weight.shape[0], rstd.numel()
    block, rows = triton.next_power_of_2(D), max(1, triton.cdiv(num_rows, _PROGRAMS))
    shares = rstd.new_empty(triton.cdiv(num_rows, rows), D)  # each program's dweight
    inputs = (dy.contiguous(), x.contiguous(), weight.contiguous(), rstd)
    with torch.cuda.device_of(x):
        _norm_backward[(shares.shape[0],)](*inputs, dx, shares, num_rows, rows, D, BLOCK=block, num_warps=_warps(block))
    return dx, shares.sum(dim=0).to(weight.dtype)


def _warps(block: int) -> int:
    """16 elements a thread, so that a row and what is made of it stay in registers; to be tuned on a device."""
    return min(16, max(1, block // 512))


@triton.jit
def _norm_forward(x, weight, y, rstd, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    value = tl.load(x + row * D + c, mask=c < D, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    tl.store(rstd + row, scale)
    tl.store(y + row * D + c, (value * scale * (1.0 + w)).to(y.dtype.element_ty), mask=c < D)


@triton.jit
def _norm_backward(dy, x, weight, rstd, dx, shares, num_rows, rows, D, BLOCK: tl.constexpr):
    """With n = x rstd and u = dy (1 + weight):  dx = rstd (u - n mean(u n)),  dweight = sum over rows of dy n.

    Program p takes rows p * rows up to the next program's, and gives their dweight to shares[p].
    """
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * rows, tl.minimum(num_rows, (program + 1) * rows)):
        flow = tl.load(dy + row * D + c, mask=c < D, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normed = tl.load(x + row * D + c, mask=c < D, other=0.0).to(tl.float32) * scale
        u = flow * (1.0 + w)
        mean = tl.sum(u * normed, axis=0) / D
        tl.store(dx + row * D + c, (scale * (u - normed * mean)).to(dx.dtype.element_ty), mask=c < D)
        share += flow * normed
    tl.store(shares + program * D + c, share, mask=c < D)
