"""Triton's interpreter, made fast enough for tests: its own associative_scan goes element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import ScanOps


def scan_by_rows() -> None:
    """Replace it by one with the same order of sums that takes whole rows."""

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
