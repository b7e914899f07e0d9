"""What stands between the larger ops of a model: a sum, another dtype, a copy into a state, the cap of the logits.

Each is one PyTorch operation where gradients are recorded. Elsewhere on a CPU it is a kernel, as every operation of a
decode step is: then the whole step can be recorded once and made again without Python (`griffin.ops.cpu.record`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.ops.cpu import library
from griffin.ops.cpu import pointwise as cpp


def add(x: Tensor, y: Tensor) -> Tensor:
    """Compute x + y, of one shape and dtype."""
    if library.direct(x, y) and x.dtype == y.dtype and x.shape == y.shape:
        return cpp.add(x, y)
    return x + y


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Give x in another dtype, rounded to nearest."""
    return library.converted(x, dtype) if library.direct(x) else x.to(dtype)


def assign_(target: Tensor, source: Tensor) -> None:
    """Overwrite `target` in place with `source`, of its shape. No gradient flows through it."""
    source = source.detach()
    same = source.dtype == target.dtype and source.shape == target.shape
    if same and library.direct(target, source) and target.is_contiguous():
        cpp.copy_(target, source)
    else:
        target.copy_(source)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Compute cap * tanh(logits / cap); None gives the logits as they are."""
    if cap is None:
        return logits
    if library.direct(logits) and logits.dtype == torch.float32:
        return cpp.soft_cap(logits, cap)
    return cap * torch.tanh(logits / cap)
