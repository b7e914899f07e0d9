"""Launches every kernel of the convolution, GeGLU, RMSNorm and the loss; see compiled.py."""

from __future__ import annotations

import torch

from griffin.ops import causal_conv1d, geglu, rms_norm
from griffin.ops.triton.cross_entropy import cross_entropy


def launch_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for starts in (False, True):
            convolve(100, 2560, 4, dtype, starts)
            convolve_packed(100, 2560, 4, dtype, starts)
        pointwise(4, 7680, dtype)
        for width in (256, 2560, 8192):
            normalize(4, width, dtype)
        for cap in (None, 30.0):
            loss(256_000, cap, dtype)
    loss(256_000, 30.0, None)
    # An argument of 1 becomes a constant of the kernel, which the compiler treats unlike a number.
    for taps in (1, 8):
        convolve(1, 1, taps, torch.bfloat16, True)
        convolve_packed(1, 1, taps, torch.bfloat16, True)
    pointwise(1, 1, torch.bfloat16)
    normalize(1, 1, torch.bfloat16)
    loss(1, 30.0, torch.bfloat16)


def convolve(T: int, R: int, taps: int, dtype: torch.dtype, starts: bool) -> None:
    reset = torch.zeros(1, T, dtype=torch.bool) if starts else None
    x, weight = torch.zeros(1, T, R, dtype=dtype, requires_grad=True), torch.zeros(R, taps, requires_grad=True)
    backward(causal_conv1d(x, weight, torch.zeros(R), None, reset)[0])


def convolve_packed(T: int, R: int, taps: int, dtype: torch.dtype, starts: bool) -> None:
    reset, state = torch.zeros(1, T, dtype=torch.bool) if starts else None, torch.zeros(2, taps - 1, R, dtype=dtype)
    x, weight, offsets = torch.zeros(1, T, R, dtype=dtype), torch.zeros(R, taps), torch.tensor([0, 1, T])
    with torch.no_grad():
        causal_conv1d(x, weight, torch.zeros(R), state, reset, offsets=offsets)


def pointwise(rows: int, width: int, dtype: torch.dtype) -> None:
    backward(geglu(*(torch.zeros(rows, width, dtype=dtype, requires_grad=True) for _ in range(2))))


def normalize(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(rows, width, dtype=dtype, requires_grad=True), torch.zeros(width, requires_grad=True)
    backward(rms_norm(x, weight, 1e-6))


def loss(V: int, cap: float | None, slopes: torch.dtype | None) -> None:
    cross_entropy(torch.zeros(2, V), torch.zeros(2, dtype=torch.int64), cap, slopes)


def backward(y: torch.Tensor) -> None:
    y.backward(torch.empty_like(y))
