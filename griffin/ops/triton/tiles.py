"""What the kernels over time share: their tiles, the recurrence inside one, and how time is split among programs.

    h_t = a_t h_{t-1} + b_t          at a reset: h_t = b_t

At a reset a is 0, which hides what was before, NaN too: `decayed` says so wherever a state or its gradient is
multiplied by an a or a product of them.

A program has BD channels of one row of the batch and one span of time. It goes through the span in tiles (BT, BD) of
CHUNK tokens, the state between them in registers. Rows beyond the last token must have a = 1 and b = 0: the state
passes them unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin.ops.chunk import CHUNK

# To be tuned on a device.
BD = 32  # channels of a program: 64 bytes of bf16, whole bursts of the memory
STAGES = 3  # tiles in flight
PROGRAMS = 264  # two for each multiprocessor of an H100: with fewer, time is split
FEWEST_TILES = 4  # of a span: a second kernel and reading the inputs twice cost about as much
MOST_SPLITS = 32  # every program goes through what the spans before its own do


def span(B: int, T: int, R: int) -> int:
    """Tokens of one program, whole chunks: fewer than T where rows and channels alone do not fill a GPU."""
    chunks, programs = triton.cdiv(T, CHUNK), B * triton.cdiv(R, BD)
    splits = min(triton.cdiv(PROGRAMS, max(1, programs)), chunks // FEWEST_TILES, MOST_SPLITS)
    return int(triton.cdiv(chunks, max(1, splits)) * CHUNK)


def launch(
    kernel: Any,
    x: Tensor,
    span: int,
    *arguments: Tensor | float | None,
    warps: int,
    rows: int | None = None,
    **constants: bool,
) -> None:
    """Run a kernel on every block of channels, row and span of time of x (B, T, R).

    Args:
        arguments: those of the kernel before B. Outputs must be contiguous; of inputs that are not, copies are passed.
        rows: how many are packed in x (1, T, R). None: B.
    """
    B, T, R = x.shape
    B = B if rows is None else rows
    splits = triton.cdiv(T, span)
    programs = B * triton.cdiv(R, BD) * splits  # on one axis of the grid: only the first may be longer than 65535
    given = [t.contiguous() if isinstance(t, Tensor) else t for t in arguments]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(programs,)](
            *(*given, B, T, R, span, splits), BT=CHUNK, BD=BD, STAGES=STAGES, num_warps=warps, **constants
        )


@triton.jit
def place(B, R, BD: tl.constexpr):
    """This program's row of the batch, its split of time, and its channels."""
    program, blocks = tl.program_id(0), tl.cdiv(R, BD)
    channels = program % blocks * BD + tl.arange(0, BD)
    # int64: what is computed from it may be more than 2^31.
    return (program // blocks % B).to(tl.int64), program // blocks // B, channels


@triton.jit
def tokens_of(row, offsets, T):
    """A row's first token among those of all, int64, and how many it has: T, or of packed rows what `offsets` says."""
    if offsets is None:
        first, count = row * T, T
    else:  # whatever numbers there are, no token is outside of the T
        first = tl.minimum(tl.maximum(tl.load(offsets + row), 0), T)
        count = tl.minimum(tl.maximum(tl.load(offsets + row + 1), first), T) - first
    return first, count


@triton.jit
def tile(first, t0, T, R, channels, BT: tl.constexpr):
    """Where tokens t0, t0 + 1 ... of a row that begins at token `first` are in (B, T, R), and which of them exist."""
    tokens = tl.arange(0, BT)
    at = (first + t0) * R + (tokens[:, None] * R + channels[None, :])
    return at, (t0 + tokens < T)[:, None] & (channels < R)[None, :]


@triton.jit
def decayed(a, h):
    """a h, and 0 where a is: 0 * NaN is NaN."""
    return tl.where(a == 0, 0.0, a * h)


@triton.jit
def after(a1, h1, a2, h2):
    """h -> a1 h + h1 and after it h -> a2 h + h2, as one such map."""
    return a1 * a2, decayed(a2, h1) + h2


@triton.jit
def states(a, b, h):
    """All states of a tile, h before its first row."""
    products, from_zero = tl.associative_scan((a, b), 0, after)
    return from_zero + decayed(products, h[None, :])


@triton.jit
def after_and_before(a1, h1, p1, q1, a2, h2, p2, q2):
    """As `after`, and beside each map h -> a h + h1 the one without its last step, h -> p h + q."""
    return a1 * a2, decayed(a2, h1) + h2, a1 * p2, decayed(p2, h1) + q2


@triton.jit
def states_before(a, b, h):
    """As `states`, but each row has the state before it, h_{t-1}. To shift the rows by tl.gather costs far more."""
    steps = (a, b, tl.full(a.shape, 1.0, tl.float32), tl.zeros(a.shape, tl.float32))
    _, _, products, from_zero = tl.associative_scan(steps, 0, after_and_before)
    return from_zero + decayed(products, h[None, :])


@triton.jit
def after_its_decay(p1, g1, a1, p2, g2, a2):
    """flow -> p1 flow + g1, and from a1 times that -> p2 flow + g2, as one such map; a2 is for the next."""
    carried = p2 * a1
    return carried * p1, g2 + decayed(carried, g1), a2


@triton.jit
def gradients(a, dy, flow):
    """g_t = dy_t + a_{t+1} g_{t+1} up the rows of a tile, flow = a_{t+1} g_{t+1} after its last."""
    steps = (tl.full(a.shape, 1.0, tl.float32), dy, a)
    products, from_zero, _ = tl.associative_scan(steps, 0, after_its_decay, reverse=True)
    return from_zero + decayed(products, flow[None, :])


@triton.jit
def extend(p, from_zero, a, b, reverse: tl.constexpr, BT: tl.constexpr):
    """What a span does to a state, p h + from_zero, one tile further (reverse: one tile earlier)."""
    products, states_from_zero = tl.associative_scan((a, b), 0, after, reverse=reverse)
    last: tl.constexpr = 0 if reverse else BT - 1
    return after(p, from_zero, row_of(products, last, BT), row_of(states_from_zero, last, BT))


@triton.jit
def through(h, a, b, row, first, count, splits, R, channels, step: tl.constexpr):
    """Take h through `count` spans from `first` on: what each does to a state is a h + b; a, b (B, splits, R)."""
    for n in range(count):
        at = (row * splits + first + n * step) * R + channels
        exists = channels < R
        h = decayed(tl.load(a + at, mask=exists, other=1.0), h) + tl.load(b + at, mask=exists, other=0.0)
    return h


@triton.jit
def row_of(values, index: tl.constexpr, BT: tl.constexpr):
    """One row of a tile."""
    return tl.sum(tl.where(tl.arange(0, BT)[:, None] == index, values, 0.0), axis=0)
