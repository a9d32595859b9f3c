"""Planted faults of the products with quantised weights: a part of mutant_catalogue.py."""

from mutant import planted

UNPACK, TILE = "csrc/cpu/quantized.h", "csrc/cpu/quantized_tile.h"
DOT, PRODUCT, HOST = "csrc/cpu/dot_matmul.cpp", "csrc/cpu/matmul.cpp", "csrc/host/quantized.h"
ROOM = "csrc/ops/quantized_linear/"

QUANTIZED = [
    *planted(
        "int4_linear",
        UNPACK,
        ("halves of a byte the same", "x[1][i] = look_up(table, q[i] >> 4);", "x[1][i] = look_up(table, q[i]);"),
        ("always the low half", "column / 16 % 2) * 4;", "column / 16 % 1) * 4;"),
        ("without the zero", "- broadcast(float(m.zero[group]))) * scale;", ") * scale;"),
        ("group of the row in front", "group(row * m.groups) {}\n  GK_INLINE", "group(row) {}\n  GK_INLINE"),
        ("first group all along", "group + (column >> m.group_bits), table", "group, table"),
        units=(DOT, PRODUCT),
    ),
    *planted(
        "nf4_linear",
        UNPACK,
        ("scale of the first block of scales", "C(m.code_scale[at / kScaleBlock])", "C(m.code_scale[0])"),
        ("a wrong code", "0.44070982933044434f", "0.44070982933044434f + 0.1f"),
        units=(DOT, PRODUCT),
    ),
    *planted(
        "int8_linear",
        UNPACK,
        (
            "bytes past the row",
            "__builtin_memcpy(padded, from, min_of<int64_t>(n - column, kQuantizedStep));",
            "__builtin_memcpy(padded, from, 1);",
        ),
        ("first row of a pair twice", "Row row(m, r + h);", "Row row(m, r);"),
        units=(DOT, PRODUCT),
    ),
    *planted(
        "int4_linear",
        TILE,
        ("one group for all columns", "group[c] + at, table[c]", "group[0] + at, table[c]"),
        ("one row for all columns", "m.data + b.row[c] * m.row_bytes", "m.data + b.row[0] * m.row_bytes"),
        ("end of a row left out", "if (column < stop) step(column, stop);", ""),
        units=(DOT,),
    ),
    *planted(
        "w8a8_linear",
        ROOM + "w8a8_cpu.cpp",
        ("scale of the first row", "* scratch.scale[r] *", "* scratch.scale[0] *"),
        ("scale of the first column", "* p.scale[i];", "* p.scale[item.column_begin];"),
        ("rounded towards zero", "constexpr float kRound = 0x1.8p23f;", "constexpr float kRound = 0x1.8p23f - 0.5f;"),
        ("pieces not added up", "sums[i] = k == 0 ? total : sums[i] + total;", "sums[i] = total;"),
        ("end of a row left out", "if (at < until)", "if (false)"),
        ("infinity is a number", "const bool good = finite.all_finite();", "const bool good = true;"),
    ),
]
