"""Judges the CUDA kernels in the simulator: `python checks.py NAME [ARGUMENTS]`, with CUDA_SIMULATOR_LIBRARY naming the
library. Prints a line for everything that is wrong, and ends with status 1 if there was one.

conformance OPS DRAWS  the accuracy rule over the samples of the ops, forward and backward
lengths OPS LENGTHS    the same over rows of these lengths: every tile of the row kernels, their ends, and none
layouts OPS            results from strided and unaligned tensors have the bits of those from contiguous ones
repeat OPS             the same bits from run to run
limits                 what the GPU path promises at its limits
judge OPS              conformance and lengths, shortly, up to the first complaint: for planted faults
"""

import sys

import load  # noqa: F401  the simulator's library in the place of the package's
import torch
from calls import run, same_bits

import genai_kernels as gk
from genai_kernels.accuracy import map_tensors, verify_sample
from genai_kernels.registry import FLOATS, OPS, Make, Sample

torch.set_num_threads(1)


def complain(op, sample, dtype, draws):
    for verdict in verify_sample(OPS[op], sample, dtype, draws=draws):
        if not verdict.ok:
            yield f"{op} {sample.name} {dtype}, {verdict.what}: {verdict.complaint}"


def conformance(names, draws):
    for name in names.split(","):
        for sample in OPS[name].samples:
            for dtype in FLOATS:
                if not sample.bench:
                    yield from complain(name, sample, dtype, int(draws))


def of_length(name, n, rows):
    """Samples of an op with rows of n elements, and with huge elements where it sums squares."""

    def scales(m):
        return 1.0 if m.dtype == torch.float16 else 1e30

    def tables(m):
        angle = m.float32(rows, n)
        return angle.cos(), angle.sin()

    def states(m):
        return m(rows, 2, n), m.float32(2, rows), m(rows, 2, n), m.float32(2, rows)

    builds = {
        "rms_norm": [
            lambda m: ((m(rows, n), m(n)), {}),
            lambda m: ((m(rows, n, scale=scales(m)), m.float32(n)), {}),
        ],
        "fused_add_rms_norm": [lambda m: ((m(rows, n), m(rows, n), m(n)), {})],
        "layer_norm": [
            lambda m: ((m(rows, n, shift=30.0), m(n), m(n)), {}),
            lambda m: ((m(rows, n, scale=scales(m)), None, m(n)), {"residual": m(rows, n)}),
        ],
        "rotary_embedding": [lambda m: ((m(rows, 5, 2 * n + 1), *tables(m)), {})],
        "merge_attention_states": [lambda m: (states(m), {})],
    }
    gated = [lambda m: ((m(rows, 2 * n),), {})]
    return [Sample(f"{rows}x{n}", build) for build in builds.get(name, gated)]


def lengths(names, given):
    for name in names.split(","):
        for n in map(int, given.split(",")):
            # 31 rows: 16 blocks of two in backward, as many as sum_blocks has warps
            for sample in of_length(name, n, 3 if n > 2000 else 31 if n > 1000 else 9):
                for dtype in FLOATS:
                    yield from complain(name, sample, dtype, 8 if n < 300 else 2)


def strided(t):
    return torch.full((*t.shape, 3), torch.nan, dtype=t.dtype)[..., 1].copy_(t.detach())


def unaligned(t):
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    return flat[1:].view(t.shape).copy_(t.detach())


def pitched(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), torch.nan, dtype=t.dtype)
    return wide[..., :-5].copy_(t.detach())


def layouts(names):
    for name in names.split(","):
        for n in (64, 72, 1032, 4096):
            sample = of_length(name, n, 4)[-1]
            for dtype in FLOATS:
                call = map_tensors(lambda t: t.requires_grad_(), sample.build(Make(dtype)))
                expected = run(OPS[name].function, call)
                for layout in (strided, unaligned, pitched):
                    moved = map_tensors(lambda t, to=layout: to(t).requires_grad_(), call)
                    if not same_bits(run(OPS[name].function, moved), expected):
                        yield f"{name} {n} {dtype}: {layout.__name__} tensors give other bits"


def limits():
    x, angle = torch.randn(4, 2, 16), torch.randn(9, 8)
    given = torch.tensor([0, -1, 9, 8])
    for positions in (given, given.int(), torch.tensor([0, -(2**40), 2**40, 8])):
        y = gk.rotary_embedding(x, angle.cos(), angle.sin(), positions)
        good = gk.rotary_embedding(x[::3], angle.cos(), angle.sin(), torch.tensor([0, 8]))
        if not y[1:3].isnan().all() or not torch.equal(y[::3], good):
            yield "rotary_embedding: positions outside of the table: expected NaN in their tokens and nowhere else"
    for call in (
        lambda: gk.rms_norm(x.double()),
        lambda: gk.layer_norm(x.double()),
        lambda: gk.silu_and_mul(x.double()),
        lambda: gk.rotary_embedding(x.double(), angle[:4].cos(), angle[:4].sin()),
    ):
        try:
            call()
            yield "float64 was not refused"
        except NotImplementedError as error:
            if "expected float32, bfloat16 or float16 on CUDA, got float64" not in str(error):
                yield str(error)
    for n in (8, 100, 5000):
        x, r, w = torch.randn(3, n), torch.randn(3, n), torch.randn(n)
        y, s = gk.fused_add_rms_norm(x, r, w)
        a, b = x.clone(), r.clone()
        gk.fused_add_rms_norm(a, b, w, out=(b, a))
        if not same_bits([b, a], [y, s]):
            yield f"fused_add_rms_norm, {n} elements: out= its own inputs, crossed"
        a = x.clone()
        if not same_bits(gk.layer_norm(a, w, out=a), gk.layer_norm(x, w)):
            yield f"layer_norm, {n} elements: out= x"


def repeat(names):
    """The same bits from run to run: the simulator starts threads in another order each time."""
    for name in names.split(","):
        for n in (300, 2100, 4096):
            call = map_tensors(lambda t: t.requires_grad_(), of_length(name, n, 5)[0].build(Make(torch.float32)))
            expected = run(OPS[name].function, call)
            for _ in range(10):
                if not same_bits(run(OPS[name].function, call), expected):
                    yield f"{name} {n}: other bits in another run"
                    break


def judge(names):
    yield from limits() if "rotary" in names else ()
    yield from lengths(names, "3,64,300,1032,2100")
    yield from conformance(names, 2)


def main():
    found = False
    for complaint in globals()[sys.argv[1]](*sys.argv[2:]):
        print(complaint, flush=True)
        found = True
        if sys.argv[1] == "judge":
            break
    sys.exit(found)


if __name__ == "__main__":
    main()
