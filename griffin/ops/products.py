"""Products of matrices with fp32 sums and results, of bf16 numbers where the device has instructions for them.

The loss and the gradients of linears are made of these: sums over rows are sums over neighbours of what is transposed.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from griffin.ops import device


def narrowest(x: Tensor) -> torch.dtype:
    """The dtype that x is best multiplied in with fp32 sums: its own on a GPU, and bf16 on a CPU that multiplies it."""
    if x.is_cuda or bf16_kernels(x) is not None:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def bf16_kernels(x: Tensor, *others: Tensor) -> ModuleType | None:
    """The kernels that multiply bf16 x with what can be rounded to it, where the CPU has an instruction for that."""
    if x.dtype != torch.bfloat16:
        return None
    kernels = device.kernels("product", x, *others)
    return kernels if kernels is not None and kernels.multiplies_bf16() else None


def transposed(x: Tensor) -> Tensor:
    """x^T of a matrix: as `product` takes it."""
    kernels = bf16_kernels(x)
    return x.T if kernels is None else kernels.transposed(x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b^T: (N, K), (O, K) -> (N, O) in fp32 (fp64 if either is)."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if (kernels := bf16_kernels(a, b)) is not None:
        return kernels.wide_linear(a, b.to(a.dtype))
    if a.is_cuda and a.dtype == b.dtype != dtype:
        return torch.mm(a, b.T, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype).T


def add_product_(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a b^T, which has no memory of its own where that can be avoided; `to` (N, O) is contiguous."""
    if (kernels := bf16_kernels(a, b)) is not None and to.dtype == torch.float32:
        kernels.add_linear_(to, a, b.to(a.dtype))
    elif a.dtype == b.dtype == to.dtype:
        to.addmm_(a, b.T)
    else:
        to += product(a, b)
