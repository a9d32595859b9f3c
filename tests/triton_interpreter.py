"""Triton's interpreter keeps bfloat16 as numpy's uint16, which this mends where kernels of this library meet it.

As of Triton 3.7: `tl.dot` multiplies the bit patterns as integers, and a conversion to bfloat16 drops bits instead of
rounding to nearest even. Arithmetic on bfloat16 itself is refused here: a kernel converts to float32 first.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _holds_bits(handle):
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle):
    if not _holds_bits(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values):
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _patched_once(patch):
    """The interpreter puts its own functions into triton.language at each call of each function, which takes most of
    its time. Here they are put there once, and stay.
    """
    done = set()

    def patched(fn):
        if id(fn.__globals__) not in done:
            patch(fn)
            done.add(id(fn.__globals__))
        return interpreter._LangPatchScope()  # with nothing to undo

    return patched


def mend():
    """Changes the interpreter of this process."""
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    dot, cast, binary = (getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "binary_op"))

    def mended_dot(self, a, b, *rest):
        return dot(self, _widened(a), _widened(b), *rest)

    def mended_cast(self, source, target):
        result = cast(self, source, target)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16 and _holds_bits(result):
            return TensorHandle(_rounded(source.data), target.scalar)
        return result

    def mended_binary(self, left, right, operation):
        if _holds_bits(left) or _holds_bits(right):
            raise NotImplementedError(f"{operation.__name__} on bfloat16; convert to float32 first")
        return binary(self, left, right, operation)

    InterpreterBuilder.create_dot = mended_dot
    InterpreterBuilder.cast_impl = mended_cast
    InterpreterBuilder.binary_op = mended_binary
