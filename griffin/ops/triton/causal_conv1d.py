"""y_t = bias + sum over s < N of weight[N-1-s] x_{t-s}, not across resets; contract in griffin/ops/conv.py.

A program takes one row of the batch, a tile of time and a block of channels. It loads the rows of its tile once per
tap, shifted: all but the first time they come from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.cpu.library import empty_like
from griffin.ops.triton.tiles import tokens_of

_BLOCK, _MAX_TILE = 32, 128  # channels and tokens of a program; to be tuned on a device


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, T, R), N = x.shape, weight.shape[1]
    y, last = empty_like(x), empty_like(state)
    tile = _tile(T)
    inputs = (x.contiguous(), weight.contiguous(), bias.contiguous(), state.contiguous(), _bytes(reset))
    with torch.cuda.device_of(x):
        _conv_forward[(triton.cdiv(R, _BLOCK) * triton.cdiv(T, tile) * B,)](
            *inputs, None, y, last, T, R, N=N, TILE=tile, BLOCK=_BLOCK, num_warps=_warps(tile)
        )
    return y, last


def packed_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, reset: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Any row may have all T tokens, so each gets the tiles of that many, and those it does not need do nothing."""
    (_, T, R), N = x.shape, weight.shape[1]
    y, last = empty_like(x), empty_like(state)
    tile = _tile(T)
    inputs = (x.contiguous(), weight.contiguous(), bias.contiguous(), state.contiguous(), _bytes(reset))
    with torch.cuda.device_of(x):
        _conv_forward[(triton.cdiv(R, _BLOCK) * triton.cdiv(T, tile) * len(state),)](
            *inputs, offsets.contiguous(), y, last, T, R, N=N, TILE=tile, BLOCK=_BLOCK, num_warps=_warps(tile)
        )
    return y, last


def causal_conv1d_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T, R), N = x.shape, weight.shape[1]
    tile = _tile(T + N - 1)
    tiles = triton.cdiv(T + N - 1, tile)
    dx, dstate = empty_like(x), empty_like(state)
    shares = x.new_empty(B * tiles, N + 1, R, dtype=torch.float32)  # each program's dweight and dbias
    inputs = (dy.contiguous(), dlast.contiguous(), x.contiguous(), weight.contiguous(), state.contiguous())
    with torch.cuda.device_of(x):
        _conv_backward[(triton.cdiv(R, _BLOCK) * tiles * B,)](
            *inputs, _bytes(reset), dx, dstate, shares, T, R, N=N, TILE=tile, BLOCK=_BLOCK, num_warps=_warps(tile)
        )
    sums = shares.sum(dim=0)
    dweight = empty_like(weight).copy_(sums[:N].T)
    return dx, dweight, sums[N].to(weight.dtype, copy=True), dstate  # copies: an op's results share no memory


def _tile(T: int) -> int:
    return min(_MAX_TILE, triton.next_power_of_2(T))


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _warps(tile: int) -> int:
    """16 elements a thread; to be tuned on a device."""
    return max(1, tile * _BLOCK // 512)


@triton.jit
def _place(tiles, R, BLOCK: tl.constexpr):
    """Batch row (int64), tile and channels of this program; programs side by side share rows of memory."""
    blocks = tl.cdiv(R, BLOCK)
    program = tl.program_id(0)
    channels = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks // tiles).to(tl.int64), program // blocks % tiles, channels


@triton.jit
def _no_reset(reset, first, t, T):
    """Whether tokens t of a row that begins at `first` start no document; those outside the row never do."""
    return tl.load(reset + first + t, mask=(t >= 0) & (t < T), other=0) == 0


@triton.jit
def _conv_forward(
    x, weight, bias, state, reset, offsets, y, last, T, R,
    N: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, tile, c = _place(tl.cdiv(T, TILE), R, BLOCK)
    first, count = tokens_of(b, offsets, T)
    if offsets is not None:  # noqa: SIM102 - asked when it is compiled, the other when it runs
        if (tile > 0) & (tile * TILE >= count):
            return
    inside = (c < R)[None, :]
    rows = tl.arange(0, TILE)
    t = tile * TILE + rows
    here = rows[:, None] * R + c[None, :]  # within the tile, so 32 bits are enough
    # Row 0 of the tile, were it a token (x_) or an entry of the state (s_): the state's last comes before token 0.
    x_tile = x + (first + tile * TILE) * R
    s_tile = state + (b * (N - 1) + (N - 1) + tile * TILE) * R

    w = tl.load(weight + c * N + (N - 1), mask=c < R, other=0.0).to(tl.float32)
    start = tl.load(bias + c, mask=c < R, other=0.0).to(tl.float32)
    present = (t < count)[:, None] & inside
    total = start[None, :] + w[None, :] * tl.load(x_tile + here, mask=present, other=0.0).to(tl.float32)
    counts = t < count  # the token s earlier is of the same document
    for s in tl.static_range(1, N):
        if reset is not None:
            counts = counts & _no_reset(reset, first, t - (s - 1), count)
        w = tl.load(weight + c * N + (N - 1 - s), mask=c < R, other=0.0).to(tl.float32)
        term = tl.load(x_tile + here - s * R, mask=(counts & (t >= s))[:, None] & inside, other=0.0).to(tl.float32)
        if tile == 0:
            from_state = tl.load(s_tile + here - s * R, mask=(counts & (t < s))[:, None] & inside, other=0.0)
            term += from_state.to(tl.float32)
        total += w[None, :] * term
    tl.store(y + (first + tile * TILE) * R + here, total.to(y.dtype.element_ty), mask=present)

    if (tile + 1) * TILE >= count:  # the last N-1 inputs j, zero if a reset comes after them
        k = tl.arange(0, 8)
        j = count - (N - 1) + k
        kept = k < N - 1
        if reset is not None:
            for s in tl.static_range(1, N):
                kept = kept & _no_reset(reset, first, j + s, count)
        newer = tl.load(x + (first + j[:, None]) * R + c[None, :], mask=(kept & (j >= 0))[:, None] & inside, other=0.0)
        older = tl.load(
            state + (b * (N - 1) + (N - 1) + j[:, None]) * R + c[None, :],
            mask=(kept & (j < 0))[:, None] & inside,
            other=0.0,
        )
        value = tl.where((j >= 0)[:, None], newer, older)
        tl.store(last + (b * (N - 1) + k[:, None]) * R + c[None, :], value, mask=(k < N - 1)[:, None] & inside)


@triton.jit
def _conv_backward(
    dy, dlast, x, weight, state, reset, dx, dstate, shares, T, R,
    N: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Input j gives to y_{j+s}, s = 0 .. N-1, until a reset after j or the end of time; if it is the end, also to last:

        dx_j = sum_s weight[N-1-s] dy_{j+s} (+ dlast_j)    dweight[N-1-s] = sum_j dy_{j+s} x_j    dbias = sum_t dy_t

    A tile is of inputs, those of the state before those of x: j = -(N-1) .. T-1. shares[program] gets its dweight, then
    its dbias.
    """
    tiles = tl.cdiv(T + N - 1, TILE)
    b, tile, c = _place(tiles, R, BLOCK)
    inside = (c < R)[None, :]
    rows = tl.arange(0, TILE)
    j = tile * TILE + rows - (N - 1)
    here = rows[:, None] * R + c[None, :]
    first = b * T + tile * TILE - (N - 1)  # the tile's first row, were it one of x
    in_x = ((j >= 0) & (j < T))[:, None] & inside
    in_state = (j < 0)[:, None] & inside
    state_row = (b * (N - 1) + tile * TILE) * R

    value = tl.load(x + first * R + here, mask=in_x, other=0.0).to(tl.float32)
    if tile == 0:
        value += tl.load(state + state_row + here, mask=in_state, other=0.0).to(tl.float32)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    counts = j < T  # y_{j+s} uses input j
    share = shares + (b * tiles + tile) * (N + 1) * R + c
    for s in tl.static_range(0, N):
        if s > 0 and reset is not None:
            counts = counts & _no_reset(reset, b * T, j + s, T)
        flow = tl.load(
            dy + (first + s) * R + here, mask=(counts & (j + s >= 0) & (j + s < T))[:, None] & inside, other=0.0
        ).to(tl.float32)
        w = tl.load(weight + c * N + (N - 1 - s), mask=c < R, other=0.0).to(tl.float32)
        total += w[None, :] * flow
        tl.store(share + (N - 1 - s) * R, tl.sum(flow * value, axis=0), mask=c < R)
        if s == 0:
            tl.store(share + N * R, tl.sum(flow, axis=0), mask=c < R)
    k = j - (T - (N - 1))  # its place in last
    to_last = (counts & (k >= 0))[:, None] & inside
    total += tl.load(dlast + (b * (N - 1) + k[:, None]) * R + c[None, :], mask=to_last, other=0.0).to(tl.float32)
    tl.store(dx + first * R + here, total.to(dx.dtype.element_ty), mask=in_x)
    if tile == 0:
        tl.store(dstate + state_row + here, total.to(dx.dtype.element_ty), mask=in_state)
