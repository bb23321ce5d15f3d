"""Corrections to Triton's interpreter (3.6), which is wrong about bfloat16 where GPUs are right.

It rounds float32 to bfloat16 towards zero, and multiplies the bits of bfloat16 matrices as if they were integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def correct() -> None:
    """Replace the two operations, for the whole process."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        before, after = source.dtype.scalar, dtype.scalar
        if before == tl.float32 and after == tl.bfloat16:
            return TensorHandle(_narrow(source.data), after)
        if before == tl.bfloat16 and after == tl.float32:
            return TensorHandle(_widen(source.data), after)
        return cast(self, source, dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def _narrow(values: Any) -> Any:
    """The bits of bfloat16 that float32 values round to: to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _widen(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)
