"""embed: rows of a table as activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.ops import device
from griffin.ops.quantized import check_quantized, dequantize


def embed(tokens: Tensor, weight: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """Compute y[...] = weight[token] rounded to dtype, times scale, rounded again.

    Args:
        tokens: (...) whole numbers in 0 .. V - 1.
        weight: (V, D) any floating dtype.
        dtype: of the result.
        scale: None means 1.

    Returns:
        (..., D) in dtype.

    Gradient for weight.

    Raises:
        ValueError: a token is no row, or none is a whole number: of a kernel. PyTorch says IndexError or RuntimeError.
    """
    kernels = device.kernels("embed", weight, tokens)
    if kernels is not None and dtype in kernels.DTYPES:
        return kernels.embed(tokens, weight, dtype, scale)
    return _scaled(F.embedding(tokens, weight).to(dtype), scale)


def quantized_embed(
    tokens: Tensor,
    q: Tensor,
    scales: Tensor,
    in_width: int,
    group: int | None,
    dtype: torch.dtype,
    scale: float | None = None,
) -> Tensor:
    """As embed, with a table of `quantize_int8` (group None) or `quantize_int4`. There is no gradient."""
    check_quantized(q, scales, in_width, group)
    kernels = device.kernels("quantized_embed", scales, tokens, q)
    if kernels is not None and dtype in kernels.DTYPES:
        return kernels.quantized_embed(tokens, q, scales, in_width, group, dtype, scale)
    flat = tokens.flatten()  # (not q[flat]: there -1 would be the last row)
    rows = dequantize(q.index_select(0, flat), scales.index_select(0, flat), in_width, group).to(dtype)
    return _scaled(rows.view(*tokens.shape, in_width), scale)


def _scaled(rows: Tensor, scale: float | None) -> Tensor:
    return rows if scale is None else rows * scale
