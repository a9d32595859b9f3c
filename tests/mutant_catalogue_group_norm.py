"""Planted faults of group_norm_silu (mutant_catalogue.py)."""

from mutant import planted

ROOM = "csrc/ops/group_norm_silu/"
FORWARD, BACKWARD = ROOM + "group_norm_silu_cpu.cpp", ROOM + "group_norm_silu_bwd_cpu.cpp"
HOST = ROOM + "group_norm_silu.cpp"

GROUP_NORM = [
    *planted(
        "group_norm_silu",
        ROOM + "group_norm_silu.h",
        (
            "eps outside the root",
            "1 / __builtin_sqrt(squares / count + eps)",
            "1 / (__builtin_sqrt(squares / count) + eps)",
        ),
        (
            "squares between chunks forgotten",
            "squares += other.squares + delta * delta",
            "squares += other.squares + 0 * delta",
        ),
        (
            "a block one chunk shorter",
            "begin(block) + size < length ? begin(block) + size : length",
            "begin(block) + size < length ? begin(block) + size - chunk : length",
        ),
        units=(FORWARD, BACKWARD, HOST),
    ),
    *planted(
        "group_norm_silu",
        ROOM + "group_norm_affine.h",
        ("rest of the mean forgotten", "C(b - lost * stats[1] * a)", "C(b)"),
        ("scale without its one", "weight_[c] * (1 + scale[c - begin])", "weight_[c] * scale[c - begin]"),
        ("bias not scaled", "bias_[c] * (1 + scale[c - begin])", "bias_[c]"),
        ("shift of the slab's first channels", "shift ? shift[c - begin] : 0", "shift ? shift[c % width] : 0"),
        ("scale of the first sample for all", "(n * p.batch_stride + channel * row.stride)", "channel * row.stride"),
        units=(FORWARD, BACKWARD),
    ),
    *planted(
        "group_norm_silu",
        "csrc/cpu/group_activation.h",
        ("relu swallows a NaN", "return z < V{} ? V{} : z;", "return z > V{} ? z : V{};"),
        units=(FORWARD, BACKWARD),
    ),
    *planted(
        "group_norm_silu",
        FORWARD,
        ("first pixel's mean for the mean", "to = {count, center + off, ", "to = {count, center, "),
        ("a far center is taken", "sum * off <= 16 * left", "true"),
    ),
    *planted(
        "group_norm_silu",
        FORWARD,
        (
            "squares around zero",
            "part.or_zero(part.load_from(x + i) - center) * scale",
            "part.load_from(x + i) * scale",
        ),
        (
            "channels last, squares around zero",
            "load_from(x + i * stride + c + j * kStep) - at[j]",
            "load_from(x + i * stride + c + j * kStep)",
        ),
        ("residual not added", "part.load_from(x + i) + part.load_from(residual + i)", "part.load_from(x + i)"),
        (
            "statistics of x without its residual",
            "const Image& from = p.residual.data ? p.sum : p.x; for (int64_t g",
            "const Image& from = p.x; for (int64_t g",
        ),
        (
            "last channel of a slab skipped",
            "for_each_channel<C>(begin, end, [&](int64_t c, auto part, auto registers) { ColumnSums",
            "for_each_channel<C>(begin, end - 1, [&](int64_t c, auto part, auto registers) { ColumnSums",
        ),
        ("numbers of the first group for all", "if (set_for != n * p.groups + g)", "if (set_for != n)"),
    ),
    *planted(
        "group_norm_silu",
        BACKWARD,
        ("dx without its pull", "fma(fma(d, rstd, rest), pull, g)", "g"),
        ("dx without the mean of g", "* factor - mean_g;", "* factor;"),
        ("rest of the mean forgotten in s2", "- lost * stats[1] * s1", ""),
        (
            "slope of the norm alone",
            "part.or_zero(part.load_from(dy + i) * Activation::slope(fma(d, alpha, beta)))",
            "part.or_zero(part.load_from(dy + i) * Activation::slope(d))",
        ),
        ("dbias without the scale", "grads.db[begin + c] += s1[c] * (1 + scale[c])", "grads.db[begin + c] += s1[c]"),
        ("dscale without the bias", "s2[c] * weight[c] + s1[c] * bias[c]", "s2[c] * weight[c]"),
        (
            "last pixels of a block skipped",
            "for (int64_t pixel = i; pixel < last;)",
            "for (int64_t pixel = i; pixel + 3 < last;)",
        ),
        (
            "dsum forgotten",
            "part.store_to(dx + i, dsum ? own + part.load_from(dsum + i) : own);",
            "part.store_to(dx + i, own);",
        ),
    ),
    *planted(
        "group_norm_silu",
        HOST,
        (
            "parameters' sums of the last part alone",
            "for (int64_t n = 0; n < p.batch; n += part) {",
            "for (int64_t n = 0; n < p.batch; n += part) { std::fill_n(total, 2 * p.channels, 0.0);",
        ),
    ),
]
