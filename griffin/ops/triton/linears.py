"""Products of few rows with int8 and int4 weights: y = x W^T + b, W read once and widened in registers.

    int8:  y[n, o] = scale[o] (sum over k of q[o, k] x[n, k]) + b[o]
    int4:  y[n, o] = sum over groups g of scale[o, g] (sum over k in g of (q[o, k] - 8) x[n, k]) + b[o]

The whole numbers are exact in bf16 and fp16, and a scale multiplies a sum in fp32: these are products of x as it is
with the weights that `dequantize` gives, and nothing is rounded but fp32 sums and, once, the result.

One program makes BN outputs of all rows and reads all of K. How many outputs that is, and that K is not split between
programs (which would fill a GPU better where O is small), are choices of speed alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _int8_kernel(
    x,
    q,
    scale,
    bias,
    y,
    num_rows,
    O,
    K,
    x_stride,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.arange(0, BM)
    k = tl.arange(0, BK)
    weights, used = q + (o.to(tl.int64)[:, None] * K + k[None, :]), (o < O)[:, None]
    rows, read = x + (n[None, :] * x_stride + k[:, None]), (n < num_rows)[None, :]
    sums = tl.zeros((BN, BM), tl.float32)
    for first in range(0, K, BK):
        left = k < K - first
        numbers = tl.load(weights + first, mask=used & left[None, :], other=0)
        inputs = tl.load(rows + first, mask=read & left[:, None], other=0)
        sums = tl.dot(numbers.to(inputs.dtype), inputs, sums, input_precision="ieee")
    sums *= tl.load(scale + o, mask=o < O, other=0)[:, None]
    _store(y, bias, sums, o, n, num_rows, O, HAS_BIAS)


@triton.jit
def _int4_kernel(
    x,
    q,
    scale,
    bias,
    y,
    num_rows,
    O,
    K,
    P,
    x_stride,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
):
    """q is (O, P / 4) of 16-bit words. STEP inputs at a time are one group, or the two of a block of 64."""
    o = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.arange(0, BM)
    j = tl.arange(0, STEP // 4)
    k = j // 16 * 64 + j % 16  # the inputs in the lowest bits of a step's words; 16 quarter further in the others
    weights, used = q + (o.to(tl.int64)[:, None] * (P // 4) + j[None, :]), (o < O)[:, None]
    scales = scale + o.to(tl.int64)[:, None] * (P // GROUP)
    rows, read = x + (n[None, :] * x_stride + k[:, None]), (n < num_rows)[None, :]
    sums = tl.zeros((BN, BM), tl.float32)
    for first in range(0, P, STEP):
        words = tl.load(weights + first // 4, mask=used, other=0)
        part = tl.zeros((BN, BM), tl.float32)
        for quarter in tl.static_range(4):
            at = first + 16 * quarter
            inputs = tl.load(rows + at, mask=read & (k < K - at)[:, None], other=0)
            numbers = ((words >> 4 * quarter) & 15) - 8
            part = tl.dot(numbers.to(inputs.dtype), inputs, part, input_precision="ieee")
            if quarter == 3 or (GROUP == 32 and quarter == 1):
                group = first // GROUP + (1 if GROUP == 32 and quarter == 3 else 0)
                sums += part * tl.load(scales + group, mask=used, other=0).to(tl.float32)
                part = tl.zeros((BN, BM), tl.float32)
    _store(y, bias, sums, o, n, num_rows, O, HAS_BIAS)


@triton.jit
def _store(y, bias, sums, o, n, num_rows, O, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=o < O, other=0).to(tl.float32)[:, None]
    at = n.to(tl.int64)[None, :] * O + o[:, None]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(n < num_rows)[None, :] & (o < O)[:, None])


def linear_int8(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (N, K), 0 < N <= 64, q (O, K) int8, scale (O,), bias (O,): (N, O) in dtype."""
    x, y, BM, BN, warps = _prepared(x, q, dtype)
    (N, K), O = x.shape, q.shape[0]
    BK = 32 if x.dtype == torch.float32 else 4096 // BN if BN < 64 else 128
    with torch.cuda.device_of(x):
        _int8_kernel[(triton.cdiv(O, BN),)](
            *(x, q.contiguous(), scale.contiguous(), _some(bias, x), y, N, O, K, x.stride(0)),
            HAS_BIAS=bias is not None,
            BM=BM,
            BN=BN,
            BK=BK,
            num_warps=warps,
            num_stages=4,
        )
    return y


def linear_int4(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """As linear_int8, for q (O, P / 2) uint8 and scale (O, P / group)."""
    x, y, BM, BN, warps = _prepared(x, q, dtype)
    (N, K), O, P = x.shape, q.shape[0], 2 * q.shape[1]
    with torch.cuda.device_of(x):
        _int4_kernel[(triton.cdiv(O, BN),)](
            *(x, q.contiguous().view(torch.int16), scale.contiguous(), _some(bias, x), y, N, O, K, P, x.stride(0)),
            HAS_BIAS=bias is not None,
            GROUP=group,
            BM=BM,
            BN=BN,
            STEP=max(group, 64),
            num_warps=warps,
            num_stages=4,
        )
    return y


def _prepared(x: Tensor, q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int, int]:
    """Give x with neighbours in a row, memory for y, the rows that a tile has, its outputs, and its warps."""
    N, O = x.shape[0], q.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    BM = max(16, triton.next_power_of_2(N))
    BN = _outputs(O)
    warps = 4 if x.dtype == torch.float32 else min(4, BM * BN // 256)
    return x, torch.empty(N, O, dtype=dtype, device=x.device), BM, BN, warps


def _outputs(O: int) -> int:
    """Give enough programs for 132 multiprocessors: 160 of 16 outputs for O = 2560, 240 of 64 for 15360."""
    return 64 if O >= 8192 else 32 if O >= 4096 else 16


def _some(bias: Tensor | None, x: Tensor) -> Tensor:
    return x if bias is None else bias.contiguous()  # a kernel's argument must be something
