"""Calls of the kernels that multiply by a weight matrix. Contracts are those of the ops of the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops.cpu.library import Kernel, empty_like

MOST_ROWS = 16  # rows of x up to which W is read once; beyond, a matrix product does more per byte

_KERNELS = {
    torch.float32: Kernel("linear_fp32", "pp pi p iii"),
    torch.bfloat16: Kernel("linear_bf16", "pp pi p iii"),
}
_GATES = {
    torch.float32: Kernel("gates_fp32", "ppp p iii"),
    torch.bfloat16: Kernel("gates_bf16", "ppp p iii"),
}
_int8 = Kernel("linear_int8", "ppp pi pp iii")
_int4 = Kernel("linear_int4", "ppp pi pp iiii")
_widen_int8 = Kernel("widen_int8", "ppp ii")
_widen_int4 = Kernel("widen_int4", "ppp iiii")

BLOCK, PACKED = 128, 64  # of csrc/quantized.cpp


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, K), N <= MOST_ROWS."""
    (N, K), O = x.shape, weight.shape[0]
    y = x.new_empty(N, O)
    kernel = _KERNELS[weight.dtype]
    kernel(x.dtype, x.contiguous(), weight.contiguous(), *_bias(bias), y, N, K, O)
    return y


def gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, R), weight (N, R / N, R / N), bias (N, R / N), both of one dtype."""
    y, (blocks, width) = empty_like(x), bias.shape
    kernel, rows = _GATES[weight.dtype], x.numel() // (blocks * width)
    kernel(x.dtype, x.contiguous(), weight.contiguous(), bias.contiguous(), y, rows, blocks, width)
    return y


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    (N, K), O = x.shape, weight.shape[0]
    y = x.new_empty(N, O)
    scratch = _scratch(N, -(-K // BLOCK) * BLOCK, BLOCK)
    _int8(x.dtype, x.contiguous(), weight.contiguous(), scale.contiguous(), *_bias(bias), y, scratch, N, K, O)
    return y


def linear_int4(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    (N, K), O = x.shape, weight.shape[0]
    y = x.new_empty(N, O)
    scratch = _scratch(N, 2 * weight.shape[1], group)
    _int4(x.dtype, x.contiguous(), weight.contiguous(), scale.contiguous(), *_bias(bias), y, scratch, N, K, O, group)
    return y


def widen_int8(weight: Tensor, scale: Tensor) -> Tensor:
    wide = torch.empty(weight.shape, dtype=torch.float32)
    _widen_int8(torch.float32, weight.contiguous(), scale.contiguous(), wide, *weight.shape)
    return wide


def widen_int4(weight: Tensor, scale: Tensor, in_width: int, group: int) -> Tensor:
    wide = torch.empty(weight.shape[0], in_width, dtype=torch.float32)
    _widen_int4(torch.float32, weight.contiguous(), scale.contiguous(), wide, *wide.shape, 2 * weight.shape[1], group)
    return wide


def _bias(bias: Tensor | None) -> tuple[Tensor | None, bool]:
    return (None, False) if bias is None else (bias.contiguous(), bias.dtype == torch.bfloat16)


def _scratch(N: int, padded: int, block: int) -> Tensor:
    """What `Whole` of csrc/integers.h needs: per block eight sums and a scale of 4 bytes, per input a number of 2."""
    blocks = padded // block
    return torch.empty(N * (blocks * 36 + padded * 2), dtype=torch.uint8)
