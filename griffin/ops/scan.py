"""linear_scan: h_t = a_t * h_{t-1} + x_t, with its gradient, in linear time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.ops import device
from griffin.ops.chunk import CHUNK
from griffin.ops.op import opaque

# With fewer channels than this in flight (B * R), a step of the loop over time is all overhead, and on a GPU it always
# is: there, chunks run side by side. Above it, chunks cost two more passes over memory than the plain loop.
_WIDE = 512


def linear_scan(x: Tensor, a: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t * h_{t-1} + x_t over time, channel by channel.

    Args:
        x: (B, T, R) bf16, fp16, fp32 or fp64, the whole input term.
        a: (B, T, R) in x.dtype, the decay in [0, 1]; a_t = 0 forgets the past, if it is finite.
        h0: (B, R) fp32 (fp64 if x is), the state before the first token; None means zeros.

    Returns:
        y: (B, T, R) in x.dtype, with y[:, t] = h_t.
        h_last: (B, R) fp32 (fp64 if x is), h_T before rounding, so that chunks join exactly.

    All arithmetic is in fp32 (fp64 if x is). Gradients for x, a and h0, through y and h_last.

    Raises:
        ValueError: T is 0, or the arguments disagree in shape or dtype.

    Source: Griffin, arXiv:2402.19427, eq. 4, with its whole input term as x.
    """
    if x.dim() != 3 or x.shape != a.shape or x.dtype != a.dtype or x.shape[1] == 0:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and a {tuple(a.shape)} {a.dtype} must be the same (B, T>0, R)")
    return _linear_scan(x, a, initial_state(x, h0))


def initial_state(x: Tensor, h0: Tensor | None, B: int | None = None) -> Tensor:
    """Give h0 checked, or zeros (B, R) in the accumulation dtype of x; B is that of x, or said."""
    shape, dtype = (x.shape[0] if B is None else B, x.shape[2]), accumulation_dtype(x)
    if h0 is None:
        return x.new_zeros(shape, dtype=dtype)
    if h0.shape != shape or h0.dtype != dtype:
        raise ValueError(f"h0 is {tuple(h0.shape)} {h0.dtype}; this x needs {shape} {dtype}")
    return h0


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 (the reference), fp32 for everything else."""
    return torch.promote_types(x.dtype, torch.float32)


def _fake_backward(dy: Tensor, dh_last: Tensor, x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), a.new_empty(a.shape), h0.new_empty(h0.shape)


@opaque("linear_scan_backward", fake=_fake_backward)
def _linear_scan_backward(
    dy: Tensor, dh_last: Tensor, x: Tensor, a: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if (kernels := device.kernels("linear_scan", x, a, h0, dy, dh_last)) is not None:
        return kernels.linear_scan_backward(dy, dh_last, x, a, h0)
    a_, x_ = a.to(h0.dtype), x.to(h0.dtype)
    g = reverse_scan(a_, dy.to(h0.dtype), dh_last)
    h = scan(a_, x_, h0)
    before = torch.cat([h0[:, None], h[:, :-1]], dim=1)  # h_{t-1}
    return g.to(x.dtype), (g * before).to(a.dtype), a_[:, 0] * g[:, 0]


def _fake(x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(h0)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy, dh_last):  # type: ignore[no-untyped-def]
    return torch.ops.griffin.linear_scan_backward(dy, dh_last, *ctx.saved_tensors)


@opaque("linear_scan", fake=_fake, backward=_backward, save=_save)
def _linear_scan(x: Tensor, a: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    if (kernels := device.kernels("linear_scan", x, a, h0)) is not None:
        return kernels.linear_scan(x, a, h0)
    h = scan(a.to(h0.dtype), x.to(h0.dtype), h0)
    return h.to(x.dtype), h[:, -1].clone()


def scan(a: Tensor, b: Tensor, h0: Tensor, starts: Tensor | None = None, *, wide: int = _WIDE) -> Tensor:
    """Give h with h_t = a_t h_{t-1} + b_t: (B, T, R), all arguments of one dtype, no gradient.

    Args:
        starts: (B, T, 1) bool, where a document starts and a_t is 0: there h_t = b_t even if h_{t-1} is NaN or
            infinite, which 0 times it would not forget. None is nowhere.
        wide: the number B * R from which the loop over time is taken as it stands; below it, whole chunks run side by
            side from zero and are then corrected by (product of a) * (state before the chunk). Both take linear time.
    """
    B, T, R = b.shape
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    chunks = T // CHUNK
    if chunks < 2 or (wide <= B * R and not b.is_cuda):
        _loop(a, b, h0, h, starts)
        return h
    whole = chunks * CHUNK
    a_chunks, b_chunks, h_chunks = (t[:, :whole].unflatten(1, (chunks, CHUNK)) for t in (a, b, h))
    started = None if starts is None else starts[:, :whole].unflatten(1, (chunks, CHUNK))
    _loop(a_chunks, b_chunks, h0.new_zeros(B, chunks, R), h_chunks, started)
    decay = a_chunks.cumprod(dim=2)
    before = h0.new_empty(B, chunks, R)
    started = None if started is None else started.cumsum(dim=2) > 0  # at the token or before it in its chunk
    some = None if started is None else started[:, :, -1]
    _loop(decay[:, :, -1], h_chunks[:, :, -1].clone(), h0, after := torch.empty_like(before), some)
    before[:, 0], before[:, 1:] = h0, after[:, :-1]
    h_chunks.addcmul_(decay, forgotten(before[:, :, None], started))
    if whole < T:
        _loop(a[:, whole:], b[:, whole:], h[:, whole - 1], h[:, whole:], None if starts is None else starts[:, whole:])
    return h


def reverse_scan(a: Tensor, dy: Tensor, dh_last: Tensor, starts: Tensor | None = None, *, wide: int = _WIDE) -> Tensor:
    """Give g with g_t = dy_t + a_{t+1} g_{t+1} and g_T = dy_T + dh_last: the gradient of the loss in h_t.

    `starts` as `scan` takes them: no gradient goes back through one, even one that is NaN.
    """
    B, T, R = dy.shape
    if wide > B * R or dy.is_cuda:
        shifted = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], dim=1)
        if starts is not None:
            starts = torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], dim=1).flip(1)
        return scan(shifted.flip(1), dy.flip(1), dh_last, starts, wide=wide).flip(1)
    g = torch.empty_like(dy, memory_format=torch.contiguous_format)
    a_steps, dy_steps, g_steps, starting = a.unbind(1), dy.unbind(1), g.unbind(1), steps(starts, T)
    torch.add(dy_steps[-1], dh_last, out=g_steps[-1])
    for t in reversed(range(T - 1)):
        torch.addcmul(dy_steps[t], a_steps[t + 1], forgotten(g_steps[t + 1], starting[t + 1]), out=g_steps[t])
    return g


def steps(starts: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """Split (..., T, 1) by token; None where no row starts a document. A GPU is not asked: that would wait for it."""
    if starts is None:
        return [None] * count
    each = starts.unbind(-2)
    if starts.is_cuda:
        return each
    hits = starts.flatten(0, -3).any(dim=0)[:, 0].tolist()
    return [step if hit else None for step, hit in zip(each, hits, strict=True)]


def forgotten(h: Tensor, starts: Tensor | None) -> Tensor:
    """Give h, zero where a document starts."""
    return h if starts is None else h.masked_fill(starts, 0)


def _loop(a: Tensor, b: Tensor, h: Tensor, out: Tensor, starts: Tensor | None) -> None:
    """Write the definition into `out`: time is the last axis but one, h the state before it."""
    each = zip(a.unbind(-2), b.unbind(-2), out.unbind(-2), steps(starts, a.shape[-2]), strict=True)
    for a_t, b_t, out_t, starts_t in each:
        h = torch.addcmul(b_t, a_t, forgotten(h, starts_t), out=out_t)
