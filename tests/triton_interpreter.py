"""A pytest plugin that runs tests of any file with the Triton kernels, in Triton's interpreter.

`-p triton_interpreter`, with TRITON_INTERPRET=1. `--shard=1/2` takes every second test. Tests of an op without Triton
kernels are left out, as samples are that say so, and float16 but for the first sample of an op: it goes the ways of
bfloat16. `--every-sample` takes all of these.

The interpreter keeps bfloat16 as numpy's uint16, which this mends where kernels of this library meet it.

As of Triton 3.7: `tl.dot` multiplies the bit patterns as integers, and a conversion to bfloat16 drops bits instead of
rounding to nearest even. Arithmetic on bfloat16 itself is refused here: a kernel converts to float32 first.

The sums of a `tl.dot` have numpy's order there, another one on every kind of CPU and for every shape; here they are
rounded to float32 after every 16 products, as a card's matrix units do.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_DOT_STEP = 16


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


def _remember_types():
    """The attributes of a block type or tensor that its element type and shape decide, made once for each."""
    block_type, tensor, known = tl.core.block_type, tl.core.tensor, {}
    make_type, make_tensor = block_type.__init__, tensor.__init__

    def remembered_type(self, element_ty, shape):
        key = (element_ty.name, *(getattr(n, "value", n) for n in getattr(shape, "values", shape)))
        if key not in known:
            make_type(self, element_ty, shape)
            example = object.__new__(tensor)
            make_tensor(example, None, self)
            self.of_tensors = {name: example.__dict__[name] for name in ("shape", "numel", "dtype")}
            known[key] = self.__dict__
        self.__dict__.update(known[key])

    def remembered_tensor(self, handle, type):
        if type.is_block():
            self.__dict__.update(type.of_tensors, handle=handle, type=type)
        else:
            make_tensor(self, handle, type)

    block_type.__init__, tensor.__init__ = remembered_type, remembered_tensor


def _remember_shapes():
    """Shapes that are broadcast to each other, in numpy's numbers; the front end's are objects, compared in Python."""
    semantic, types = triton.language.semantic.TritonSemantic, {}
    broadcast = semantic.broadcast_impl_value

    def widened(self, x, shape):
        if x.handle.data.shape == shape:
            return x
        key = (x.dtype.name, shape)
        if key not in types:
            types[key] = tl.block_type(x.dtype, list(shape))
        return self.tensor(TensorHandle(np.broadcast_to(x.handle.data, shape), x.dtype), types[key])

    def remembered(self, left, right):
        if not (left.type.is_block() and right.type.is_block()):
            return broadcast(self, left, right)
        a, b = left.handle.data.shape, right.handle.data.shape
        if a == b:
            return left, right
        if len(a) != len(b):
            return broadcast(self, left, right)
        shape = np.broadcast_shapes(a, b)
        return widened(self, left, shape), widened(self, right, shape)

    semantic.broadcast_impl_value = remembered


def _make_faster():
    """Most of the interpreter's time, which is no arithmetic: it puts its own functions into triton.language at each
    call of each function (here once for each module, to stay), makes types and compares shapes for each operation and a
    table of dtypes for each cast, and does each addition of integers a second time in 64 bits, to see whether it
    overflows.
    """
    _remember_types()
    _remember_shapes()
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patch(fn)
            patched.add(id(fn.__globals__))
        return interpreter._LangPatchScope()  # with nothing to undo

    dtype_of = functools.cache(interpreter._get_np_dtype)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else dtype_of(t.scalar)
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def mend():
    """Changes the interpreter of this process."""
    _make_faster()
    dot, cast, binary = (getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "binary_op"))

    def mended_dot(self, a, b, c, *rest):
        a, b = _widened(a), _widened(b)
        if c.data.dtype != np.float32:
            return dot(self, a, b, c, *rest)
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), c.data
        for k in range(0, left.shape[-1], _DOT_STEP):
            total = (total + left[..., k : k + _DOT_STEP] @ right[..., k : k + _DOT_STEP, :]).astype(np.float32)
        return TensorHandle(total, c.dtype.scalar)

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


mend()


def pytest_addoption(parser):
    parser.addoption("--every-sample", action="store_true", help="those too that are left out where time is scarce")
    parser.addoption("--shard", default="1/1", help="i/n: every n-th test, from the i-th on")


def pytest_collection_modifyitems(config, items):
    import genai_kernels as gk

    with gk.use_backend("triton"):
        pass  # loads the kernels

    def has_kernels(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        op, sample = parameters.get("op"), parameters.get("sample")
        if item.get_closest_marker("cpu_only") or (sample and sample.cpu_only):
            return False
        if sample and not config.getoption("--every-sample"):
            again = parameters.get("dtype") is torch.float16 and op is not None and sample is not op.samples[0]
            if again or not sample.interpreted:
                return False
        return op is None or "triton" in op.gpu

    index, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = [item for item in items if has_kernels(item)][index - 1 :: shards]


@pytest.fixture(autouse=True)
def _in_triton():
    import genai_kernels as gk

    with gk.use_backend("triton"):
        yield
