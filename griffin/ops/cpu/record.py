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

from torch.utils._python_dispatch import TorchDispatchMode

from griffin.ops.cpu import library
from griffin.ops.cpu.library import Call

_HARMLESS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}


class NotRecordableError(Exception):
    """Something was computed by other means than a kernel: making the calls again would leave it out."""


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Keep every kernel call of this thread, and refuse any PyTorch operation that computes.

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
    """Let views and new memory pass, and nothing else."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or func.overloadpacket.__name__ in _HARMLESS:
            return func(*args, **(kwargs or {}))
        raise NotRecordableError(f"{func} is not a kernel")
