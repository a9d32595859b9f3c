"""Exponentials for the kernels whose results are float32: the hardware's own is off by many ULP for large arguments."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_nonpositive(x):
    """e^x in float32 for x <= 0, at most 2 ULP: 1 at 0, 0 below -87.3 (where it would be denormal), NaN for NaN.

    x = n ln2 + r in two pieces of ln2, the first of 15 bits, so that n times it is exact; n is read off the low
    mantissa bits of x log2(e) + 1.5 * 2^23 (the bias 127 is in the constant); e^r is the polynomial of
    csrc/cpu/exp.h. Above 0 it holds as far as rounding may take an argument.
    """
    shifted = x * 1.4426950216293335 + 12583039.0
    n = shifted - 12583039.0
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
    p = r * 0.0013843559427186847 + 0.008374235592782497
    p = p * r + 0.041668009012937546
    p = p * r + 0.16666430234909058
    p = p * r + 0.4999999403953552
    p = p * r + 1.0
    p = p * r + 1.0
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.3, 0.0, p * power)


@triton.jit
def exp(x):
    """e^x in float32 for every x, at most 2 ULP where it is normal: the same polynomial, 2^n in two steps."""
    x = tl.where(x > 100.0, 100.0, tl.where(x < -110.0, -110.0, x))  # a NaN stays
    shifted = x * 1.4426950216293335 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06
    p = r * 0.0013843559427186847 + 0.008374235592782497
    p = p * r + 0.041668009012937546
    p = p * r + 0.16666430234909058
    p = p * r + 0.4999999403953552
    p = p * r + 1.0
    p = p * r + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return p * first * second
