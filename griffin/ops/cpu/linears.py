"""Calls of the kernels that multiply by a weight matrix. Contracts are those of the ops of the same names."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from griffin.ops.cpu import library
from griffin.ops.cpu.library import Kernel, converted, empty_like, fp32

MOST_INPUTS = 2**17  # sums of that many products of two 8-bit numbers fit 32 bits

_KERNELS = {
    torch.float32: Kernel("linear_fp32", "TF E?i T iii"),
    torch.bfloat16: Kernel("linear_bf16", "TH E?i T iii"),
}
_wide = Kernel("linear_wide", "TH E?i F iii")
_add = Kernel("linear_add", "TH E?i F iii")
_transpose = Kernel("transpose", "TH ii")
_GATES = {
    torch.float32: Kernel("gates_fp32", "TFF T iii"),
    torch.bfloat16: Kernel("gates_bf16", "THH T iii"),
}
_int8 = Kernel("linear_int8", "TCF E?i TU iii")
_int4 = Kernel("linear_int4", "TUH E?i TU iiii")
_quantize_int4 = Kernel("quantize_int4", "TF UH iiii")
_split_rows = Kernel("split_rows", "TCCF ii")
_join_rows = Kernel("join_rows", "IFFF? T iiii")
_widen_int8 = Kernel("widen_int8", "CFF ii")
_widen_int4 = Kernel("widen_int4", "UHF iiii")

BLOCK, PACKED = 128, 64  # of csrc/quantized.cpp
_ROWS, _PANEL = 512, 4096  # rows of x and of W of one product of int8: at most 16 MB of sums


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, K), N <= most_rows(...)."""
    (N, K), O = x.shape, weight.shape[0]
    y = x.new_empty(N, O)
    kernel = _KERNELS[weight.dtype]
    kernel(x.dtype, x.contiguous(), weight.contiguous(), *_bias(bias), y, N, K, O)
    return y


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, K) and weight (O, K), both bf16: (N, O) fp32, the sums as they are."""
    (N, K), O = x.shape, weight.shape[0]
    y = torch.empty(N, O, dtype=torch.float32, device="cpu")
    _wide(x.dtype, x.contiguous(), weight.contiguous(), None, False, y, N, K, O)
    return y


def add_linear_(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y += x weight^T, y (N, O) fp32 and contiguous, x and weight bf16."""
    _add(x.dtype, x.contiguous(), weight.contiguous(), None, False, y, *x.shape, weight.shape[0])


def transposed(x: Tensor) -> Tensor:
    """(R, C) fp32 or bf16: (C, R) bf16."""
    to = torch.empty(x.shape[1], x.shape[0], dtype=torch.bfloat16, device="cpu")
    _transpose(x.dtype, x.contiguous(), to, *x.shape)
    return to


def most_rows(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """How many rows of x `linear` takes, because more of them are quicker by PyTorch's products.

    Any number of bf16 with bf16, where the CPU has an instruction for their products. With AVX-512 a tile of W meets
    four rows of x in registers, and many rows pay as well as PyTorch's products do up to some dozens.
    """
    now = library.instructions()
    if x_dtype == weight_dtype == torch.bfloat16 and now == "avx512bf16":
        return sys.maxsize
    return 64 if now.startswith("avx512") else 16


def multiplies_bf16() -> bool:
    """Whether the CPU has an instruction for products of bf16, and these kernels use it."""
    return library.instructions() == "avx512bf16"


def block_diagonal_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, R), weight (N, R / N, R / N), bias (N, R / N), both of one dtype."""
    y, (blocks, width) = empty_like(x), bias.shape
    kernel, rows = _GATES[weight.dtype], x.numel() // (blocks * width)
    kernel(x.dtype, x.contiguous(), weight.contiguous(), bias.contiguous(), y, rows, blocks, width)
    return y


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x, (N, K), O = converted(x, dtype), x.shape, weight.shape[0]
    y = x.new_empty(N, O)
    scratch = _scratch(N, -(-K // BLOCK) * BLOCK, BLOCK)
    _int8(x.dtype, x.contiguous(), weight.contiguous(), scale.contiguous(), *_bias(bias), y, scratch, N, K, O)
    return y


def linear_int4(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    x, (N, K), O = converted(x, dtype), x.shape, weight.shape[0]
    y = x.new_empty(N, O)
    scratch = _scratch(N, 2 * weight.shape[1], group)
    _int4(x.dtype, x.contiguous(), weight.contiguous(), scale.contiguous(), *_bias(bias), y, scratch, N, K, O, group)
    return y


def linear_int8_many(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, K), each value as two 8-bit numbers, times an int8 W: csrc/split.cpp. Only if multiplies_int8(K)."""
    (N, K), O = x.shape, weight.shape[0]
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    bias = None if bias is None else fp32(bias)
    y = x.new_empty(N, O)
    rows = min(N, _ROWS)
    numbers = torch.empty(2 * rows, K, dtype=torch.int8, device="cpu")
    scales = torch.empty(rows, dtype=torch.float32, device="cpu")
    memory = torch.empty(2 * rows * min(O, _PANEL), dtype=torch.int32, device="cpu")
    for some, out in zip(x.split(rows), y.split(rows), strict=True):
        n = some.shape[0]
        both = numbers[: 2 * n]
        _split_rows(x.dtype, some, both[:n], both[n:], scales, n, K)
        for first in range(0, O, _PANEL):
            panel = slice(first, first + _PANEL)
            q = weight[panel]
            sums = memory[: 2 * n * q.shape[0]].view(2 * n, -1)
            torch._int_mm(both, q.T, out=sums)
            here = None if bias is None else bias[panel]
            _join_rows(x.dtype, sums, scales, scale[panel], here, out, n, q.shape[0], first, O)
    return y


def quantize_int4(weight: Tensor, factors: Tensor, padded: int, group: int) -> tuple[Tensor, Tensor]:
    """factors: fp32, what is tried as a scale, over a group's largest value. A group that is not finite: scale NaN."""
    O, K = weight.shape
    q = torch.empty(O, padded // 2, dtype=torch.uint8, device="cpu")
    scale = torch.empty(O, padded // group, dtype=torch.bfloat16, device="cpu")
    _quantize_int4(weight.dtype, weight.contiguous(), factors, q, scale, factors.numel(), O, K, group)
    return q, scale


def multiplies_int8(in_width: int) -> bool:
    """Whether PyTorch's product of int8 matrices is exact, and worth its while, on this CPU and for this K.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits, where they saturate (127 * 255 * 2 > 32767). For
    K = 1 PyTorch 2.13 takes W^T for W, and gives wrong numbers.
    """
    return 16 <= in_width <= MOST_INPUTS and _int8_is_exact()


@functools.cache
def _int8_is_exact() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False  # then it is a plain loop
    for sign in (1, -1):
        x, w = (torch.full((32, 64), value, dtype=torch.int8, device="cpu") for value in (127, 127 * sign))
        if not (torch._int_mm(x, w.T) == 127 * 127 * 64 * sign).all():
            return False
    return True


def widen_int8(weight: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    wide = torch.empty(weight.shape, dtype=torch.float32, device="cpu") if out is None else out
    _widen_int8(torch.float32, weight.contiguous(), scale.contiguous(), wide, *weight.shape)
    return wide


def widen_int4(weight: Tensor, scale: Tensor, in_width: int, group: int, out: Tensor | None = None) -> Tensor:
    wide = out
    if wide is None:
        wide = torch.empty(weight.shape[0], in_width, dtype=torch.float32, device="cpu")
    _widen_int4(torch.float32, weight.contiguous(), scale.contiguous(), wide, *wide.shape, 2 * weight.shape[1], group)
    return wide


def _bias(bias: Tensor | None) -> tuple[Tensor | None, bool]:
    return (None, False) if bias is None else (bias.contiguous(), bias.dtype == torch.bfloat16)


def _scratch(N: int, padded: int, block: int) -> Tensor:
    """What `Whole` of csrc/integers.h needs: per block eight sums and a scale of 4 bytes, per input a number of 2."""
    blocks = padded // block
    return torch.empty(N * (blocks * 36 + padded * 2), dtype=torch.uint8, device="cpu")
