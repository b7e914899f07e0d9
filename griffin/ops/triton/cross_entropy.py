"""nats = logsumexp(c) - c[target] of each row, c = cap tanh(logits / cap), and its slopes; used by griffin/loss.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 4096  # of the vocabulary at a time, sixteen elements a thread; to be tuned on a device


def cross_entropy(
    logits: Tensor, targets: Tensor, cap: float | None, slopes: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Compute logsumexp(c) - c[target] and (softmax(c) - onehot(target)) (1 - tanh^2(logits / cap)), row by row.

    Args:
        logits: (n, V) fp32, contiguous.
        targets: (n,) int64. Both results are zero where it is -1, and nats is NaN where it is no token at all.
        cap: None means c = logits.
        slopes: the dtype of the second result; None means that it is not wanted.

    Returns:
        nats: (n,) fp32.
        d_logits: (n, V) in `slopes`, or None.
    """
    n, V = logits.shape
    nats = logits.new_empty(n)
    d_logits = None if slopes is None else torch.empty_like(logits, dtype=slopes)
    block = min(_MAX_BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _cross_entropy[(n,)](logits, targets.contiguous(), nats, d_logits, V, cap, BLOCK=block, num_warps=8)
    return nats, d_logits


@triton.jit
def _tanh(x):
    """tanh(x) and 1 - tanh(x)^2, both to a few units in the last place."""
    e = tl.exp(-2.0 * tl.abs(x))  # at most 1: neither sign overflows
    far = (1.0 - e) / (1.0 + e)
    # Near zero 1 - e cancels: there the series of Cephes' tanhf, x + x^3 p(x^2).
    z = tl.minimum(x * x, 1.0)
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = x + x * z * (p - 3.33332819422e-1)
    tanh = tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _capped(z, cap):
    if cap is None:
        c = z
    else:
        tanh, _ = _tanh(z / cap)
        c = tanh * cap
    return c


@triton.jit
def _cross_entropy(logits, targets, nats, d_logits, V, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counted = target != -1
    columns = tl.arange(0, BLOCK)
    logits += row * V

    # Each lane keeps the largest of its values and the sum of exp(value - largest), with one exp a value. What is past
    # the end counts for nothing: beside any logit, exp(-3e38) is zero.
    most = tl.full((BLOCK,), -3e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + columns
        c = _capped(tl.load(logits + v, mask=v < V, other=0.0), cap)
        c = tl.where(v < V, c, -3e38)
        e = tl.exp(-tl.abs(c - most))
        total = tl.where(c > most, total * e + 1.0, total + e)
        most = tl.maximum(c, most)
    peak = tl.max(most, axis=0)
    mass = tl.sum(total * tl.exp(most - peak), axis=0)  # sum of exp(c - peak)

    known = (target >= 0) & (target < V)
    chosen = tl.load(logits + target, mask=known, other=0.0)
    value = tl.where(known, (peak - _capped(chosen, cap)) + tl.log(mass), float("nan"))
    tl.store(nats + row, tl.where(counted, value, 0.0))

    if d_logits is not None:
        d_logits += row * V
        for start in range(0, V, BLOCK):
            v = start + columns
            z = tl.load(logits + v, mask=v < V, other=0.0)
            slope = tl.exp(_capped(z, cap) - peak) / mass - tl.where(v == target, 1.0, 0.0)
            if cap is not None:
                _, rest = _tanh(z / cap)
                slope *= rest
            tl.store(d_logits + v, tl.where(counted, slope, 0.0).to(d_logits.dtype.element_ty), mask=v < V)
