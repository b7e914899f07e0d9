"""Whether Triton's kernels may be called with given tensors."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from griffin.ops.cpu import library

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_serving_cpu = False  # inside `serving_cpu`


def status() -> tuple[bool, str]:
    """Whether the kernels serve CUDA tensors here, and why (not)."""
    if not _installed():
        return False, "triton is not installed; pip install triton (PyTorch for CUDA brings it)"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device here"
    return True, "Triton, compiled on first use"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called with these: plain CUDA tensors in fp32, bf16 or fp16; None is no tensor.

    fp64 is never served: there, PyTorch's operations are the reference. Nor are tensors that only stand for others
    (fake ones, distributed ones), nor what torch.compile traces: they take the definition.
    """
    if torch.compiler.is_compiling():
        return False
    given = [t for t in tensors if t is not None]
    if not given[0].is_cuda and not _serving_cpu:
        return False
    if any(type(t) not in _PLAIN or t.dtype not in _TYPES or t.device != given[0].device for t in given):
        return False
    return _serving_cpu or status()[0]


@contextmanager
def serving_cpu() -> Iterator[None]:
    """Call the Triton kernels for CPU tensors too, inside the `with`: for tests, under Triton's interpreter."""
    global _serving_cpu
    before, _serving_cpu = _serving_cpu, True
    try:
        with library.without_kernels():
            yield
    finally:
        _serving_cpu = before
