"""The ops griffin::rg_lru and griffin::rg_lru_backward on a GPU. Contracts and gradients: griffin/ops/rg_lru.py.

    r = sigmoid(ga)   i = sigmoid(gx)   a = exp(-8 softplus(p) r)   s = sqrt(1 - a^2)
    h_t = a h_{t-1} + s i x          at a reset: h_t = i x if unscaled, else s i x

The gates, the recurrence and the cast to x.dtype are one pass over memory, and so is their gradient, which computes the
states of each chunk of time once more, from the one kept before it. Time is split as in linear_scan.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.chunk import CHUNK
from griffin.ops.triton import tiles

FORWARD_WARPS = 4
BACKWARD_WARPS = 8
# The least divisor in the gradient of s: without a bound, where a is 1 to the last bit, it would be 0.
LEAST = 1e-20


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_last and the states before tokens 0, CHUNK, 2 CHUNK ..."""
    (B, T, R), span = x.shape, tiles.span(*x.shape)
    inputs = (x, input_gate, recurrent_gate, recurrent_param)
    spans = summary(*inputs, reset, unscaled_first_token, span) if span < T else (h0, h0)  # (not read)
    y, h_last, chunk_states = x.new_empty(B, T, R), h0.new_empty(B, R), h0.new_empty(B, triton.cdiv(T, CHUNK), R)
    arguments = (*inputs, _bytes(reset), None, h0, *spans, y, h_last, chunk_states)
    flags = {"RESETS": reset is not None, "UNSCALED": unscaled_first_token}
    tiles.launch(_forward_kernel, x, span, *arguments, warps=FORWARD_WARPS, **flags)
    return y, h_last, chunk_states


def packed_rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    h0: Tensor,
    reset: Tensor | None,
    offsets: Tensor,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor]:
    """y and h_last. A program goes through all tokens of its row: none is split in time."""
    (_, T, R), B = x.shape, len(h0)
    y, h_last = x.new_empty(1, T, R), h0.new_empty(B, R)
    inputs = (x, input_gate, recurrent_gate, recurrent_param, _bytes(reset), offsets, h0, h0, h0)
    flags = {"RESETS": reset is not None, "UNSCALED": unscaled_first_token}
    tiles.launch(_forward_kernel, x, max(T, 1), *inputs, y, h_last, None, warps=FORWARD_WARPS, rows=B, **flags)
    return y, h_last


def rg_lru_backward(
    dy: Tensor,
    dh_last: Tensor,
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    chunk_states: Tensor,
    reset: Tensor | None,
    max_sqrt_gradient: float,
    unscaled_first_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, d(input_gate), d(recurrent_gate), d(recurrent_param), dh0."""
    (B, T, R), span = x.shape, tiles.span(*x.shape)
    spans = (dh_last, dh_last)  # (not read)
    if span < T:
        spans = reverse_summary(dy, recurrent_gate, recurrent_param, reset, span)
    inputs = (dy, dh_last, x, input_gate, recurrent_gate, recurrent_param, _bytes(reset), chunk_states, *spans)
    dx, d_input_gate, d_recurrent_gate = (x.new_empty(B, T, R) for _ in range(3))
    shares, dh0 = dh_last.new_empty(B * triton.cdiv(T, span), R), dh_last.new_empty(B, R)
    outputs = (dx, d_input_gate, d_recurrent_gate, shares, dh0)
    flags = {"RESETS": reset is not None, "UNSCALED": unscaled_first_token}
    least = max(1 / max_sqrt_gradient, LEAST)
    tiles.launch(_backward_kernel, x, span, *inputs, *outputs, least, warps=BACKWARD_WARPS, **flags)
    # Each program's sum, then these in order: no atomics, the same bits every time.
    dp = -8 * torch.sigmoid(recurrent_param.float()) * shares.sum(dim=0)
    return dx, d_input_gate, d_recurrent_gate, dp.to(recurrent_param.dtype), dh0


def summary(
    x: Tensor,
    input_gate: Tensor,
    recurrent_gate: Tensor,
    recurrent_param: Tensor,
    reset: Tensor | None,
    unscaled_first_token: bool,
    span: int,
) -> tuple[Tensor, Tensor]:
    """What each span of time does to any state: h_out = a h_in + h.

    Args:
        x, input_gate, recurrent_gate, recurrent_param, reset, unscaled_first_token: as rg_lru takes them.
        span: tokens of a span, a multiple of CHUNK; the last span may be shorter.

    Returns:
        a: (B, ceil(T / span), R) fp32, the product of a over the span: 0 if a document starts in it.
        h: (B, ceil(T / span), R) fp32, the state after it from zero.
    """
    B, T, R = x.shape
    a, h = (x.new_empty(B, triton.cdiv(T, span), R, dtype=torch.float32) for _ in range(2))
    arguments = (x, input_gate, recurrent_gate, recurrent_param, _bytes(reset), a, h)
    flags = {"RESETS": reset is not None, "UNSCALED": unscaled_first_token}
    tiles.launch(_summary_kernel, x, span, *arguments, warps=FORWARD_WARPS, **flags)
    return a, h


def reverse_summary(
    dy: Tensor, recurrent_gate: Tensor, recurrent_param: Tensor, reset: Tensor | None, span: int
) -> tuple[Tensor, Tensor]:
    """As `summary` for the backward pass: the gradient in the state before a span is a G + h, with G that after it."""
    B, T, R = dy.shape
    a, h = (dy.new_empty(B, triton.cdiv(T, span), R, dtype=torch.float32) for _ in range(2))
    arguments = (dy, recurrent_gate, recurrent_param, _bytes(reset), a, h)
    tiles.launch(_reverse_summary_kernel, dy, span, *arguments, warps=BACKWARD_WARPS, RESETS=reset is not None)
    return a, h


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


@triton.jit
def _forward_kernel(
    x, input_gate, recurrent_gate, param, reset, offsets, h0, spans_a, spans_h, y, h_last, chunk_states,
    B, T, R, span, splits,
    RESETS: tl.constexpr, UNSCALED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, split, channels = tiles.place(B, R, BD)
    exists = channels < R
    rate = _rate(param, channels, R)
    h = tl.load(h0 + row * R + channels, mask=exists, other=0.0)
    h = tiles.through(h, spans_a, spans_h, row, 0, split, splits, R, channels, 1)
    first, count = tiles.tokens_of(row, offsets, T)
    start = split * span
    for t0 in tl.range(start, tl.minimum(start + span, count), BT, num_stages=STAGES):
        if chunk_states is not None:
            tl.store(chunk_states + (row * tl.cdiv(T, BT) + t0 // BT) * R + channels, h, mask=exists)
        at, live = tiles.tile(first, t0, count, R, channels, BT)
        starts = _starts(reset, first, t0, count, RESETS, BT)
        ix = _input(x, input_gate, at, live)
        _, a, s = _decay(recurrent_gate, rate, at, live)
        h_t = tiles.states(tl.where(starts, 0.0, a), tl.where(starts & UNSCALED, 1.0, s) * ix, h)
        tl.store(y + at, h_t.to(y.dtype.element_ty), mask=live)
        h = tiles.row_of(h_t, BT - 1, BT)
    tl.store(h_last + row * R + channels, h, mask=exists & (split == splits - 1))


@triton.jit
def _summary_kernel(
    x, input_gate, recurrent_gate, param, reset, product, from_zero,
    B, T, R, span, splits,
    RESETS: tl.constexpr, UNSCALED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, split, channels = tiles.place(B, R, BD)
    rate = _rate(param, channels, R)
    p, h = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    start = split * span
    for t0 in tl.range(start, tl.minimum(start + span, T), BT, num_stages=STAGES):
        at, live = tiles.tile(row * T, t0, T, R, channels, BT)
        starts = _starts(reset, row * T, t0, T, RESETS, BT)
        ix = _input(x, input_gate, at, live)
        _, a, s = _decay(recurrent_gate, rate, at, live)
        p, h = tiles.extend(p, h, tl.where(starts, 0.0, a), tl.where(starts & UNSCALED, 1.0, s) * ix, False, BT)
    at = (row * splits + split) * R + channels
    tl.store(product + at, p, mask=channels < R)
    tl.store(from_zero + at, h, mask=channels < R)


@triton.jit
def _reverse_summary_kernel(
    dy, recurrent_gate, param, reset, product, from_zero,
    B, T, R, span, splits,
    RESETS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, split, channels = tiles.place(B, R, BD)
    rate = _rate(param, channels, R)
    p, flow = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    start = split * span
    count = tl.cdiv(tl.minimum(span, T - start), BT)
    for n in tl.range(0, count, num_stages=STAGES):
        t0 = start + (count - 1 - n) * BT
        at, live = tiles.tile(row * T, t0, T, R, channels, BT)
        _, a, _ = _decay(recurrent_gate, rate, at, live)
        a = tl.where(_starts(reset, row * T, t0, T, RESETS, BT), 0.0, a)
        dy_t = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        p, flow = tiles.extend(p, flow, a, tiles.decayed(a, dy_t), True, BT)
    at = (row * splits + split) * R + channels
    tl.store(product + at, p, mask=channels < R)
    tl.store(from_zero + at, flow, mask=channels < R)


@triton.jit
def _backward_kernel(
    dy, dh_last, x, input_gate, recurrent_gate, param, reset, chunk_states, spans_a, spans_g,
    dx, d_input_gate, d_recurrent_gate, shares, dh0, least,
    B, T, R, span, splits,
    RESETS: tl.constexpr, UNSCALED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, split, channels = tiles.place(B, R, BD)
    exists = channels < R
    rate = _rate(param, channels, R)
    # What comes from later tokens: G_t = a_t g_t, and dh_last after the last one. So g_t = dy_t + G_{t+1}.
    carry = tl.load(dh_last + row * R + channels, mask=exists, other=0.0)
    carry = tiles.through(carry, spans_a, spans_g, row, splits - 1, splits - 1 - split, splits, R, channels, -1)
    total = tl.zeros((BD,), tl.float32)
    start = split * span
    count = tl.cdiv(tl.minimum(span, T - start), BT)
    for n in tl.range(0, count, num_stages=STAGES):
        t0 = start + (count - 1 - n) * BT
        at, live = tiles.tile(row * T, t0, T, R, channels, BT)
        starts = _starts(reset, row * T, t0, T, RESETS, BT)
        x_t = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        i = _sigmoid(tl.load(input_gate + at, mask=live, other=0.0).to(tl.float32))
        r, decay, s = _decay(recurrent_gate, rate, at, live)
        dy_t = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        h = tl.load(chunk_states + (row * tl.cdiv(T, BT) + t0 // BT) * R + channels, mask=exists, other=0.0)
        ix = i * x_t
        a, m = tl.where(starts, 0.0, decay), tl.where(starts & UNSCALED, 1.0, s)
        g = tiles.gradients(a, dy_t, carry)
        carry = tiles.row_of(tiles.decayed(a, g), 0, BT)
        tl.store(dx + at, (g * m * i).to(dx.dtype.element_ty), mask=live)
        tl.store(d_input_gate + at, (g * m * ix * (1 - i)).to(dx.dtype.element_ty), mask=live)
        before = tiles.states_before(a, m * ix, h)
        # d s / d log a = -a^2 / s, where s is not 1 by rule
        slope = tl.where(starts & UNSCALED, 0.0, 2 * decay * decay / tl.maximum(2 * s, least))
        dlog_a = g * (tiles.decayed(a, before) - slope * ix)
        tl.store(d_recurrent_gate + at, (rate * r * (1 - r) * dlog_a).to(dx.dtype.element_ty), mask=live)
        total += tl.sum(r * dlog_a, axis=0)  # r is 0 beyond the last token
    tl.store(shares + (row * splits + split) * R + channels, total, mask=exists)
    tl.store(dh0 + row * R + channels, carry, mask=exists & (split == 0))


@triton.jit
def _starts(reset, first, t0, T, RESETS: tl.constexpr, BT: tl.constexpr):
    """Which tokens of a tile start a document: (BT, 1)."""
    t = t0 + tl.arange(0, BT)
    if RESETS:
        starts = tl.load(reset + first + t, mask=t < T, other=0) != 0
    else:
        starts = t < 0
    return starts[:, None]


@triton.jit
def _input(x, input_gate, at, live):
    """i x."""
    gate = tl.load(input_gate + at, mask=live, other=0.0).to(tl.float32)
    return _sigmoid(gate) * tl.load(x + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _decay(recurrent_gate, rate, at, live):
    """r, a and s = sqrt(1 - a^2), before resets. Beyond the last token r is 0: a = 1, s = 0."""
    r = _sigmoid(tl.load(recurrent_gate + at, mask=live, other=float("-inf")).to(tl.float32))
    a, forgotten = _exp(rate * r)
    return r, a, tl.sqrt(forgotten * (1 + a))


@triton.jit
def _rate(param, channels, R):
    """-8 softplus(p). log(1 + e) is 2 atanh(e / (2 + e)) in a series: p may be so negative that 1 + e is 1."""
    p = tl.load(param + channels, mask=channels < R, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(p))
    z = e / (2 + e)  # at most 1/3: what is left out is below 2^-25 of the sum
    w = z * z
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w / 15))))))
    return -8 * (tl.maximum(p, 0.0) + 2 * z * series)


@triton.jit
def _exp(z):
    """exp(z) and 1 - exp(z) for z <= 0, with every digit of both: near 0, Taylor's series up to z^8 for the latter."""
    series = 1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720 + z * (1 / 5040 + z / 40320)))))
    small, e = -z * (1 + z * series), tl.exp(z)
    return tl.where(z > -0.5, 1 - small, e), tl.where(z > -0.5, small, 1 - e)


@triton.jit
def _sigmoid(x):
    """Stable, and exactly 0 at -inf."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)
