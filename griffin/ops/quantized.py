"""Weights in 8 or 4 bits: how numbers become small whole ones and back, and the product with them.

    int8:  w[o, k] = scale[o] q[o, k],               q = -127 .. 127, one scale per output
    int4:  w[o, k] = scale[o, k / G] (q[o, k] - 8),  q = 0 .. 15, one scale per output and G inputs

int8 q is (O, K) int8 with scale (O,) fp32. int4 q is (O, P / 2) uint8 with scale (O, P / G) bf16, P being K rounded up
to whole groups and blocks of 64. A block is 16 little-endian 16-bit words; word j holds inputs j, 16 + j, 32 + j and
48 + j of its block, lowest bits first: one mask or shift gives 16 neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device
from griffin.ops.linear import PANEL_ELEMENTS, by_panels
from griffin.ops.op import differentiable

GROUPS = (32, 64, 128)
NOT_FINITE = "a weight that is not finite cannot be quantised"
BLOCK = 64
# An int4 scale is the best of these, in squared error, times the group's largest value over -8: clipping that one a
# little leaves finer steps for all the others.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Give q and scale of a (O, K) weight, row by row: any slab of rows gives what the whole would.

    Raises:
        ValueError: a weight is not finite.
    """
    wide = _finite(weight)
    scale = wide.abs().amax(dim=1) / 127
    q = (wide / torch.where(scale == 0, 1.0, scale)[:, None]).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale


def quantize_int4(weight: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """As quantize_int8, for 4 bits and a scale for each `group` inputs.

    Raises:
        ValueError: a weight is not finite, or group is not 32, 64 or 128.
    """
    if group not in GROUPS:
        raise ValueError(f"group={group} must be one of {', '.join(map(str, GROUPS))}")
    O, K = weight.shape
    P = padded_width(K, group)
    factors = torch.tensor(_SHRINK, dtype=torch.float64, device="cpu").div_(-8).float()
    if (kernels := device.kernels("quantize_int4", weight)) is not None:
        q, scale = kernels.quantize_int4(weight.detach(), factors, P, group)
        if not torch.isfinite(scale).all():
            raise ValueError(NOT_FINITE)
        return q, scale
    groups = F.pad(_finite(weight), (0, P - K)).view(O, P // group, group)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best_error = torch.full_like(largest, torch.inf, dtype=torch.float64)
    best_scale, best_q = torch.zeros_like(largest), torch.zeros_like(groups)
    for factor in factors.tolist():
        scale = (largest * factor).bfloat16().float()
        q = (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
        # In fp64: two scales may be equally good to fp32, and the order of a sum would choose.
        error = (q * scale - groups).double().square_().sum(dim=2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_q = torch.where(better, scale, best_scale), torch.where(better, q, best_q)
    words = (best_q + 8).to(torch.int32).view(O, P // BLOCK, 4, 16)
    word = words[:, :, 0] | words[:, :, 1] << 4 | words[:, :, 2] << 8 | words[:, :, 3] << 12  # 0 .. 65535
    low, high = (word & 255).to(torch.uint8), (word >> 8).to(torch.uint8)
    return torch.stack([low, high], dim=-1).view(O, P // 2), best_scale[..., 0].bfloat16()


def dequantize(q: Tensor, scale: Tensor, in_width: int, group: int | None, out: Tensor | None = None) -> Tensor:
    """Give the (O, in_width) fp32 weights that q and scale stand for, in `out` if given; group is None for int8."""
    check_quantized(q, scale, in_width, group)
    if group is None:
        kernels = device.kernels("dequantize", scale, q, out)
        if scale.dtype == torch.float32 and kernels is not None:
            return kernels.widen_int8(q, scale, out)
        return torch.mul(q, scale.float()[:, None], out=out)
    if scale.dtype == torch.bfloat16 and (kernels := device.kernels("dequantize", scale, q, out)) is not None:
        return kernels.widen_int4(q, scale, in_width, group, out)
    O, P = q.shape[0], 2 * q.shape[1]
    pairs = q.reshape(O, P // BLOCK, 16, 2).to(torch.int32)
    word = pairs[..., 0] | pairs[..., 1] << 8
    numbers = torch.stack([word >> shift & 15 for shift in (0, 4, 8, 12)], dim=2).view(O, P // group, group) - 8
    wide = (numbers.float() * scale.float()[..., None]).view(O, P)[:, :in_width]
    return wide.contiguous() if out is None else out.copy_(wide)


def quantized_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute x W^T + b with W in 8 or 4 bits; sums in fp32, rounded once to the result's dtype.

    On a CPU up to 16 rows of x meet W as it is stored: x is rounded to 16-bit whole numbers, a scale for each 128
    inputs (int8) or group (int4), so that its error is 2^-16 of the largest of them. More rows meet int8 W as it is
    stored too, if the CPU multiplies 8-bit numbers exactly (VNNI): x is then two of them per value, with an error of
    2^-16 of the row's largest. In all other cases W is widened to fp32 a panel at a time, and x is not rounded. So a
    prompt read whole and in short pieces gives results that differ by that much, about 3e-5 of them.

    On a GPU up to 64 rows meet W as it is stored, and nothing is rounded but sums. For more W is widened to x.dtype (to
    `dtype`, if given) whole: in bf16, each weight is rounded.

    Args:
        x: (..., K) any floating dtype.
        q, scale: from quantize_int8 (group None) or quantize_int4.
        bias: (O,) or None.
        group: inputs to a scale; None for int8.
        dtype: of the result, no narrower than x's; None means x's.

    Returns:
        (..., O) in dtype. x and bias have a gradient, dx = dy W, for which W is widened a panel at a time and kept
        nowhere; q and scale are numbers that stand for others and have none.

    Raises:
        ValueError: the shapes do not fit.
    """
    K, O = x.shape[-1], q.shape[0]
    check_quantized(q, scale, K, group, of="x")
    if bias is not None and bias.shape != (O,):
        raise ValueError(f"bias is {tuple(bias.shape)}; this weight needs {(O,)}")
    dtype = dtype or x.dtype
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return differentiable(_with_kept, _gradient, x, bias, q, scale, group, dtype)
    return _product(x, q, scale, bias, group, dtype)


def _with_kept(
    x: Tensor, bias: Tensor | None, q: Tensor, scale: Tensor, group: int | None, dtype: torch.dtype
) -> tuple[Tensor, tuple[object, ...]]:
    return _product(x, q, scale, bias, group, dtype), (
        q,
        scale,
        group,
        x.shape,
        x.dtype,
        None if bias is None else bias.dtype,
    )


def _gradient(
    needed: Sequence[bool],
    dy: Tensor,
    q: Tensor,
    scale: Tensor,
    group: int | None,
    shape: torch.Size,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W;  db = sum of dy over rows: sums in fp32 (fp64 for fp64), each rounded once."""
    K, O = shape[-1], q.shape[0]
    rows = dy.reshape(-1, O)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dx = None
    if needed[0]:
        product = wide if dy.device.type == "cpu" else dy.dtype
        sums = torch.zeros(rows.shape[0], K, dtype=wide, device=dy.device)
        step = max(BLOCK, PANEL_ELEMENTS // max(1, K))
        for first in range(0, O, step):
            panel = slice(first, first + step)
            sums += rows[:, panel].to(product) @ dequantize(q[panel], scale[panel], K, group).to(product)
        dx = sums.view(shape).to(dtype)
    db = rows.sum(dim=0, dtype=wide).to(bias_dtype) if needed[1] else None
    return dx, db


def _product(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, group: int | None, dtype: torch.dtype) -> Tensor:
    K, O = x.shape[-1], q.shape[0]
    shape, rows = x.shape[:-1], x.reshape(-1, K)
    if (kernels := device.kernels("quantized_linear", rows, bias, size=rows.shape[0])) is not None:
        if group is None:
            y = kernels.linear_int8(rows, q, scale, bias, dtype)
        else:
            y = kernels.linear_int4(rows, q, scale, bias, group, dtype)
        return y.view(*shape, O)
    rows = rows.to(dtype)
    kernels = device.kernels("quantized_linear_many", rows, bias, size=rows.shape[0]) if group is None else None
    if x.device.type != "cpu" or dtype == torch.float64:
        wide = torch.promote_types(dtype, torch.float32) if x.device.type == "cpu" else dtype
        y = F.linear(rows, dequantize(q, scale, K, group).to(wide), None if bias is None else bias.to(wide))
    elif kernels is not None and kernels.multiplies_int8(K):
        y = kernels.linear_int8_many(rows, q, scale, bias)
    else:

        def widen(panel: slice, out: Tensor) -> None:
            dequantize(q[panel], scale[panel], K, group, out)

        y = by_panels(rows, O, widen, bias)
    return y.view(*shape, O)


def check_quantized(q: Tensor, scale: Tensor, in_width: int, group: int | None, of: str = "a row") -> None:
    """Raise ValueError unless q and scale are as quantize_int8 or quantize_int4 lays a weight of `in_width` inputs."""
    if group is None:
        fits = q.dtype == torch.int8 and q.shape[1:] == (in_width,) and scale.shape == q.shape[:1]
    else:
        P = padded_width(in_width, group) if group in GROUPS else -1
        fits = q.dtype == torch.uint8 and q.shape[1:] == (P // 2,) and scale.shape == (q.shape[0], P // group)
    if not fits:
        raise ValueError(
            f"{of} has {in_width} inputs, but the weight is {tuple(q.shape)} {q.dtype} with scales "
            f"{tuple(scale.shape)} {scale.dtype} and group={group}"
        )


def padded_width(in_width: int, group: int) -> int:
    """P: in_width rounded up to whole groups and blocks."""
    unit = max(group, BLOCK)
    return -(-in_width // unit) * unit


def _finite(weight: Tensor) -> Tensor:
    wide = weight.detach().float()
    if not torch.isfinite(wide).all():
        raise ValueError(NOT_FINITE)
    return wide
