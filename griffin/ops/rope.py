"""rope: rotary position embedding of the first part of each head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from griffin.ops.cpu import library
from griffin.ops.cpu import pointwise as cpp


def rope_table(positions: Tensor, rope_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of p * base^(-2i / rope_width), i = 0 .. rope_width/2 - 1.

    Angles are formed in fp64: in fp32 they are off by 0.004 radians at position 100,000, and a state can live longer.

    Args:
        positions: (B, T) whole numbers, offset of each token in its document.
        rope_width: channels that are rotated, even.
        base: wavelength base.

    Returns:
        cos, sin: (B, T, rope_width / 2) fp32.

    Raises:
        ValueError: positions are not whole numbers.
    """
    library.check_whole(positions)
    if not torch.is_grad_enabled() and library.plain(positions):
        return cpp.rope_table(positions, rope_width, base)
    exponents = torch.arange(0, rope_width, 2, device=positions.device, dtype=torch.float64) / rope_width
    angles = positions.to(torch.float64)[..., None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


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
    if not torch.is_grad_enabled() and library.plain(position) and position.is_contiguous():
        return cpp.next_positions(position)
    positions = position[:, None].clone()
    position += 1
    return positions, positions == 0


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + n) of each head by the table's angles, i < n; leave channels 2n and up alone.

        y_i = x_i cos_i - x_{i+n} sin_i;  y_{i+n} = x_{i+n} cos_i + x_i sin_i

    Args:
        x: (B, T, H, K), queries or keys; bf16, fp16, fp32 or fp64.
        cos, sin: (B, T, n) fp32 from `rope_table`, 2n <= K.

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
    if library.direct(x, cos, sin):
        return cpp.rope(x, cos, sin)
    return torch.ops.griffin.rope(x, cos, sin)  # type: ignore[no-any-return]


# Composite, not a custom_op: where no kernel is registered, PyTorch differentiates, fuses and shards the definition.
_library = torch.library.Library("griffin", "FRAGMENT")
_library.define("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor")


@torch.library.impl(_library, "rope", "CompositeImplicitAutograd")
def _definition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second, rest = x.split([n, n, x.shape[3] - 2 * n], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)


@torch.library.impl(_library, "rope", "CPU")
def _cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return cpp.rope(x, cos, sin) if library.serves(x) else _definition(x, cos, sin)


@torch.library.impl(_library, "rope", "AutogradCPU")
def _autograd_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Rope.apply(x, cos, sin) if library.serves(x) else _definition(x, cos, sin)  # type: ignore[no-untyped-call]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cpp.rope(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return cpp.rope(dy, *ctx.saved_tensors, inverse=True), None, None
