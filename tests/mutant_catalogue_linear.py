"""Planted faults of the linear layers and of what is built on their products: a part of mutant_catalogue.py."""

from mutant import kernel, planted

LINEAR = [
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
