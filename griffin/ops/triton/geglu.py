"""y = gelu_tanh(gate) up, element by element; contract in griffin/ops/gated.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.cpu.library import empty_like

_BLOCK = 1024  # elements of a program, eight a thread; to be tuned on a device


def geglu(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, n = empty_like(gate), gate.numel()
    with torch.cuda.device_of(gate):
        _geglu_forward[(triton.cdiv(n, _BLOCK),)](gate.contiguous(), up.contiguous(), y, n, BLOCK=_BLOCK, num_warps=4)
    return y, (gate, up)


def geglu_backward(needed: object, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup, n = empty_like(gate), empty_like(up), gate.numel()
    inputs = (dy.contiguous(), gate.contiguous(), up.contiguous())
    with torch.cuda.device_of(gate):
        _geglu_backward[(triton.cdiv(n, _BLOCK),)](*inputs, dgate, dup, n, BLOCK=_BLOCK, num_warps=4)
    return dgate, dup


@triton.jit
def _gelu_sigmoid(x):
    """s and 1 - s, where gelu(x) = x/2 (1 + tanh u) = x s, s = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-tl.abs(v))  # at most 1: neither side overflows
    larger, smaller = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(v >= 0, larger, smaller), tl.where(v >= 0, smaller, larger)


@triton.jit
def _geglu_forward(gate, up, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
    s, _ = _gelu_sigmoid(x)
    value = x * s * tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


@triton.jit
def _geglu_backward(dy, gate, up, dgate, dup, n, BLOCK: tl.constexpr):
    """dup = dy gelu(gate);  dgate = dy up gelu'(gate), gelu'(x) = s + x s (1 - s) 2u'."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    flow = tl.load(dy + i, mask=i < n, other=0.0).to(tl.float32)
    x = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
    factor = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    s, rest = _gelu_sigmoid(x)
    slope = s + x * s * rest * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    tl.store(dup + i, (flow * (x * s)).to(dup.dtype.element_ty), mask=i < n)
    tl.store(dgate + i, (flow * factor * slope).to(dgate.dtype.element_ty), mask=i < n)
