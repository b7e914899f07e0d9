"""ring_attention on a GPU: out = sum_j softmax_j(q . k_j / sqrt(K)) v_j over the slots j = 0 .. min(p, S - 1).

One query token per row gives little work and many bytes, so the slots of a row are split over programs. Each goes
through its split with s_j = q . k_j / sqrt(K) in fp32 and leaves m = max s_j, l = sum exp(s_j - m) and the vector
a = sum exp(s_j - m) v_j. A second kernel combines the splits, in order of slots: with M = max m,

    out = sum(exp(m - M) a) / sum(exp(m - M) l)

How slots are split depends on S alone: a row's result does not depend on the rows beside it, to the last bit.
Slots that a query does not see are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 256  # channels of a head
HEADS = 16  # query heads of a program, which share a key head: the fewest that tensor cores multiply
SPLIT = 64  # slots of a split, at least: 33 splits of 2049 slots
MOST_SPLITS = 128  # of more than 8192 slots (global attention), splits are longer
COMBINED = 16  # splits that a step of the second kernel takes
WARPS = 4


def ring_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """As griffin/ops/attention.py says, for K <= MAX_WIDTH and at least one row and slot. No gradient."""
    (B, S, G, K), H = keys.shape, queries.shape[2]
    slots = SPLIT * triton.cdiv(S, SPLIT * MOST_SPLITS)  # of a split
    splits, blocks = triton.cdiv(S, slots), triton.cdiv(H // G, HEADS)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    top, total = out.new_empty((2, B, H, splits), dtype=torch.float32)
    partial = out.new_empty((B, H, splits, K), dtype=torch.float32)
    inputs = (queries.contiguous(), keys.contiguous(), values.contiguous(), positions.contiguous())
    exact = keys.dtype == torch.float32
    sizes = {"H": H, "G": G, "K": K, "WIDTH": max(16, triton.next_power_of_2(K))}
    with torch.cuda.device_of(queries):
        _split_kernel[B * G * blocks, splits](
            *(*inputs, top, total, partial, S, slots, K**-0.5 * 1.4426950408889634),
            **sizes,
            HEADS=HEADS,
            BLOCK=16 if exact else 32,  # slots of a step; two steps of keys and values are in shared memory
            PRECISION="ieee" if exact else "tf32",
            num_warps=WARPS,
            num_stages=2,
        )
        _combine_kernel[B * H,](
            *(top, total, partial, inputs[-1], out, S, slots, splits),
            **sizes,
            SPLITS=MOST_SPLITS,
            COMBINED=COMBINED,
            num_warps=WARPS,
        )
    return out


@triton.jit
def _split_kernel(
    q,
    k,
    v,
    positions,
    top,
    total,
    partial,
    S,
    slots,
    scale,  # log2(e) / sqrt(K): powers of two are what the hardware has
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks: tl.constexpr = (H // G + HEADS - 1) // HEADS
    b = (tl.program_id(0) // (G * blocks)).to(tl.int64)
    g = tl.program_id(0) // blocks % G
    first = tl.program_id(1) * slots
    last = tl.minimum(first + slots, _seen(positions, b, S))
    if first >= last:
        return
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    mine = head < H // G
    head = b * H + g * (H // G) + head
    channel = tl.arange(0, WIDTH)
    whole = channel < K
    queries = tl.load(q + head[:, None] * K + channel, mask=mine[:, None] & whole, other=0.0)
    m = tl.full((HEADS,), float("-inf"), tl.float32)
    l = tl.zeros((HEADS,), tl.float32)
    a = tl.zeros((HEADS, WIDTH), tl.float32)
    for start in tl.range(first, last, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < last
        at = ((b * S + slot) * G + g) * K
        keys = tl.load(k + at + channel[:, None], mask=there & whole[:, None], other=0.0)  # (WIDTH, BLOCK)
        s = tl.dot(queries, keys, input_precision=PRECISION) * scale
        s = tl.where(there, s, float("-inf"))
        above = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - above[:, None])
        shrink = tl.exp2(m - above)
        values = tl.load(v + at[:, None] + channel, mask=there[:, None] & whole, other=0.0)  # (BLOCK, WIDTH)
        a = a * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        l = l * shrink + tl.sum(p, axis=1)
        m = above
    place = head * tl.num_programs(1) + tl.program_id(1)
    tl.store(top + place, m, mask=mine)
    tl.store(total + place, l, mask=mine)
    tl.store(partial + place[:, None] * K + channel, a, mask=mine[:, None] & whole)


@triton.jit
def _combine_kernel(
    top,
    total,
    partial,
    positions,
    out,
    S,
    slots,
    splits,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    COMBINED: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    used = tl.cdiv(_seen(positions, head // H, S), slots)  # splits beyond have written nothing
    split = tl.arange(0, SPLITS)
    at = head * splits + split
    m = tl.load(top + at, mask=split < used, other=float("-inf"))
    highest = tl.max(m, axis=0)
    sum_of_weights = tl.sum(tl.exp2(m - highest) * tl.load(total + at, mask=split < used, other=0.0), axis=0)
    channel = tl.arange(0, WIDTH)
    whole = channel < K
    result = tl.zeros((WIDTH,), tl.float32)
    for start in tl.range(0, used, COMBINED):
        some = start + tl.arange(0, COMBINED)
        these = head * splits + some
        weight = tl.exp2(tl.load(top + these, mask=some < used, other=float("-inf")) - highest)
        a = tl.load(partial + these[:, None] * K + channel, mask=(some < used)[:, None] & whole, other=0.0)
        result += tl.sum(weight[:, None] * a, axis=0)
    tl.store(out + head * K + channel, result / sum_of_weights, mask=whole)


@triton.jit
def _seen(positions, b, S):
    """How many slots row b's query sees: min(p + 1, S), and never none."""
    return tl.minimum(tl.maximum(tl.load(positions + b), 0) + 1, S).to(tl.int32)
