"""Judges the CUDA kernels of attention in the simulator: `python attention_checks.py NAME [ARGUMENTS]`, with
CUDA_SIMULATOR_LIBRARY naming the library. Prints a line for everything that is wrong, and ends with status 1 if there
was one.

conformance DTYPE     the accuracy rule over the samples, forward and backward
judge DTYPE SAMPLES   the same over some samples, up to the first complaint: for planted faults
unseen DTYPE          what a row does not see changes none of its bits
repeat DTYPE          the same bits from run to run
"""

import sys

import load  # noqa: F401  the simulator's library in the place of the package's
import torch
from calls import run, same_bits

import genai_kernels as gk
from genai_kernels.accuracy import map_tensors, verify_sample
from genai_kernels.registry import OPS, Make

torch.set_num_threads(1)
NAMES = ("flash_attention", "flash_attention_varlen")
MANY_SCORES = 20000  # of a sample: enough of them for the rule to compare the computations and not the dice


def samples():
    for name in NAMES:
        for sample in OPS[name].samples:
            if not sample.bench:
                yield name, sample


def draws_of(name, sample):
    (q, k, *_), _ = sample.build(Make(torch.float32))
    if name != "flash_attention":
        return 8
    batch, queries, heads, _ = q.shape
    return 3 if batch * queries * heads * k.shape[1] > MANY_SCORES else 8


def complain(name, sample, dtype, draws):
    for verdict in verify_sample(OPS[name], sample, getattr(torch, dtype), draws=draws):
        if not verdict.ok:
            yield f"{name} {sample.name} {dtype}, {verdict.what}: {verdict.complaint}"


def conformance(dtype):
    for name, sample in samples():
        yield from complain(name, sample, dtype, draws_of(name, sample))


def judge(dtype, wanted):
    for name, sample in samples():
        if sample.name in wanted.split(","):
            yield from complain(name, sample, dtype, 2)


def attend(q, k, v, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = gk.flash_attention(*leaves, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [out.detach() + 1, lse.detach().clamp(-9)])]


def unseen(dtype):
    """NaN where a causal call's last rows alone see it, and where nobody does."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 90, 2, 40).to(getattr(torch, dtype)) for _ in range(3))
    expected = attend(q, k, v, causal=True)
    for t in (k, v):
        given = t[:, 70].clone()
        t[:, 70, 1, 3] = torch.nan
        found = attend(q, k, v, causal=True)
        t[:, 70] = given
        for i in (0, 2):
            if not same_bits(found[i][:, :70], expected[i][:, :70]):
                yield f"{dtype}: result {i} of rows that do not see a NaN has other bits"
        if not found[0][:, 70:, 1, 3].isnan().all():
            yield f"{dtype}: a NaN that is seen is lost"
        if not same_bits(found[0][:, :, 0], expected[0][:, :, 0]):
            yield f"{dtype}: a NaN came to another head"


def repeat(dtype):
    for name, sample in samples():
        if sample.name not in ("everything", "options", "window_two_sided"):
            continue
        call = map_tensors(lambda t: t.requires_grad_(t.is_floating_point()), sample.build(Make(getattr(torch, dtype))))
        for frozen in sample.frozen:
            call[1][frozen].requires_grad_(False)
        expected = run(OPS[name].function, call)
        for _ in range(2):
            if not same_bits(run(OPS[name].function, call), expected):
                yield f"{name} {sample.name} {dtype}: other bits in another run"


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
