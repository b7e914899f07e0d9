"""Triton's interpreter, made right for bf16: its own tl.dot multiplies bit patterns, and it cuts off, not rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_convert, _cast, _dot = interpreter._convert_float, InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def bfloat16_by_value() -> None:
    """Replace its conversions and its tl.dot. Arithmetic on bf16 itself stays wrong: kernels do theirs in fp32."""
    interpreter._convert_float = _converted
    InterpreterBuilder.cast_impl = _cast_by_fp32
    InterpreterBuilder.create_dot = _dot_of_fp32


def _converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.bfloat16 and target == tl.float32:
        return data.astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        bits = data.view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # ties to even
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
    return _convert(data, source, target, rounding)


def _cast_by_fp32(self: Any, given: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and given.dtype.scalar != tl.float32:
        given = _cast(self, given, tl.float32)
    return _cast(self, given, target)


def _dot_of_fp32(self: Any, a: Any, b: Any, sums: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    wide = [
        TensorHandle(_converted(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if t.dtype.scalar == tl.bfloat16
        else t
        for t in (a, b)
    ]
    return _dot(self, *wide, sums, input_precision, max_num_imprecise_acc)
