"""What the tests of the two recurrences share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from griffin.ops.triton import tiles

# Of the largest value. fp32: a few hundred steps with |a| <= 1; bf16 rounds by up to 2^-9 = 2e-3, gates included.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Triton 3.6's interpreter takes arrays of one for numbers.
QUIET = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched inside the `with`."""
    names, launch = [], tiles.launch

    def noting(kernel: object, *arguments: object, **constants: object) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(tiles, "launch", noting)
    yield names


def with_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], *rest: object
) -> list[Tensor]:
    """y, h_last and the gradients of all inputs through both, for cotangents that depend on shapes alone."""
    leaves = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
    y, last = op(*leaves, *rest)
    generator = torch.Generator().manual_seed(1)
    dy, dlast = (torch.randn(t.shape, generator=generator).bfloat16() for t in (y, last))
    grads = torch.autograd.grad((y, last), leaves, (dy.to(y.dtype), dlast.to(last.dtype)))
    return [y.detach(), last.detach(), *grads]


def assert_near(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-3)
        assert error < tolerance, f"number {index}, {tuple(ours.shape)}: {error:.1e}"
