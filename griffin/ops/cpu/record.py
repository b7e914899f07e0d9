"""Kernel calls recorded once and made again from C, on the same memory: a decode step without Python.

with recording() as calls:
    y = op(x)            # runs as always, and every kernel call is kept
again = Program(calls)
again.run()              # reads what is in x now, writes y
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from griffin.ops.cpu import library, pointwise
from griffin.ops.cpu.library import Call

_HARMLESS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}


class NotRecordableError(Exception):
    """Something was computed by other means than a kernel: making the calls again would leave it out."""


def available() -> bool:
    """Whether there are kernels whose calls can be kept."""
    return library.status()[0]


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Keep every kernel call of this thread, and refuse any PyTorch operation that computes, but sums and copies.

    Those (x + y of one shape and dtype, target.copy_(source), x.to(dtype)) are made by kernels, with the same results:
    so the model may say them as everyone does.

    Raises:
        NotRecordableError: an operation did, inside the `with`; the calls before it have been made.
        RuntimeError: there are no kernels.
    """
    if not library.status()[0]:
        raise RuntimeError(f"no CPU kernels: {library.status()[1]}")
    calls: list[Call] = []
    with _OnlyKernels(), library.keeping(calls):  # type: ignore[no-untyped-call]
        yield calls


class Program:
    """Calls to be made again, in order. It keeps their memory alive."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = tuple(calls)
        self._replay, self._pool = library.replay()
        table = (ctypes.c_void_p * (2 * len(calls)))()  # pairs of a function and its values: Call of csrc/abi.cpp
        for index, call in enumerate(calls):
            table[2 * index] = ctypes.cast(call.function, ctypes.c_void_p).value
            table[2 * index + 1] = ctypes.cast(ctypes.c_char_p(call.values), ctypes.c_void_p).value
        self._table = table

    def run(self) -> None:
        """Make the calls again.

        Raises:
            ValueError: a kernel found a whole number out of range; the calls before it have been made.
        """
        if wrong := self._replay(self._pool, self._table, len(self.calls)):
            raise ValueError(f"{self.calls[wrong - 1].name} was given a whole number that is out of range")


class _OnlyKernels(TorchDispatchMode):
    """Let views and new memory pass, make a kernel call of PyTorch's own sums and copies, and refuse all else."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func.overloadpacket.__name__ in _HARMLESS:
            return func(*args, **(kwargs or {}))
        result = None
        if func is torch.ops.aten.add.Tensor and not kwargs:
            result = _add(*args)
        elif func is torch.ops.aten.copy_.default and not kwargs:
            result = _copy(*args)
        elif func is torch.ops.aten._to_copy.default and kwargs and kwargs.keys() == {"dtype"}:
            result = _converted(args[0], kwargs["dtype"])
        if result is None:
            raise NotRecordableError(f"{func} is not a kernel")
        return result


def _add(x: Any, y: Any) -> Tensor | None:
    """x + y, where they are what the kernel takes."""
    if not (_fits(x, y) and x.dtype == y.dtype and x.shape == y.shape):
        return None
    return pointwise.add(x, y)


def _copy(target: Tensor, source: Tensor) -> Tensor | None:
    """target.copy_(source)."""
    same = source.dtype == target.dtype and source.shape == target.shape
    if not (same and _fits(target, source) and target.is_contiguous()):
        return None
    pointwise.copy_(target, source)
    return target


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """x.to(dtype)."""
    return library.converted(x, dtype) if _fits(x) and dtype in pointwise.DTYPES else None


def _fits(*values: Any) -> bool:
    return all(isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype in pointwise.DTYPES for x in values)
