"""Planted faults of the linear layers and of what is built on their products: a part of mutant_catalogue.py."""

from mutant import kernel, planted

DOT, PRODUCT, PACK = "csrc/cpu/dot_matmul.cpp", "csrc/cpu/matmul.cpp", "csrc/cpu/pack_operand.h"
LORA = "csrc/ops/lora_linear/lora_linear.cpp"
DORA = "csrc/ops/lora_linear/dora_cpu.cpp"

LINEAR = [
    *planted(
        "linear",
        DOT,
        ("columns of the first group again", "(packed + min_of<int64_t>(i, stop - j - 1) *", "(packed + 0 *"),
        ("pieces not added up", "store(c, first ? sums : load(c) + sums);", "store(c, sums);"),
        (
            "pieces added to what was there",
            "multiply_group<P>(p, item.row_begin, rows, columns, a, b, elements, c, k == 0, lines);",
            "multiply_group<P>(p, item.row_begin, rows, columns, a, b, elements, c, false, lines);",
        ),
        (
            "bias of the first columns",
            "[(part * p.columns + j) * m.outer]",
            "[(part * p.columns + j - item.column_begin) * m.outer]",
        ),
        ("bias with stride 1", "[(part * p.columns + j) * m.outer]", "[part * p.columns + j]"),
        (
            "columns of the next row",
            "const C* c = scratch.c + (r - item.row_begin +",
            "const C* c = scratch.c + (r - item.row_begin + (rows > 1 && r == item.row_begin) +",
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
        (
            "the first row's part of S for all rows of a tile",
            "return {first->b, s, stride};",
            "return {first->b, s, 0};",
        ),
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
        "dora",
        DORA,
        ("the mixed term once", "of_w + 2 * mixed + of_ba", "of_w + mixed + of_ba"),
        (
            "no scaling of the last term",
            "* b * p.scaling;\n  }\n  const double square",
            "* b;\n  }\n  const double square",
        ),
        ("rows that cancel not built", "kCancelled = 1.0 / 64", "kCancelled = 0"),
        ("the first piece of a row only", "of_w += sum_of_squares", "of_w = sum_of_squares"),
        ("rows of A for the first only", "load_piece<C>(p.a, r, k", "load_piece<C>(p.a, 0, k"),
        ("pieces of rows not added up", "total[i] += sum[i];", "total[i] = sum[i];"),
        ("factor of the first columns", "factor[i] = scale[j + i];", "factor[i] = scale[i];"),
        ("gradient not multiplied", "store(to + i, d * load(factor + i));", "store(to + i, d);"),
    ),
    *planted(
        "dora",
        DOT,
        ("factor left out", "if (p.column_scale.data) {", "if (false) {"),
        ("nothing kept for backward", "if (p.inner) keep_row(p, r, part", "if (false) keep_row(p, r, part"),
        (
            "factors of the first part",
            "stage_columns(p, item, p.column_scale, scratch.column_scale, scratch.stride);",
            "stage_columns(p, {0, 0, 0, item.column_end - item.column_begin}, p.column_scale, scratch.column_scale, "
            "scratch.stride);",
        ),
    ),
    *planted(
        "linear_",
        DOT,
        (
            "gate and factor swapped",
            "row += p.gate_part * scratch.stride;",
            "row += (1 - p.gate_part) * scratch.stride;",
        ),
        ("second part reads the first's rows", "return group / groups * p.columns + item", "return item"),
        ("no gate kept", "keep_row(p, r, item.column_begin, row, columns);\n        keep", "keep"),
        (
            "factor kept in the gate's place",
            "keep_row(p, r, p.columns + item.column_begin, other",
            "keep_row(p, r, item.column_begin, other",
        ),
        ("gate of the wrong kind", "return run(TypeTag<GeluErf>{});", "return run(TypeTag<GeluTanh>{});"),
        (
            "biases of the first part",
            "const C* bias = scratch.bias + part * scratch.stride;",
            "const C* bias = scratch.bias;",
        ),
    ),
    *planted(
        "lora_linear",
        LORA,
        ("B transposed by the wrong length", "to[c * rows + r] = from", "to[c * columns + r] = from"),
        ("all rows taken to have an adapter", "s.all = s.count == c.rows;", "s.all = s.count > 0;"),
    ),
    *planted(
        "dora",
        LORA,
        ("dx without the factor", "dy_base ? *dy_base : dy", "dy"),
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
