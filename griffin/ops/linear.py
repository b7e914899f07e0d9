"""Matrix products that are not nn.Linear: block-diagonal ones, and the output matrix with its fp32 logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def block_diagonal_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute y[n, j] = sum over i of x[n, i] weight[n, i, j] + bias[n, j] for each block n.

    Args:
        x: (B, T, R) any floating dtype, seen as (B, T, N, R / N).
        weight: (N, R / N, R / N), input channel first; any floating dtype, cast to x.dtype.
        bias: (N, R / N), likewise.

    Returns:
        (B, T, R) in x.dtype.

    Raises:
        ValueError: N blocks of weight's size do not make R channels.

    Source: Griffin, arXiv:2402.19427, section 2.4 (gates) and 4.1 (why blocks: no communication across devices).
    """
    B, T, R = x.shape
    N, block, _ = weight.shape
    if N * block != R or weight.shape[2] != block or bias.shape != (N, block):
        raise ValueError(f"x has {R} channels, but weight is {tuple(weight.shape)} and bias {tuple(bias.shape)}")
    blocks = x.reshape(B * T, N, block).transpose(0, 1)
    y = torch.baddbmm(bias.to(x.dtype)[:, None], blocks, weight.to(x.dtype))  # (N, B * T, R / N)
    return y.transpose(0, 1).reshape(B, T, R)


def output_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute hidden weight^T in fp32: sums are never rounded to bf16, whose grid near 20 is 0.125 wide.

    Args:
        hidden: (..., D) any floating dtype.
        weight: (V, D) any floating dtype.

    Returns:
        (..., V) fp32 (fp64 if either is fp64).
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if weight.dtype == dtype or torch.is_grad_enabled():
        return F.linear(hidden.to(dtype), weight.to(dtype))
    if hidden.is_cuda and hidden.dtype == weight.dtype and dtype == torch.float32:
        rows: Tensor = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=dtype)
        return rows.view(*hidden.shape[:-1], -1)
    # Widened a slab at a time: the whole of a 256k vocabulary in fp32 would double a bf16 model's memory.
    slabs = [F.linear(hidden.to(dtype), slab.to(dtype)) for slab in weight.split(_SLAB_ROWS)]
    return torch.cat(slabs, dim=-1)


_SLAB_ROWS = 4096  # 42 MB of fp32 at D = 2560
