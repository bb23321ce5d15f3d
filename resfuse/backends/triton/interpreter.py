"""Corrections to Triton's interpreter (3.6), where it is further from the truth than a GPU, or slower than need be.

It rounds float32 to bfloat16 towards zero, multiplies the bits of bfloat16 matrices as if they were integers, sums one
number after the other where a GPU adds in a tree, and replaces the functions of triton.language by its own, wrapped
once more, at every call of a function under triton.jit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def correct() -> None:
    """Replace what is wrong, and triton.language once and for all, in the whole process.

    Raises:
        ImportError: this is another release of Triton.
    """
    if not triton.__version__.startswith("3.6."):
        raise ImportError(f"TRITON_INTERPRET=1 needs the interpreter of Triton 3.6, not {triton.__version__}")
    cast, dot, add_up = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, ReduceOps.sum

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        before, after = source.dtype.scalar, dtype.scalar
        if before == tl.float32 and after == tl.bfloat16:
            return TensorHandle(_narrow(source.data), after)
        if before == tl.bfloat16 and after == tl.float32:
            return TensorHandle(_widen(source.data), after)
        return cast(self, source, dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        narrow = (tl.bfloat16, tl.float16)  # of float16 matrices NumPy's product is right, but takes 100 times as long
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype in narrow else x for x in (a, b)), *rest)

    def reduce_sum(self: Any, input: Any) -> Any:
        if input.dtype != tl.float32:
            return add_up(self, input)
        return self.to_tensor(_tree_sum(input.handle.data, self.axis, self.keep_dims), input.dtype)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    ReduceOps.sum = reduce_sum
    # Every sum and product of integers done again in 64 bits, to check it: half of all time, and GPUs do not either.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_language()


def _patch_language() -> None:
    """Do at once what `_patch_lang` does at every call, and have it do nothing from then on."""
    scope = interpreter._LangPatchScope()
    for module in (tl, tl.core):
        interpreter._patch_builtin(module, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(module, scope)
    for owner in (tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        interpreter._patch_builtin(owner, interpreter.interpreter_builder, scope)
    interpreter._patch_lang_tensor(tl.tensor, scope)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def _narrow(values: Any) -> Any:
    """The bits of bfloat16 that float32 values round to: to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _widen(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _tree_sum(values: Any, axis: int | None, keep_dims: bool) -> Any:
    """Over an axis (None: all) whose length is a power of two, as all of Triton's are."""
    parts = values.reshape(-1) if axis is None else np.moveaxis(values, axis, 0)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = parts[:half] + parts[half:]
    if not keep_dims:
        return parts[0]
    return parts.reshape((1,) * values.ndim) if axis is None else np.moveaxis(parts, 0, axis)
