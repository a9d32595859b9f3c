"""Planted faults of conv2d and up_conv2d (mutant_catalogue.py)."""

from mutant import planted

ROOM = "csrc/ops/conv2d/"
DIRECT, WINOGRAD, GRADIENT = ROOM + "conv2d_cpu.cpp", ROOM + "winograd_cpu.cpp", ROOM + "conv2d_dw_cpu.cpp"
NUMBERS, HOST, UP = ROOM + "conv2d_numbers_cpu.cpp", ROOM + "conv2d.cpp", ROOM + "up_conv2d.cpp"
KERNELS = (DIRECT, WINOGRAD, GRADIENT)
ALL = (*KERNELS, NUMBERS, HOST, UP)

CONV = [
    *planted(
        "conv2d",
        ROOM + "conv2d_band.h",
        ("first row above the image read", "if (row < 0 || row >= p.height", "if (row < -1 || row >= p.height"),
        ("right border not cleared", "zero(to + (right - window.column) * stride,", "zero(to, 0 *"),
        (
            "norm of the first image for all",
            "static_cast<const C*>(p.affine) + n * 3 * p.in",
            "static_cast<const C*>(p.affine) + 0 * 3 * p.in",
        ),
        ("skip normalised as x", "n * 3 * p.in + from;", "n * 3 * p.in + from - first;"),
        ("norm without its center", "const Vec<C> d = x - part.load_from(at.center + c);", "const Vec<C> d = x;"),
        ("odd depth's last product left out", "if (k < depth) {", "if (k + 1 < depth) {"),
        ("second chain left out", "sum[0][i][j] + sum[1][i][j]", "sum[0][i][j]"),
        units=KERNELS,
    ),
    *planted(
        "conv2d",
        ROOM + "conv2d_tile.h",
        ("a piece replaces the sums", "store(to, first ? sum[r][j] : load(to) + sum[r][j]);", "store(to, sum[r][j]);"),
        ("residual not scaled", "part.store_to(y + j, x * scale);", "part.store_to(y + j, residual ? x : x * scale);"),
        (
            "offset of the first image for all",
            "static_cast<const C*>(p.offset) + n * p.out + first",
            "static_cast<const C*>(p.offset) + first",
        ),
        ("channels first without the residual", "if (p.residual.data) v = v +", "if (!p.residual.data) v = v +"),
        units=(DIRECT, WINOGRAD),
    ),
    *planted(
        "conv2d",
        DIRECT,
        (
            "taps of a row one pixel too far",
            "t % p.kernel_width) * a_stride;",
            "(t % p.kernel_width + t / 8)) * a_stride;",
        ),
        ("only the first chunk adds", "from == 0 && tap == 0", "tap == 0"),
        ("stride of columns forgotten", "window_columns + i * p.stride) * a_stride", "window_columns + i) * a_stride"),
        ("top padding forgotten", "item.row * p.stride - p.pad_top", "item.row * p.stride"),
    ),
    *planted(
        "conv2d",
        WINOGRAD,
        ("a sign of B", "to[3] = x[1] - x[3];", "to[3] = x[3] - x[1];"),
        ("a term of A", "to[0] = (m[0] + m[1]) + m[2];", "to[0] = m[0] + m[1];"),
        ("last column of an odd image", "if (l < columns) store", "if (l + 1 < columns) store"),
        (
            "weights of the first panel for all",
            "(first / panel * scratch.numbers + which)",
            "(0 * scratch.numbers + which)",
        ),
        ("tiles of the second image", "scratch.a + n * image + Side * r", "scratch.a + Side * r"),
        (
            "a term of the larger A",
            "fma(broadcast(8.0f), outer, difference) + m[5]",
            "fma(broadcast(8.0f), outer, difference)",
        ),
        ("a factor of the larger B", "five = broadcast(-5.0f)", "five = broadcast(-4.0f)"),
    ),
    *planted(
        "conv2d",
        GRADIENT,
        (
            "sums of the last image alone",
            "for (int64_t r = 0; r < conv.out_height; r += band)",
            "for (int64_t r = 0; n + 1 == conv.batch && r < conv.out_height; r += band)",
        ),
        ("scale forgotten", "scratch.c_stride + o] * C(p.conv.scale)", "scratch.c_stride + o]"),
        ("last rows of a band", "min_of(r + band, conv.out_height)", "min_of(r + band, conv.out_height - 1)"),
        ("dy of other channels", "p.y.at<const T>(n, item.out_begin, r, 0)", "p.y.at<const T>(n, 0, r, 0)"),
    ),
    *planted(
        "conv2d",
        NUMBERS,
        (
            "eps outside the root",
            "1 / __builtin_sqrt((pixels > 0 ? squares / (double(width) * pixels) : 0) + p.eps)",
            "1 / (__builtin_sqrt(pixels > 0 ? squares / (double(width) * pixels) : 0) + p.eps)",
        ),
        (
            "squares between channels forgotten",
            "squares += more_squares + delta * delta * before * share;",
            "squares += more_squares;",
        ),
        ("rest of the mean forgotten", "C(b - (mean - double(rounded)) * a)", "C(b)"),
        ("scale without its one", "const double scale = 1 + number_of", "const double scale = number_of"),
        (
            "weights of the first panel packed for all",
            "T* data = static_cast<const T*>(w.data) + which * panel * w.out_stride;",
            "T* data = static_cast<const T*>(w.data);",
        ),
        ("G without its half", "to[2] = 0.5 * (outer - g[1]);", "to[2] = outer - g[1];"),
        ("a sign of the larger G", "to[4] = (far - 2.0 * g[1]) / 24.0;", "to[4] = (far + 2.0 * g[1]) / 24.0;"),
        ("means of cells not merged", "moments[c] += delta * share;", "moments[c] += 0 * delta;"),
    ),
    *planted(
        "conv2d",
        HOST,
        ("given statistics not used", "run_norm(call, stats, !given);", "run_norm(call, stats, true);"),
        ("dx without its phases", "const Phase columns(j, s,", "const Phase columns(0 * j, s,"),
        ("dx's taps in the order of forward", "-s * of.row_stride", "s * of.row_stride"),
        (
            "norm's statistics of x alone",
            "skip = moments_of(p, p.skip, p.in - p.x_channels);",
            "skip = moments_of(p, p.x, p.in - p.x_channels);",
        ),
    ),
    *planted(
        "up_conv2d",
        ROOM + "conv2d.h",
        ("a sum of one tap", "way == 0 ? 1 + 2 * i", "way == 0 ? 1 + i"),
        ("backward's first tap", "i < 2 ? 2 - i : 0;", "i < 2 ? 1 - i : 0;"),
        units=ALL,
    ),
    *planted(
        "up_conv2d",
        UP,
        ("phases exchanged", "p.pad_left = i % 2 == 0;", "p.pad_left = i % 2;"),
        ("rows one above the other", "2 * all.row, 2 * all.pixel", "2 * all.row, all.pixel"),
    ),
]
