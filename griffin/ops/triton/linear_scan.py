"""The ops griffin::linear_scan and griffin::linear_scan_backward on a GPU. Contracts: griffin/ops/scan.py.

    h_t = a_t h_{t-1} + x_t        g_t = dy_t + a_{t+1} g_{t+1}

Where rows and channels alone do not fill the GPU, time is split: a first kernel finds what each span of time does to
any state, and each program of the second goes through what lies before its own span.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.chunk import CHUNK
from griffin.ops.triton import tiles

FORWARD_WARPS = 4
BACKWARD_WARPS = 4


def linear_scan(x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """y and h_last."""
    return _forward(x, a, h0)[:2]


def linear_scan_backward(
    dy: Tensor, dh_last: Tensor, x: Tensor, a: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = g, da_t = g_t h_{t-1}, dh0 = a_1 g_1. Nothing of h is kept: the chunks' states are computed once more."""
    span = tiles.span(*x.shape)
    chunk_states = _forward(x, a, h0)[2]
    spans = reverse_summary(dy, a, span) if span < x.shape[1] else (dh_last, dh_last)
    dx, da, dh0 = x.new_empty(x.shape), x.new_empty(x.shape), h0.new_empty(h0.shape)
    arguments = (dy, dh_last, x, a, chunk_states, *spans, dx, da, dh0)
    tiles.launch(_backward_kernel, x, span, *arguments, warps=BACKWARD_WARPS)
    return dx, da, dh0


def summary(x: Tensor, a: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """What each span of time does to any state: h_out = a h_in + h.

    Args:
        x: (B, T, R), as linear_scan takes it.
        a: (B, T, R) in x.dtype.
        span: tokens of a span, a multiple of CHUNK; the last span may be shorter.

    Returns:
        a: (B, ceil(T / span), R) fp32, the product of a over the span.
        h: (B, ceil(T / span), R) fp32, the state after it from zero.
    """
    return _summary(x, a, span, reverse=False)


def reverse_summary(dy: Tensor, a: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """As `summary` for the backward pass: the gradient in the state before a span is a G + h, with G that after it."""
    return _summary(dy, a, span, reverse=True)


def _forward(x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_last and the states before tokens 0, CHUNK, 2 CHUNK ..."""
    (B, T, R), span = x.shape, tiles.span(*x.shape)
    spans = summary(x, a, span) if span < T else (h0, h0)  # (not read)
    y, h_last, chunk_states = x.new_empty(B, T, R), h0.new_empty(B, R), h0.new_empty(B, triton.cdiv(T, CHUNK), R)
    tiles.launch(_forward_kernel, x, span, x, a, h0, *spans, y, h_last, chunk_states, warps=FORWARD_WARPS)
    return y, h_last, chunk_states


def _summary(x: Tensor, a: Tensor, span: int, reverse: bool) -> tuple[Tensor, Tensor]:
    B, T, R = x.shape
    product, from_zero = (x.new_empty(B, triton.cdiv(T, span), R, dtype=torch.float32) for _ in range(2))
    tiles.launch(_summary_kernel, x, span, x, a, product, from_zero, warps=FORWARD_WARPS, REVERSE=reverse)
    return product, from_zero


@triton.jit
def _forward_kernel(
    x, a, h0, spans_a, spans_h, y, h_last, chunk_states,
    B, T, R, span, splits,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, split, channels = tiles.place(B, R, BD)
    exists = channels < R
    h = tl.load(h0 + row * R + channels, mask=exists, other=0.0)
    h = tiles.through(h, spans_a, spans_h, row, 0, split, splits, R, channels, 1)
    start = split * span
    for t0 in tl.range(start, tl.minimum(start + span, T), BT, num_stages=STAGES):
        tl.store(chunk_states + (row * tl.cdiv(T, BT) + t0 // BT) * R + channels, h, mask=exists)
        at, live = tiles.tile(row * T, t0, T, R, channels, BT)
        x_t = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        a_t = tl.load(a + at, mask=live, other=1.0).to(tl.float32)
        h_t = tiles.states(a_t, x_t, h)
        tl.store(y + at, h_t.to(y.dtype.element_ty), mask=live)
        h = tiles.row_of(h_t, BT - 1, BT)
    tl.store(h_last + row * R + channels, h, mask=exists & (split == splits - 1))


@triton.jit
def _summary_kernel(
    x, a, product, from_zero,
    B, T, R, span, splits,
    REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """In reverse, x is dy and the recurrence that of G_t = a_t g_t = a_t (dy_t + G_{t+1})."""
    row, split, channels = tiles.place(B, R, BD)
    start = split * span
    count = tl.cdiv(tl.minimum(span, T - start), BT)
    p, h = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    for n in tl.range(0, count, num_stages=STAGES):
        t0 = start + (count - 1 - n if REVERSE else n) * BT
        at, live = tiles.tile(row * T, t0, T, R, channels, BT)
        x_t = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        a_t = tl.load(a + at, mask=live, other=1.0).to(tl.float32)
        p, h = tiles.extend(p, h, a_t, a_t * x_t if REVERSE else x_t, REVERSE, BT)
    at = (row * splits + split) * R + channels
    tl.store(product + at, p, mask=channels < R)
    tl.store(from_zero + at, h, mask=channels < R)


@triton.jit
def _backward_kernel(
    dy, dh_last, x, a, chunk_states, spans_a, spans_g, dx, da, dh0,
    B, T, R, span, splits,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, split, channels = tiles.place(B, R, BD)
    exists = channels < R
    # What comes from later tokens: G_t = a_t g_t, and dh_last after the last one. So g_t = dy_t + G_{t+1}.
    carry = tl.load(dh_last + row * R + channels, mask=exists, other=0.0)
    carry = tiles.through(carry, spans_a, spans_g, row, splits - 1, splits - 1 - split, splits, R, channels, -1)
    start = split * span
    count = tl.cdiv(tl.minimum(span, T - start), BT)
    for n in tl.range(0, count, num_stages=STAGES):
        t0 = start + (count - 1 - n) * BT
        at, live = tiles.tile(row * T, t0, T, R, channels, BT)
        x_t = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        a_t = tl.load(a + at, mask=live, other=1.0).to(tl.float32)
        dy_t = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        h = tl.load(chunk_states + (row * tl.cdiv(T, BT) + t0 // BT) * R + channels, mask=exists, other=0.0)
        g = tiles.gradients(a_t, dy_t, carry)
        carry = tiles.row_of(a_t * g, 0, BT)
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=live)
        before = tiles.states_before(a_t, x_t, h)
        tl.store(da + at, (g * before).to(da.dtype.element_ty), mask=live)
    tl.store(dh0 + row * R + channels, carry, mask=exists & (split == 0))
