"""Triton's interpreter, made fast enough for tests, and to work with any numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import ScanOps


def numbers_from_arrays_of_one() -> None:
    """Let an array of one be a whole number, as Triton 3.7 does: 3.6 leaves it to int(), which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def scan_by_rows() -> None:
    """Replace associative_scan, which goes element by element, by one with the same order of sums for whole rows."""

    def generic_scan(self: Any, inputs: list[Any]) -> list[Any]:
        rows = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
        results = [np.empty_like(row) for row in rows]
        before = tuple(row[0] for row in rows)
        for result, first in zip(results, before, strict=True):
            result[0] = first
        for index in range(1, len(rows[0])):
            earlier = (self.to_tensor(value, tensor.dtype) for value, tensor in zip(before, inputs, strict=True))
            now = (self.to_tensor(row[index], tensor.dtype) for row, tensor in zip(rows, inputs, strict=True))
            combined = self.combine_fn.fn(*earlier, *now)
            combined = combined if isinstance(combined, tuple) else (combined,)
            before = tuple(value.handle.data for value in combined)
            for result, value in zip(results, before, strict=True):
                result[index] = value
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(result, 0, self.axis)), tensor.dtype)
            for result, tensor in zip(results, inputs, strict=True)
        ]

    ScanOps.generic_scan = generic_scan
