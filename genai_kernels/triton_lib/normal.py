"""Normal numbers from Philox in Triton: those of csrc/cpu/normal.h, by its polynomials.

Triton's own logarithm and cosine are exact in absolute terms: near their zeros, nothing is left of a relative accuracy.
"""

import triton
import triton.language as tl


@triton.jit
def of_quarter(quarter, sine, cosine):
    """Sine and cosine, given those of what an angle has beyond `quarter` quarters of a turn."""
    quarter = quarter & 3
    sin = tl.where(quarter == 0, sine, tl.where(quarter == 1, cosine, tl.where(quarter == 2, -sine, -cosine)))
    cos = tl.where(quarter == 0, cosine, tl.where(quarter == 1, -sine, tl.where(quarter == 2, -cosine, sine)))
    return sin, cos


@triton.jit
def sincos_of_quarters(quarter, s):
    """Of 2 pi (quarter / 4 + s), |s| <= 1/8, in float32."""
    square = s * s
    p = square * -75.44560241699219 + 81.59376525878906
    p = p * square - 41.341670989990234
    p = p * square - 1.7484555314695172e-07
    sine = s * 6.2831854820251465 + s * p
    q = square * 59.229244232177734 - 85.4432373046875
    q = q * square + 64.93932342529297
    q = q * square - 19.739208221435547
    cosine = q * square + 1.0
    return of_quarter(quarter, sine, cosine)


@triton.jit
def sincos_of_turns(turns):
    """Of 2 pi turns, 0 <= turns <= 1, in float32."""
    quarters = tl.floor(4 * turns + 0.5)
    return sincos_of_quarters(quarters.to(tl.int32), turns - 0.25 * quarters)


@triton.jit
def normal_radius(u):
    """sqrt(-2 ln u) for 2^-24 <= u < 1."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.07634477317333221 + 0.12761957943439484
    p = p * f - 0.1316036581993103
    p = p * f + 0.14201720058918
    p = p * f - 0.1662333607673645
    p = p * f + 0.20001228153705597
    p = p * f - 0.250008225440979
    p = p * f + 0.3333333134651184
    p = p * f - 0.5
    e = exponent.to(tl.float32)
    y = e * 1.428606765330187e-06 + f * f * p
    y = e * 0.693145751953125 + (f + y)
    return tl.sqrt(-2.0 * y)


@triton.jit
def pair_of_normals(w0, w1):
    radius = normal_radius(((w0 >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07)  # 2^-23
    sin, cos = sincos_of_turns((w1 >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08)  # 2^-24
    return radius * cos, radius * sin


@triton.jit
def normal_numbers(seed, offset, stream, first, BLOCK: tl.constexpr):
    """Numbers first, first + 1, ... first + BLOCK - 1 of a seed; both are multiples of 64."""
    zero = tl.zeros((BLOCK // 64, 16), tl.int64)
    counter = (first // 64 + tl.arange(0, BLOCK // 64)[:, None]).to(tl.int64) * 16 + tl.arange(0, 16)[None, :]
    w0, w1, w2, w3 = tl.philox(
        seed, (zero + offset).to(tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32),
        (zero + stream).to(tl.uint32),
    )  # fmt: skip
    z0, z1 = pair_of_normals(w0, w1)
    z2, z3 = pair_of_normals(w2, w3)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [.., 16, i, j] is number 2 i + j of a counter
    return tl.reshape(tl.permute(z, (0, 2, 3, 1)), (BLOCK,))
