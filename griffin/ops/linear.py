"""Matrix products: linear (any weights in floating point), block-diagonal ones, and the output matrix's fp32 logits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device, products
from griffin.ops.op import opaque

# Weights widened to fp32 at a time (8 MB), and rows of a bf16 x that meet them. Fewer stay nearer in the cache, but a
# product of them is slower: with 2**19 weights by a tenth, with 256 rows as much.
PANEL_ELEMENTS, PANEL_ROWS = 2**21, 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute y[..., o] = sum over k of x[..., k] weight[o, k] + bias[o], with fp32 sums, rounded once to x.dtype.

    Activations set the precision, fp32 weights stay the masters: where a device multiplies in one dtype (any but a
    CPU), weight and bias are cast to x.dtype first. So they are on a CPU that has an instruction for products of bf16,
    for more rows than a decode step has. On any other CPU they are used as they are, and widened a panel at a time
    where narrow ones meet many rows: it multiplies bf16 matrices at a hundredth of fp32's rate.

    Args:
        x: (..., K) any floating dtype.
        weight: (O, K) any floating dtype.
        bias: (O,) any floating dtype; None means none.

    Returns:
        (..., O) in x.dtype.

    Raises:
        ValueError: shapes disagree.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        found = None if bias is None else tuple(bias.shape)
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {found}: (..., K), (O, K), (O,)")
    if x.device.type != "cpu" or torch.float64 in (x.dtype, weight.dtype) or device.stands_for_others(x):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if x.dtype == weight.dtype == torch.float32 and _kernels(x, weight, bias) is None:
        return F.linear(x, weight, None if bias is None else bias.float())
    return _linear(x, weight, bias)


def output_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute hidden weight^T in fp32: sums are never rounded to bf16, whose grid near 20 is 0.125 wide.

    Args:
        hidden: (..., D) any floating dtype.
        weight: (V, D) any floating dtype.

    Returns:
        (..., V) fp32 (fp64 if either is fp64).
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if hidden.is_cuda and hidden.dtype == weight.dtype and dtype == torch.float32 and not torch.is_grad_enabled():
        rows: Tensor = torch.mm(hidden[None].flatten(0, -2), weight.T, out_dtype=dtype)
        return rows.view(*hidden.shape[:-1], -1)
    if hidden.device.type == "cpu" and dtype == torch.float32:
        if hidden.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            rows = hidden[None].flatten(0, -2)
            found = device.kernels("output_linear", rows, weight, size=rows.shape[0])
            taken = found is not None and rows.shape[0] <= found.most_rows(rows.dtype, weight.dtype)
            if found is not None and taken and weight.dtype == rows.dtype:
                return found.wide_linear(rows, weight).view(*hidden.shape[:-1], weight.shape[0])
        return linear(hidden.to(dtype), weight)
    if weight.dtype == dtype or torch.is_grad_enabled():
        return F.linear(hidden.to(dtype), weight.to(dtype))
    # Widened a slab at a time: the whole of a 256k vocabulary in fp32 would double a bf16 model's memory.
    slabs = [F.linear(hidden.to(dtype), slab.to(dtype)) for slab in weight.split(_SLAB_ROWS)]
    return torch.cat(slabs, dim=-1)


_SLAB_ROWS = 4096  # 42 MB of fp32 at D = 2560


def block_diagonal_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute y[n, j] = sum over i of x[n, i] weight[n, i, j] + bias[n, j] for each block n.

    Args:
        x: (B, T, R) any floating dtype, seen as (B, T, N, R / N).
        weight: (N, R / N, K), input channel first; any floating dtype. K is R / N, but for complex gates' R / 2N.
        bias: (N, K), likewise. Up to 16 tokens on a CPU meet both as they are, where no gradient is recorded; in
            all other cases they are cast to x.dtype first.

    Returns:
        (B, T, N * K) in x.dtype.

    Raises:
        ValueError: N blocks of weight's size do not make R channels.

    Source: Griffin, arXiv:2402.19427, section 2.4 (gates) and 4.1 (why blocks: no communication across devices).
    """
    B, T, R = x.shape
    N, block, out = weight.shape
    if N * block != R or bias.shape != (N, out):
        raise ValueError(f"x has {R} channels, but weight is {tuple(weight.shape)} and bias {tuple(bias.shape)}")
    kernels = device.kernels("block_diagonal_linear", x, weight, bias, size=B * T)
    if kernels is not None and weight.dtype == bias.dtype and out == block:
        return kernels.block_diagonal_linear(x, weight, bias)
    blocks = x.reshape(B * T, N, block).transpose(0, 1)
    y = torch.baddbmm(bias.to(x.dtype)[:, None], blocks, weight.to(x.dtype))  # (N, B * T, K)
    return y.transpose(0, 1).reshape(B, T, N * out)


def _fake(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    """dx = dy W;  dW = dy^T x;  db = sum of dy over rows: in fp32, each rounded once."""
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    rows, inputs = (t[None].flatten(0, -2) for t in (dy, x))  # (N, O), (N, K), also of a single row (K,)
    kernels = products.bf16_kernels(inputs, rows, weight)
    if ctx.needs_input_grad[0]:
        dx = _times(rows, weight) if kernels is None else kernels.linear(rows, kernels.transposed(weight), None)
        dx = dx.view(x.shape).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dw = products.product(products.transposed(rows), products.transposed(inputs)).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        db = rows.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    """(N, O), (O, K) -> (N, K) fp32, W widened a panel at a time."""
    y, wide = torch.zeros(rows.shape[0], weight.shape[1], dtype=torch.float32, device=rows.device), rows.float()
    step = _panel_rows(weight.shape[1])
    for first in range(0, weight.shape[0], step):
        panel = slice(first, first + step)
        y.addmm_(wide[:, panel], weight[panel].float())
    return y


@opaque("linear", fake=_fake, backward=_backward, save=_save)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if (kernels := _kernels(rows, weight, bias)) is not None:
        y = kernels.linear(rows, weight, bias)
    elif (kernels := products.bf16_kernels(rows, weight)) is not None and rows.shape[0] > 0:
        y = kernels.linear(rows, weight.to(x.dtype), bias)
    else:
        y = by_panels(rows, weight.shape[0], lambda panel, out: out.copy_(weight[panel]), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def by_panels(x: Tensor, out_width: int, widen: Callable[[slice, Tensor], object], bias: Tensor | None) -> Tensor:
    """Compute x W^T + b in fp32 with W made a panel of rows at a time, in memory that all panels share.

    Args:
        x: (N, K) fp32 or bf16.
        out_width: O, the rows of W.
        widen: called with a slice of W's rows and the fp32 tensor (rows, K) to write them to.
        bias: (O,) or None.

    Returns:
        (N, O) in x.dtype.
    """
    (N, K), O = x.shape, out_width
    wide, b = x.float(), None if bias is None else bias.float()
    y = x.new_empty(N, O)
    step = max(1, min(O, _panel_rows(K)))
    panel_memory = torch.empty(step, K, dtype=torch.float32, device="cpu")
    direct = x.dtype == torch.float32  # sums are the result
    num_rows = max(1, N) if direct else PANEL_ROWS
    num_sums = 0 if direct else min(N, num_rows) * step
    sum_memory = torch.empty(num_sums, dtype=torch.float32, device="cpu")
    for first in range(0, O, step):
        panel = slice(first, min(O, first + step))
        w = panel_memory[: panel.stop - first]
        widen(panel, w)
        for rows, out in zip(wide.split(num_rows), y[:, panel].split(num_rows), strict=True):
            sums = out if direct else sum_memory[: out.numel()].view(out.shape)
            if b is None:
                torch.mm(rows, w.T, out=sums)
            else:
                torch.addmm(b[panel], rows, w.T, out=sums)
            if not direct:
                out.copy_(sums)
    return y


def _panel_rows(in_width: int) -> int:
    return max(64, PANEL_ELEMENTS // max(1, in_width))


def _kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> ModuleType | None:
    """The kernels that multiply x with W as it is, where they are quicker than PyTorch's products of fp32."""
    rows = x.numel() // max(1, x.shape[-1])
    found = device.kernels("linear", x, weight, bias, size=rows)
    return found if found is not None and rows <= found.most_rows(x.dtype, weight.dtype) else None
