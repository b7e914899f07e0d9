"""Calls of the attention kernels. Contracts are those of the ops of the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops.cpu.library import Kernel, empty_like

SLOTS = 64  # of csrc/attention.cpp

_ring_attention = Kernel("ring_attention", "pppp pp iiiii")
_ring_write = Kernel("ring_write", "ppp pp iii")


def ring_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    (B, S, G, K), H = keys.shape, queries.shape[2]
    out = empty_like(queries)
    scratch = torch.empty(B * -(-S // SLOTS) * H * (K + 2))
    inputs = (queries.contiguous(), keys.contiguous(), values.contiguous(), positions.to(torch.int64).contiguous())
    _ring_attention(queries.dtype, *inputs, out, scratch, B, S, H, G, K)
    return out


def ring_write_(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    B, S, G, K = keys.shape
    inputs = (k.contiguous(), v.contiguous(), positions.to(torch.int64).contiguous())
    _ring_write(keys.dtype, *inputs, keys, values, B, S, G * K)
