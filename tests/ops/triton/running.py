"""What tests of the kernels share: an op's results with its gradients, and the names of the kernels it launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value: half a unit in its last place, and what sums add.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@contextmanager
def launches() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched inside the `with`, in order."""
    from triton.runtime.jit import KernelInterface

    names, original = [], KernelInterface.__getitem__

    def noted(kernel: Any, grid: tuple[int, ...]) -> Any:
        names.append(kernel.fn.__name__)
        return original(kernel, grid)

    KernelInterface.__getitem__ = noted
    try:
        yield names
    finally:
        KernelInterface.__getitem__ = original


def results(run: Callable[..., object], inputs: Sequence[Tensor], flows: Sequence[Tensor] = ()) -> list[Tensor]:
    """Outputs, then the gradients of all inputs for the cotangents `flows`; by default some that fit, in bf16."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = run(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    flows = flows or [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, leaves, flows, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*outputs, *grads)]


def assert_near(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the largest value of its fp64 counterpart."""
    for k, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        assert ours.shape == exact.shape
        if ours.numel():
            error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-2)
            assert error < tolerance, f"result {k}: {error:.1e}"


def strided(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]
