"""rope: rotary position embedding of the first part of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops import device
from griffin.ops.cpu.library import check_whole
from griffin.ops.op import differentiable


def rope_table(
    positions: Tensor, rope_width: int, base: float = 10_000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of p * base^(-2i / rope_width), i = 0 .. rope_width/2 - 1.

    Angles are formed in fp64: in fp32 they are off by 0.004 radians at position 100,000, and a state can live longer.

    Args:
        positions: (B, T) whole numbers, offset of each token in its document.
        rope_width: channels that are rotated, even.
        base: wavelength base.
        dtype: of the table: fp32, or fp64 for activations in fp64.

    Returns:
        cos, sin: (B, T, rope_width / 2) in dtype.

    Raises:
        ValueError: positions are not whole numbers.
    """
    check_whole(positions)
    if dtype == torch.float32 and (kernels := device.kernels("rope_table", positions)) is not None:
        return kernels.rope_table(positions, rope_width, base)
    exponents = torch.arange(0, rope_width, 2, device=positions.device, dtype=torch.float64) / rope_width
    angles = positions.to(torch.float64)[..., None] * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def next_positions_(position: Tensor) -> tuple[Tensor, Tensor]:
    """Give the position of each row's next token and whether it starts a document, and add one to `position`.

    Args:
        position: (B,) int64, changed in place.

    Returns:
        positions: (B, 1) int64, what `position` was.
        reset: (B, 1) bool, positions == 0.

    Raises:
        ValueError: position is not (B,) int64.
    """
    if position.dim() != 1 or position.dtype != torch.int64:
        raise ValueError(f"position is {tuple(position.shape)} {position.dtype}; it must be (B,) int64")
    if position.is_contiguous() and (kernels := device.kernels("next_positions_", position)) is not None:
        return kernels.next_positions_(position)
    positions = position[:, None].clone()
    position += 1
    return positions, positions == 0


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + n) of each head by the table's angles, i < n; leave channels 2n and up alone.

        y_i = x_i cos_i - x_{i+n} sin_i;  y_{i+n} = x_{i+n} cos_i + x_i sin_i

    Args:
        x: (B, T, H, K), queries or keys; bf16, fp16, fp32 or fp64.
        cos, sin: (B, T, n) from `rope_table`, 2n <= K.

    Returns:
        (B, T, H, K) in x.dtype; products are in fp32 (fp64 for fp64).

    Gradient for x; none for the table.

    Raises:
        ValueError: the table does not fit x.

    Source: RoFormer, arXiv:2104.09864; half of each head as in Google's RecurrentGemma.
    """
    n = cos.shape[-1]
    if x.dim() != 4 or cos.shape != sin.shape or cos.shape != (*x.shape[:2], n) or 2 * n > x.shape[3]:
        raise ValueError(f"x {tuple(x.shape)}, table {tuple(cos.shape)}: they must be (B, T, H, K>=2n) and (B, T, n)")
    kernels = device.kernels("rope", x, cos, sin)
    if kernels is None:
        return _definition(x, cos, sin)
    return differentiable(kernels.rope, kernels.rope_backward, x, cos, sin)


def _definition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second, rest = x.split([n, n, x.shape[3] - 2 * n], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)
