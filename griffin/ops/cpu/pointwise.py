"""Calls of the kernels that treat each token or element by itself. Contracts are those of the ops of the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops.cpu.library import Kernel, empty_like, fp32, whole_numbers

DTYPES = (torch.float32, torch.bfloat16)  # of activations

_NORM_ROWS = 16  # rows of one backward task, as in csrc/rms_norm.cpp

_rms_norm_forward = Kernel("rms_norm_forward", "TF TF ii f")
_rms_norm_backward = Kernel("rms_norm_backward", "TTFF TFF ii")
_geglu_forward = Kernel("geglu_forward", "TT T i")
_geglu_backward = Kernel("geglu_backward", "TTT TT i")
_rope = Kernel("rope", "TFF T iiii i")
_rope_table = Kernel("rope_table", "LFF ii d")
_next_positions = Kernel("next_positions", "LLB i")
_embed = {torch.float32: Kernel("embed_fp32", "LF T iii f"), torch.bfloat16: Kernel("embed_bf16", "LH T iii f")}
_embed_int8 = Kernel("embed_int8", "LCF T iii f")
_embed_int4 = Kernel("embed_int4", "LUH T iiiii f")
_add = Kernel("add", "TTT i")
_copy = Kernel("copy", "AA i")
_soft_cap = Kernel("soft_cap", "FF i f")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Give y, and for its gradient x, the weight and 1 / sqrt(mean(x^2) + eps) of each row."""
    w, D = fp32(weight), weight.shape[0]
    y, rstd = empty_like(x), w.new_empty(x.shape[:-1])
    _rms_norm_forward(x.dtype, x.contiguous(), w, y, rstd, rstd.numel(), D, eps)
    return y, (x, weight, rstd)


def rms_norm_backward(needed: object, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    w, D, rows = fp32(weight), weight.shape[0], rstd.numel()
    dx, dweight = empty_like(x), empty_like(w)
    shares = w.new_empty((rows + _NORM_ROWS - 1) // _NORM_ROWS, D)  # scratch: each task's dweight
    _rms_norm_backward(x.dtype, dy.contiguous(), x.contiguous(), w, rstd, dx, shares, dweight, rows, D)
    return dx, dweight.to(weight.dtype)


def geglu(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = empty_like(gate)
    _geglu_forward(gate.dtype, gate.contiguous(), up.contiguous(), y, gate.numel())
    return y, (gate, up)


def geglu_backward(needed: object, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_like(gate), empty_like(up)
    inputs = (dy.contiguous(), gate.contiguous(), up.contiguous())
    _geglu_backward(gate.dtype, *inputs, dgate, dup, gate.numel())
    return dgate, dup


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _turned(x, cos, sin, inverse=False), (cos, sin)


def rope_backward(needed: object, dy: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
    return (_turned(dy, cos, sin, inverse=True),)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    y, (B, T, H, K) = empty_like(x), x.shape
    _rope(x.dtype, x.contiguous(), fp32(cos), fp32(sin), y, B * T, H, K, cos.shape[-1], inverse)
    return y


def rope_table(positions: Tensor, rope_width: int, base: float) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, rope_width // 2)
    cos, sin = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    _rope_table(torch.float32, whole_numbers(positions), cos, sin, positions.numel(), rope_width // 2, base)
    return cos, sin


def next_positions_(position: Tensor) -> tuple[Tensor, Tensor]:
    """Give positions = position (B, 1) and reset = positions == 0, and add one to position (B,) in place."""
    positions = torch.empty(len(position), 1, dtype=torch.int64, device="cpu")
    reset = torch.empty(len(position), 1, dtype=torch.bool, device="cpu")
    _next_positions(torch.float32, position, positions, reset, len(position))
    return positions, reset


def embed(tokens: Tensor, weight: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
    (V, D), ids = weight.shape, whole_numbers(tokens)
    y = torch.empty(*tokens.shape, D, dtype=dtype, device="cpu")
    scale = 1.0 if scale is None else scale
    _check(_embed[weight.dtype](dtype, ids, weight.contiguous(), y, ids.numel(), D, V, scale), ids, V)
    return y


def quantized_embed(
    tokens: Tensor, q: Tensor, scales: Tensor, width: int, group: int | None, dtype: torch.dtype, scale: float | None
) -> Tensor:
    V, ids = q.shape[0], whole_numbers(tokens)
    y = torch.empty(*tokens.shape, width, dtype=dtype, device="cpu")
    tensors = (ids, q.contiguous(), scales.contiguous(), y)
    scale = 1.0 if scale is None else scale
    if group is None:
        wrong = _embed_int8(dtype, *tensors, ids.numel(), width, V, scale)
    else:
        wrong = _embed_int4(dtype, *tensors, ids.numel(), width, 2 * q.shape[1], group, V, scale)
    _check(wrong, ids, V)
    return y


def _check(wrong: int, ids: Tensor, V: int) -> None:
    if wrong:
        raise ValueError(f"token {int(ids.flatten()[wrong - 1])} is not within 0 .. {V - 1}, the rows of the table")


def add(x: Tensor, y: Tensor) -> Tensor:
    out = empty_like(x)
    _add(x.dtype, x.contiguous(), y.contiguous(), out, x.numel())
    return out


def copy_(target: Tensor, source: Tensor) -> None:
    _copy(torch.float32, source.contiguous(), target, target.nbytes)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    out = empty_like(logits)
    _soft_cap(torch.float32, logits.contiguous(), out, logits.numel(), cap)
    return out
