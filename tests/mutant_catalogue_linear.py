"""Planted faults of the linear layers and of what is built on their products: a part of mutant_catalogue.py."""

from mutant import kernel, planted

DOT, PRODUCT, PACK = "csrc/cpu/dot_matmul.cpp", "csrc/cpu/matmul.cpp", "csrc/cpu/pack_operand.h"
LORA = "csrc/ops/lora_linear/lora_linear.cpp"

LINEAR = [
    *planted(
        "linear",
        DOT,
        ("columns of the first group again", "b[i] = packed + min_of<int64_t>(i, stop - j - 1)", "b[i] = packed + 0"),
        ("pieces not added up", "store(c, first ? sums : load(c) + sums);", "store(c, sums);"),
        (
            "pieces added to what was there",
            "multiply_group<P>(p, item.row_begin, rows, column, a, b, words, c, k == 0, lines);",
            "multiply_group<P>(p, item.row_begin, rows, column, a, b, words, c, false, lines);",
        ),
        ("bias of the first columns", "[(item.column_begin + j) * p.bias.outer]", "[j * p.bias.outer]"),
        ("bias with stride 1", "[(item.column_begin + j) * p.bias.outer]", "[item.column_begin + j]"),
        (
            "columns of the next row",
            "scratch.c + (r - item.row_begin) * kDotColumns;",
            "scratch.c + (r - item.row_begin + (rows > 1 && r == item.row_begin)) * kDotColumns;",
        ),
    ),
    *planted(
        "linear",
        PRODUCT,
        (
            "pieces of the depth not added up",
            "store(to, first ? sum[i][j] : load(to) + sum[i][j]);",
            "store(to, sum[i][j]);",
        ),
        (
            "the same piece of A again",
            "reinterpret_cast<Word*>(scratch.a[k / kMatmulDepth % 2]);",
            "reinterpret_cast<Word*>(scratch.a[0]);",
        ),
        ("last rows of A not packed", "last && done == count ? count : to", "to"),
    ),
    *planted(
        "linear",
        PACK,
        (
            "row of A with the stride of its elements",
            "const T* from = data + token_of(a, row) * a.outer + k;",
            "const T* from = data + token_of(a, row) * a.depth + k;",
        ),
        (
            "elements of a strided row side by side",
            "data[(i + l) * m.outer + (k + e) * m.depth]",
            "data[(i + l) * m.outer + (k + e)]",
        ),
        units=(DOT, PRODUCT),
    ),
    *planted(
        "lora_linear",
        DOT,
        ("the first row's part of S for all rows of a tile", "static_cast<const C*>(first[1].s) - s : 0;", "0 : 0;"),
        (
            "last registers of a rank left out",
            "k < b.rank; k += kLanesOf<C>)",
            "k + kLanesOf<C> <= b.rank; k += kLanesOf<C>)",
        ),
        ("B with stride 1", "part[l] = data[(k + l) * b.depth];", "part[l] = data[k + l];"),
    ),
    *planted(
        "lora_linear",
        PACK,
        ("dropout of the next row", "philox(uint32_t(row), c1,", "philox(uint32_t(row + 1), c1,"),
        (
            "dropout without its factor",
            "x[i] = words[w][l] >= dropout.threshold ? x[i] * scale",
            "x[i] = words[w][l] >= dropout.threshold ? x[i]",
        ),
        (
            "dropout of other columns",
            "const int64_t i = block + w * kWord + l - column;",
            "const int64_t i = block + w * kWord + l - column / 16 * 16;",
        ),
        units=(DOT, PRODUCT),
    ),
    *planted(
        "lora_linear",
        LORA,
        ("S not scaled", "p.scale = c.adapters[i].scaling;", "p.scale = 1;"),
        ("S without dropout", "shrunk.rows.dropout = c.drops();", ""),
        ("dx without dropout's mask", "term.dropout = c.drops();", ""),
        ("dA of the whole x", "da.b.dropout = c.drops();", ""),
        ("id past the end", "at >= -1 && at < count, c.op", "at >= -1 && at <= count, c.op"),
        ("ids of the first slot", "const int32_t at = id[r * slots + s];", "const int32_t at = id[r * slots];"),
        (
            "rows of the first adapter for all in dx",
            "term.rows = c.shares[i].rows();",
            "term.rows = c.shares[0].rows();",
        ),
        (
            "dB of the first columns",
            "db.b = columns_from(c, dy, adapter.column_begin, 1, 0);",
            "db.b = columns_from(c, dy, 0, 1, 0);",
        ),
        ("dS of the first columns", "columns_from(c, dy, adapter.column_begin, 0, 1)", "columns_from(c, dy, 0, 0, 1)"),
    ),
    *planted(
        "fused_linear_cross_entropy",
        kernel("fused_linear_cross_entropy"),
        ("softcap not multiplied back", "v = cap * tanh(v / cap);", "v = tanh(v / cap);"),
        (
            "tail taken for zeros by the largest",
            "if (lane >= part.count) v[lane] = kLeast;",
            "if (false) v[lane] = kLeast;",
        ),
        (
            "largest of all but the last lane",
            "lane < kLanesOf<C>; ++lane) largest",
            "lane < kLanesOf<C> - 1; ++lane) largest",
        ),
        ("tail counted in the sum", "part.or_zero(exp_nonpositive(v - largest))", "exp_nonpositive(v - largest)"),
        ("no largest taken off", "exp_nonpositive(v - largest)); acc", "exp_nonpositive(v)); acc"),
        ("smoothing without the wanted class", "(1 - smoothing) * loss + smoothing", "loss + smoothing"),
        ("smoothing of a sum", "lse - sums[1] / double(n)", "lse - sums[1]"),
        ("z-loss of lse", "p.z_loss * lse * lse", "p.z_loss * lse"),
        ("loss without z-loss", "p.loss[r] = loss + p.z_losses[r];", "p.loss[r] = loss;"),
        ("half a gradient of z-loss", "(1 + 2 * p.z_loss * lse)", "(1 + p.z_loss * lse)"),
        ("row's factor left out", "p.row_weights ? p.row_weights[r] : 1", "1"),
        ("factor of the first row", "p.row_weights ? p.row_weights[r] : 1", "p.row_weights ? p.row_weights[0] : 1"),
        ("gradient without smoothing", "if (smoothing != 0) d = d - of_all;", ""),
        ("gradient without softcap's slope", "d = d * (C(1) - t * t);", ""),
        ("wanted class without smoothing", "* share - uniform - (1 - smoothing));", "* share - (1 - smoothing));"),
        ("wanted class without softcap's slope", "if (cap > 0) d *= 1 -", "if (false) d *= 1 -"),
        ("wanted class left out", "gradients[p.targets[r]] = from_compute<G>(C(d));", ""),
        ("bias of the first row", "first + r * row_stride + begin + i", "first + begin + i"),
    ),
    *planted(
        "fused_linear_cross_entropy",
        "csrc/ops/fused_linear_cross_entropy/fused_linear_cross_entropy.cpp",
        (
            "ignored rows counted",
            "if (target == a.ignore_index) continue;",
            "if (target == a.ignore_index && r > 0) continue;",
        ),
        ("class past the end", "target < vocabulary, kOp", "target <= vocabulary, kOp"),
        (
            "first chunk again",
            "product.a.tokens = wanted.rows.data() + begin;",
            "product.a.tokens = wanted.rows.data();",
        ),
        ("targets of the first chunk", "wanted.targets.data() + begin,", "wanted.targets.data(),"),
        ("dW of the last chunk", "compute, in, begin > 0}", "compute, in, false}"),
        ("dW of other rows", "x.depth, x.outer, wanted.rows.data() + begin}", "x.depth, x.outer, wanted.rows.data()}"),
        ("dx beside its row", "std::memcpy(dx + wanted.rows[size_t(begin + r)]", "std::memcpy(dx + (begin + r)"),
        ("dx of ignored rows left as it was", "if (for_x && !all) std::memset", "if (false) std::memset"),
        ("dW of no rows left as it was", "if (for_weight && count == 0) std::memset", "if (false) std::memset"),
        ("mean over all rows", "sum / double(wanted.count())", "sum / double(rows)"),
        ("losses of ignored rows left as they were", "r < rows; ++r) put(r, 0);", "r < 0; ++r) put(r, 0);"),
        ("float16 gradients", "dtype == Dtype::bf16 ? Dtype::bf16 : compute;", "dtype;"),
    ),
]
