"""Judges the Hopper kernels of flash_attention in the simulator: `python hopper_checks.py NAME...`. Prints a line for
everything that is wrong, and ends with status 1 if there was one.

samples    the accuracy rule over the op's own samples, bfloat16 and float16, forward and backward
forward    the same over calls that reach what the samples do not: every tile shape, rings that go round more than twice
backward   likewise
first ...  one of these, up to the first complaint: for planted faults
nonfinite  NaN and infinities that a row does not see change no bit of it, those that it sees arrive
"""

import ctypes
import os
import sys

os.environ["CUDA_SIMULATOR_CAPABILITY"] = "90"

import load
import torch

import genai_kernels as gk
from genai_kernels.accuracy import verify_sample
from genai_kernels.ops.flash_attention.samples import packed, qkv
from genai_kernels.registry import OPS, Make, Sample

torch.set_num_threads(1)
DTYPES = (torch.bfloat16, torch.float16)
NAN, INFINITY = float("nan"), float("inf")

_loads = ctypes.CDLL(load.spec.origin).simulator_tma_loads
_loads.restype = ctypes.c_int64


def complain(op, sample, dtype, draws, backward, must_be_served=True):
    before = _loads()
    try:
        verdicts = verify_sample(OPS[op], sample, dtype, backward=backward, draws=draws)
    except RuntimeError as error:
        yield f"{op} {sample.name} {dtype}: {error}"
        return
    for verdict in verdicts:
        if not verdict.ok:
            yield f"{op} {sample.name} {dtype}, {verdict.what}: {verdict.complaint}"
    if must_be_served and _loads() == before:
        yield f"{op} {sample.name} {dtype}: another kernel than Hopper's served the call"


def samples():
    for op in ("flash_attention", "flash_attention_varlen"):
        for sample in OPS[op].samples:
            for dtype in () if sample.bench else DTYPES:
                (q, k, v, *_), _ = sample.build(Make(dtype))
                aligned = all(s % 8 == 0 for t in (q, k, v) for s in t.stride()[:-1])
                served = aligned and max(q.shape[-1], v.shape[-1]) <= 256 and q.numel() > 0 and k.numel() > 0
                yield from complain(op, sample, dtype, 4, True, served)


# Keys for at least four tiles of 128: twice the stages of a ring. The last tile is not a whole one.
FORWARD = [
    (torch.bfloat16, Sample("64", lambda m: qkv(m, b=1, tq=150, tk=530, h=2, hk=1, d=64, return_lse=True))),
    (torch.float16, Sample("128_causal", lambda m: qkv(m, b=1, tq=200, tk=540, h=1, d=128, causal=True))),
    (torch.bfloat16, Sample("96_window", lambda m: qkv(m, b=1, tq=300, tk=700, h=1, d=96, window_size=(500, 30)))),
    (torch.float16, Sample("192", lambda m: qkv(m, b=1, tq=70, tk=400, h=1, d=192, dv=128, return_lse=True))),
    (torch.bfloat16, Sample("256_causal", lambda m: qkv(m, b=1, tq=130, tk=330, h=1, d=256, causal=True))),
    (torch.bfloat16, Sample("64_dropout", lambda m: qkv(m, b=1, tq=90, tk=270, h=2, d=64, dropout_p=0.3, seed=5))),
    (torch.float16, Sample("128_softcap", lambda m: qkv(m, b=1, tq=130, tk=300, h=1, d=128, softcap=2.0, causal=True))),
    (torch.bfloat16, Sample("96_bias", lambda m: qkv(m, b=1, tq=70, tk=270, h=2, d=96, attn_bias=m(1, 2, 70, 270)))),
    (torch.float16, Sample("192_mask", lambda m: qkv(m, b=1, tq=70, tk=150, d=192, attn_mask=m.mask(1, 1, 70, 150)))),
    (torch.bfloat16, Sample("256_sink", lambda m: qkv(m, b=1, tq=70, tk=150, d=256, sink=m.float32(2), causal=True))),
]  # fmt: skip


def forward():
    for dtype, sample in FORWARD:
        yield from complain("flash_attention", sample, dtype, 2, False)
    sample = Sample("64", lambda m: packed(m, [150, 20, 300], [150, 400, 300], d=64, causal=True, return_lse=True))
    yield from complain("flash_attention_varlen", sample, torch.bfloat16, 2, False)


BACKWARD = [
    (torch.bfloat16, Sample("64", lambda m: qkv(m, b=1, tq=290, tk=210, h=4, hk=2, d=64, return_lse=True))),
    (torch.float16, Sample("128_causal", lambda m: qkv(m, b=1, tq=300, tk=420, h=1, d=128, causal=True))),
    (torch.bfloat16, Sample("96_window", lambda m: qkv(m, b=1, tq=330, h=1, d=96, dv=80, window_size=(100, 70)))),
    (torch.float16, Sample("192", lambda m: qkv(m, b=1, tq=270, tk=150, h=2, hk=1, d=192, dv=128))),
    (torch.bfloat16, Sample("256_causal", lambda m: qkv(m, b=1, tq=290, tk=330, h=1, d=256, causal=True))),
]  # fmt: skip


def backward():
    for dtype, sample in BACKWARD:
        yield from complain("flash_attention", sample, dtype, 2, True)
    sample = Sample("64", lambda m: packed(m, [150, 20, 200], [150, 130, 200], d=64, causal=True, return_lse=True))
    yield from complain("flash_attention_varlen", sample, torch.bfloat16, 2, True)


def differentiated(q, k, v):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = gk.flash_attention(q, k, v, causal=True, return_lse=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, lse, *torch.autograd.grad(out, (q, k, v), dout)


def nonfinite():
    for dtype in DTYPES:
        q, k, v = (Make(dtype, seed=seed)(1, 300, 2, 64) for seed in range(3))
        clean = differentiated(q, k, v)
        bad_v, bad_q, bad_k = v.clone(), q.clone(), k.clone()
        bad_v[0, 200, 0, 3], bad_v[0, 210, 1] = NAN, INFINITY
        bad_q[0, 20, 1, 7], bad_k[0, 290, 0, 5] = NAN, NAN
        of_v, of_qk = differentiated(q, k, bad_v), differentiated(bad_q, bad_k, v)
        out, lse, dq, dk, dv = range(5)
        untouched = [
            (of_v, out, (slice(200), 0)), (of_v, out, (slice(200, None), 0, slice(3))), (of_v, out, (slice(210), 1)),
            (of_v, lse, ()), (of_v, dq, (slice(200), 0)), (of_v, dq, (slice(210), 1)), (of_v, dv, ()),
            (of_qk, out, (slice(290), 0)), (of_qk, out, (slice(20), 1)), (of_qk, out, (slice(21, None), 1)),
            (of_qk, dq, (slice(290), 0)), (of_qk, dq, (slice(21, None), 1)), (of_qk, dk, (slice(21, None), 1)),
            (of_qk, dv, (slice(21, None), 1)),
        ]  # fmt: skip
        for result, which, where in untouched:
            ours, expected = result[which][0][where], clean[which][0][where]
            if not torch.equal(ours, expected):
                different = int((ours != expected).sum())
                yield f"nonfinite {dtype}: result {which}{where}: {different} of {ours.numel()} differ"
        arrived = [
            of_v[out][0, 200:, 0, 3], of_v[out][0, 210:, 1], of_v[dq][0, 200:, 0], of_v[dk][0, :, 0],
            of_qk[out][0, 290:, 0], of_qk[out][0, 20, 1], of_qk[lse][0, 0, 290:], of_qk[dq][0, 290:, 0],
            of_qk[dq][0, 20, 1], of_qk[dk][0, :21, 1], of_qk[dv][0, :21, 1], of_qk[dk][0, :, 0], of_qk[dv][0, :, 0],
        ]  # fmt: skip
        for i, there in enumerate(arrived):
            if there.isfinite().any():
                yield f"nonfinite {dtype}: place {i}: {int(there.isfinite().sum())} of {there.numel()} are finite"
        cu = torch.tensor([0, 100, 300], dtype=torch.int32)
        a = gk.flash_attention_varlen(q[0], k[0], v[0], cu, cu)
        v2 = v[0].clone()
        v2[100:] = NAN
        b = gk.flash_attention_varlen(q[0], k[0], v2, cu, cu)
        if not torch.equal(a[:100], b[:100]) or not b[100:].isnan().all():
            yield f"nonfinite {dtype}: NaN in the next sequence"
        if not torch.equal(a[:100], gk.flash_attention(q[:, :100], k[:, :100], v[:, :100])[0]):
            yield f"{dtype}: a packed sequence has not the bits of a dense call"


def main():
    only_first = sys.argv[1] == "first"
    found = False
    for name in sys.argv[1 + only_first :]:
        for complaint in globals()[name]():
            print(complaint, flush=True)
            found = True
            if only_first:
                break
    sys.exit(found)


if __name__ == "__main__":
    main()
