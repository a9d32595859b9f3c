"""Planted faults: texts of the kernels' sources and what takes their place. Spaces and line breaks count as equal.

Each must occur exactly once (tests/test_mutants.py). `units` are the files to compile again; the tests of `op` decide.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    op: str
    name: str
    file: str
    old: str
    new: str
    units: tuple[str, ...]


ATTENTION = "csrc/ops/flash_attention/"
FORWARD, BACKWARD = ATTENTION + "flash_attention_cpu.cpp", ATTENTION + "flash_attention_bwd_cpu.cpp"
DELTA = ATTENTION + "flash_attention_delta_cpu.cpp"
PAGED = "csrc/ops/paged_attention/"
TILE, HOST = ATTENTION + "tile.h", ATTENTION + "flash_attention.cpp"


def kernel(op):
    return f"csrc/ops/{op}/{op}_cpu.cpp"


def planted(op, file, *faults, units=None):
    return [Mutant(op, name, file, old, new, units or (file,)) for name, old, new in faults]


MUTANTS = [
    *planted(
        "flash_attention",
        TILE,
        ("right edge one key further", "diagonal + p.right)", "diagonal + p.right + 1)"),
        ("right edge one key nearer", "diagonal + p.right)", "diagonal + p.right - 1)"),
        ("left edge one key further", "diagonal - p.left)", "diagonal - p.left - 1)"),
        ("left edge one key nearer", "diagonal - p.left)", "diagonal - p.left + 1)"),
        ("aligned at the top left", "diagonal = at + shift;", "diagonal = at;"),
        ("wrong head of a group", "kv_head * p.group + in_group", "kv_head + in_group * p.kv_heads"),
        ("wrong query of a group", "query[lane] = at;", "query[lane] = in_group;"),
        ("a masked NaN is seen", "!(bias && bias[lane] == -kInfinity<C>)", "true"),
        ("edges never masked", "most_first <= key && key + keys - 1 <= least_last", "true"),
        ("left edge never masked", "most_first <= key && key + keys - 1 <= least_last", "key + keys - 1 <= least_last"),
        ("right edge masked one late", "key + keys - 1 <= least_last", "key + keys - 2 <= least_last"),
        (
            "keys of the first group skipped",
            "(least_first - origin) / kKeyGroup * kKeyGroup",
            "round_up(least_first - origin, kKeyGroup)",
        ),
        (
            "keys of the last group skipped",
            "round_up(most_last + 1 - origin, kKeyGroup)",
            "(most_last + 1 - origin) / kKeyGroup * kKeyGroup",
        ),
        ("last visible key masked", "(at > last)", "(at >= last)"),
        ("first visible key masked", "(at < first)", "(at <= first)"),
        ("bias of the first sequence for all", "batch * p.bias.batch", "0 * p.bias.batch"),
        ("bias of the first head for all", "rows.head[lane] * p.bias.head", "0 * p.bias.head"),
        ("bias of a lane instead of its query", "rows.query[lane] * p.bias.query", "lane * p.bias.query"),
        ("mask inverted", "if (!from[i * p.mask.key])", "if (from[i * p.mask.key])"),
        ("mask of the first head for all", "rows.head[lane] * p.mask.head", "0 * p.mask.head"),
        ("mask without the key's offset", "+ key * p.mask.key;", ";"),
        ("softcap not multiplied back", "x = cap * t;", "x = t;"),
        ("ALiBi without the absolute value", "max(distance, -distance)", "distance"),
        ("ALiBi of the first sequence for all", "batch * p.slopes_batch", "0 * p.slopes_batch"),
        ("negative scale as any other", "p.mask.data || !(p.scale > 0)", "p.mask.data"),
        ("modified scores without the window", "(position < first) | (position > last)", "position < first"),
        ("dropout without its factor", "C(1 / (1 - p.dropout_p))", "C(1)"),
        (
            "dropout of the first sequence for all",
            "uint32_t(batch * p.heads + rows.head[lane])",
            "uint32_t(rows.head[lane])",
        ),
        ("dropout of four keys at once", "words[i][lane] >= threshold", "words[0][lane] >= threshold"),
        ("dropout inverted", "words[i][lane] >= threshold", "words[i][lane] < threshold"),
        units=(FORWARD, BACKWARD),
    ),
    *planted(
        "flash_attention",
        "csrc/cpu/attention_pack.h",
        ("a NaN that nobody sees spreads", "finite = all_finite ? packed : copy;", "finite = packed;"),
        ("a seen NaN is dropped", "value - value != 0) add(r, d, value)", "false && value != 0) add(r, d, value)"),
        ("tail of a row skipped", "load(row + i) : load_first(row + i, n - i)", "load(row + i) : Vec<Compute<T>>{}"),
        ("NaN of hidden values multiplied", "sum = sum + (v - v);", "(void)v;"),
        units=(FORWARD, BACKWARD),
    ),
    *planted(
        "flash_attention",
        TILE,
        ("slope of the softcap 1", "broadcast(C(1)) - t * t", "broadcast(C(1)) - t * 0"),
        units=(BACKWARD,),
    ),
    *planted(
        "flash_attention",
        FORWARD,
        ("output never rescaled", "store(o, fma(load(o), alpha[j], c[i][j]));", "store(o, load(o) + c[i][j]);"),
        ("sum never rescaled", "fma(state.sum[j], alpha[j],", "fma(state.sum[j], broadcast(C(1)),"),
        ("maximum of the step alone", "max(state.max[j], tile_max[j])", "tile_max[j]"),
        ("scale one percent off", "(modified ? 1 : p.scale) * 1.4426950408889634", "(modified ? 1 : p.scale) * 1.457"),
        ("lse without the maximum", "C(exact_top + __builtin_log(double(total)))", "C(__builtin_log(double(total)))"),
        ("sink not in the sum", "+ C(__builtin_exp(sink - higher))", ""),
        ("sink of the first head for all", "(p.sink)[rows.head[lane]]", "(p.sink)[0]"),
        (
            "output without the sink's share",
            "fma(fma(-quotient, divisor, o), by, quotient) * scale",
            "fma(fma(-quotient, divisor, o), by, quotient)",
        ),
        ("keys begin too late", "first_key = min_of(first_key,", "first_key = max_of(first_key,"),
        ("last step skipped where one key is left", "key <= last_key", "key < last_key"),
        ("dropout left out", "if (p.dropout_p > 0) { if", "if (p.dropout_p > 2) { if"),
        (
            "one chain of the sum forgotten",
            "(sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j])",
            "(sum[0][j] + sum[1][j]) + sum[2][j]",
        ),
        ("last element of a head not stored", "store_first(to, x[l], dims);", "store_first(to, x[l], dims - 1);"),
    ),
    *planted(
        "flash_attention",
        BACKWARD,
        ("delta left out", "(gradient - load(scratch.delta + j * kStep))", "gradient"),
        ("NaN select removed", "score == hidden ? Vec<C>{} : gradient", "gradient"),
        ("dv without dropout", "kept = probability * by;", "kept = probability;"),
        ("dp without dropout", "gradient = gradient * by;", ""),
        ("softcap's slope left out", "if (p.softcap > 0) multiply_by_slope_of_cap(scratch, keys);", ""),
        ("dk without the scale", "C(p.scale), token_of<T>(p.dk,", "C(1), token_of<T>(p.dk,"),
        ("dq without the scale", "C(p.scale), token_of<T>(p.dq,", "C(1), token_of<T>(p.dq,"),
        ("dq of one head of a group", "kv_head * p.group + row % p.group", "kv_head * p.group"),
        (
            "tiles skipped before their keys",
            "rows.least_first >= key + kBackwardKeys",
            "rows.least_first >= key + kTileKeys",
        ),
        ("dbias of the first sequence for all", "batch * p.dbias.batch", "0 * p.dbias.batch"),
        ("dbias overwritten, not summed", "to[i * p.dbias.key] +=", "to[i * p.dbias.key] ="),
        ("dK and dV never flushed", "row / kFlushRows<C> != flushed", "false"),
        ("the last flush forgotten", "if (!want_keys) continue; flush_all();", "if (!want_keys) continue;"),
    ),
    *planted(
        "flash_attention",
        DELTA,
        ("dlse added", "sum -= reinterpret_cast<const C*>(p.dlse)", "sum += reinterpret_cast<const C*>(p.dlse)"),
        ("dsink of the other sign", "dsink -= sink_probability", "dsink += sink_probability"),
        (
            "sink of rows without keys",
            "if (row.max == -kInfinity<C>) return 1;",
            "if (row.max == -kInfinity<C>) return 0;",
        ),
        (
            "delta without the last dims",
            "for (; d < p.value_dim; ++d) sum += double",
            "for (; d + 1 < p.value_dim; ++d) sum += double",
        ),
        ("delta of half a register", "for (int h = 0; h < 2; ++h)", "for (int h = 0; h < 1; ++h)"),
    ),
    *planted(
        "flash_attention",
        HOST,
        ("slopes of the first sequence for all", "per_batch ? p.heads : 0", "0"),
        ("lse of unowned rows not written", "torch::stable::fill_(rest_lse, -INFINITY);", ""),
        ("strides of the bias ignored where it is broadcast", "if (t.size(i) > 1) strides[target]", "strides[target]"),
    ),
    *planted(
        "flash_attention",
        "csrc/cpu/exp.h",
        ("a coefficient of the exponential", "broadcast(0x1.ebfbdcp-3f)", "broadcast(0x1.ebf0dcp-3f)"),
        units=(FORWARD,),
    ),
    *planted(
        "flash_attention",
        "csrc/cpu/tanh.h",
        ("a coefficient of the tangent", "broadcast(0x1.110726p-3f)", "broadcast(0x1.112726p-3f)"),
        units=(FORWARD,),
    ),
    *planted(
        "layer_norm",
        "csrc/cpu/norm_rows.h",
        (
            "eps outside the root",
            "1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps)",
            "1 / (__builtin_sqrt(variance < 0 ? 0 : variance) + eps)",
        ),
        ("rest of the mean forgotten", "broadcast(C(-rest * rstd))", "broadcast(C(0))"),
        ("squares around zero", "part.load_from(x + i) - center) * scale", "part.load_from(x + i)) * scale"),
        ("bias left out", "fma(normed, w, part.load_from(bias + i))", "normed * w"),
        ("residual not added", "part.load_from(x + i) + part.load_from(residual + i)", "part.load_from(x + i)"),
        (
            "new residual without x",
            "part.store_to(rounded + i, v);",
            "part.store_to(rounded + i, part.load_from(residual + i));",
        ),
        ("dx without its pull", "fma(normed, pull[j], g)", "g"),
        ("dx without the mean of g", "Centered ? d * w - mean_g[j] : d * w", "d * w"),
        ("dx without dsum", "dsum[j] ? own + part.load_from(dsum[j] + i) : own", "own"),
        ("dw of dy alone", "sum_dw.add(d * normed);", "sum_dw.add(d);"),
        ("last row of a block skipped", "for (; r < blocks.end(block); ++r)", "for (; r + 1 < blocks.end(block); ++r)"),
        units=(kernel("layer_norm"),),
    ),
    *planted(
        "rms_norm",
        "csrc/cpu/row_sums.h",
        ("huge rows not rescued", "sum_of_squares < 0x1p126 ? 1.0f : 0x1p-96f", "1.0f"),
        ("end of a long row not summed", "if (i < end) add(i, End{end - i}, acc[0]);", ""),
        (
            "a piece of a long row summed twice",
            "n - begin < kPiece ? n : begin + kPiece",
            "n - begin < kPiece ? n : begin + kPiece + 1",
        ),
        units=(kernel("rms_norm"),),
    ),
    *planted(
        "rms_norm",
        "csrc/cpu/staged_row.h",
        ("stride of a row ignored", "scratch[i] = row[i * rows.inner_stride];", "scratch[i] = row[i];"),
        ("stride of a weight ignored", "from[i * parameter.stride]", "from[i]"),
        units=(kernel("rms_norm"),),
    ),
    *planted(
        "rms_norm",
        "csrc/cpu/sum_blocks.cpp",
        ("first block not summed", "for (int64_t b = 0; b < blocks; ++b)", "for (int64_t b = 1; b < blocks; ++b)"),
    ),
    *planted(
        "rotary_embedding",
        kernel("rotary_embedding"),
        ("turned the other way", "fma(a, c, -(b * s))", "fma(a, c, b * s)"),
        ("half of the pair one off", "b = part.load_from(x + half + i)", "b = part.load_from(x + half - 1 + i)"),
        ("wrong pairs", "VecF{v[1], v[0], v[3], v[2]}", "VecF{v[2], v[3], v[0], v[1]}"),
        ("what is not turned left out", "if (from != to) for (int64_t i = n;", "if (false) for (int64_t i = n;"),
        ("gradient turned forward", "p.inverse ? -1 : 1", "1"),
        ("positions ignored", "if (p.positions.data) {", "if (false) {"),
    ),
    *planted(
        "silu_and_mul",
        kernel("gated_activations"),
        (
            "gate and factor exchanged",
            "gate_value<Activation>(part.load_from(x + i)) * part.load_from(x + n + i)",
            "gate_value<Activation>(part.load_from(x + n + i)) * part.load_from(x + i)",
        ),
        ("gradient of the gate without the factor", "d * up * slope", "d * slope"),
        (
            "gradient of the factor without the gate",
            "part.store_to(dx + n + i, d * value);",
            "part.store_to(dx + n + i, d * up);",
        ),
    ),
    *planted(
        "silu_and_mul",
        "csrc/cpu/activations.h",
        ("slope of the wrong side", "x < VecF{} ? -clamped : clamped", "clamped"),
        units=(kernel("gated_activations"),),
    ),
    *planted(
        "merge_attention_states",
        kernel("merge_attention_states"),
        (
            "weights exchanged",
            "{a_larger ? larger : smaller, a_larger ? smaller : larger,",
            "{a_larger ? smaller : larger, a_larger ? larger : smaller,",
        ),
        ("lse of the larger alone", "large + __builtin_log1p(ratio)", "large"),
        ("dlse_b of the other sign", "dlse - weights.a * dot", "dlse + weights.a * dot"),
        ("lse of the empty side", "a_empty ? p.lse_b : p.lse_a", "a_empty ? p.lse_a : p.lse_b"),
        ("token of the wrong row", "token(row / p.heads % p.tokens)", "token(row % p.tokens)"),
        ("gradient to the empty side", "a_empty ? C(0) : dlse;", "dlse;"),
    ),
    *planted(
        "paged_attention",
        PAGED + "item.h",
        (
            "page turned one token late",
            "min_of(p.page_size - token, to - at)",
            "min_of(p.page_size + 1 - token, to - at)",
        ),
        ("a key that no row sees is not zero", "rows.rows[i] = zeros;", "rows.rows[i] = p.k.data;"),
        ("place in the page forgotten", "token * p.k.token + kv_head * p.k.head", "kv_head * p.k.head"),
        ("left edge one key further", "diagonal - p.left)", "diagonal - p.left - 1)"),
        ("right edge one key nearer", "diagonal + p.right)", "diagonal + p.right - 1)"),
        ("head of the wrong group", "item.kv_head * p.group + r % p.group", "item.kv_head + r % p.group"),
        ("tree of the first token for all", "p.tree + token * p.tree_query", "p.tree"),
        ("scale of the first head for all", "kv_head * p.k.scale_head", "0"),
        units=(kernel("paged_attention"),),
    ),
    *planted(
        "paged_attention",
        kernel("paged_attention"),
        (
            "output never rescaled",
            "fma(load(o + d), broadcast(alpha[r]), load(scratch.products + d))",
            "load(o + d) + load(scratch.products + d)",
        ),
        ("NaN in V is not looked for", "return all_finite(scratch.products, count * stride);", "return true;"),
        ("keys out of the window are read", "first_step, first, min_of", "first_step, first_step, min_of"),
        ("a range is not folded", "total.sum = fma(broadcast(total.sum), before, broadcast(state.sum) * now)[0];", ""),
        (
            "the later range unscaled",
            "fma(load(total_o + d), before, load(o + d) * now)",
            "fma(load(total_o + d), before, load(o + d))",
        ),
        ("scale of values forgotten", "x = x == VecF{} ? x : x *", "x = true ? x : x *"),
        ("scale of keys forgotten", "x = x * load(scale_k + i);", ""),
        ("tree forgotten for a seen NaN", "!(row.tree && at >= row.tree_begin", "!(false && at >= row.tree_begin"),
        (
            "a chain of the sum left out",
            "sum[part] = sum[part] + sum[part + parts / 2];",
            "sum[part] = part ? sum[part] : sum[part] + sum[part + parts / 2];",
        ),
        ("pieces begin with the window", "key + (least - key) / kFoldKeys * kFoldKeys", "key + (least - key) / 4 * 4"),
        ("sink of the first head for all", "p.sink[head]", "p.sink[0]"),
        ("partial results in another order", "range < s.ranges(); ++range) {", "range + 1 < s.ranges(); ++range) {"),
    ),
    *planted(
        "paged_attention",
        PAGED + "products.h",
        ("chains of a packed score in another order", "const int lane = (i & 1) << 3 |", "const int lane = i; //"),
        ("last words of a row left out", "if (w * P::kPerWord < head_dim)\n", "if (false)\n"),
        (
            "half of the lanes of a score twice",
            "crossed[l] = l & M ? b[l ^ M] : a[l ^ M];",
            "crossed[l] = straight[l];",
        ),
        ("one chain of the values", "total[r][v] + (sum[0][r][v] + sum[1][r][v])", "total[r][v] + sum[0][r][v]"),
        (
            "values of the first words again",
            "add_products<P, Rows, 1, false>(p, values, d,",
            "add_products<P, Rows, 1, false>(p, values, 0,",
        ),
        units=(kernel("paged_attention"),),
    ),
    *planted(
        "paged_attention",
        PAGED + "paged_attention.cpp",
        ("a range shared by one page", "size_t(last - first + 1) * sizeof(int32_t)", "sizeof(int32_t)"),
        (
            "a range that one sequence has not filled is shared",
            "whole && (range + 1) * kRangeKeys <= other.keys",
            "whole",
        ),
        (
            "blocks of the table unchecked",
            "check_pages(kOp, a.block_table.has_value(), s.pages, s.first_key, s.keys,",
            "check_pages(kOp, a.block_table.has_value(), s.pages, s.keys, s.keys,",
        ),
    ),
    *planted(
        "append_kv_cache",
        kernel("append_kv_cache"),
        ("rotation of the wrong side", "fma(b, c, a * s)[0]", "fma(b, c, a * -s)[0]"),
        ("skipped tokens are written", "if (slot < 0) continue;", "if (slot < -1) continue;"),
        ("int8 scale of 128", "constexpr float kLargest = 127;", "constexpr float kLargest = 128;"),
        ("NaN as a number", "if (finite != 0) {", "if (false) {"),
    ),
    *planted(
        "append_kv_cache",
        "csrc/ops/append_kv_cache/append_kv_cache.cpp",
        ("a slot given twice is written", "  if (rising) return;", "  return;"),
    ),
    *planted(
        "sample",
        kernel("sample"),
        (
            "weights rounded down",
            "bit_cast<VecL>(p) + power) + shifter)",
            "bit_cast<VecL>(p) + power) + shifter - 0.5)",
        ),
        ("a NaN passes", "ordinary &= v < broadcast(kInfinity); most", "most"),
        ("tail past the end weighed", "rest[lane] = -kInfinity;", "rest[lane] = 0;"),
        ("boundary left out", "(VecL)(y >= broadcast(low))", "(VecL)(y > broadcast(low))"),
        ("min_p left out", "w >= broadcast(least)", "w >= broadcast(0.0)"),
        ("tail of a row not looked at", "rest[lane] > lanes[lane] ? rest[lane]", "false ? rest[lane]"),
    ),
    *planted(
        "sample",
        "csrc/ops/sample/sample_row.cpp",
        ("equal logits from the highest index", "uint32_t(~uint32_t(place));", "uint32_t(place);"),
        ("top_p one unit short", "int64_t(whole) + ((whole << shift) != product)", "int64_t(whole)"),
        ("the same number at every offset", "philox<1>(uint32_t(offset),", "philox<1>(0,"),
        ("high half of the offset ignored", "{uint32_t(offset >> 32)}", "{0}"),
        (
            "penalty on a penalised logit",
            "double(y) / r.repetition_penalty",
            "double(own_[size_t(token)]) / r.repetition_penalty",
        ),
        ("penalty the wrong way", "y > 0 ? double(y) / r", "y < 0 ? double(y) / r"),
        (
            "one token fewer than top_k",
            "const int64_t n = top_k - above;",
            "const int64_t n = std::max<int64_t>(1, top_k - above - 1);",
        ),
        (
            "top_p of everything",
            "total += weight_of_ranks(scale, 0, n);",
            "total += weight_of_ranks(scale, 0, int64_t(ranks_.size()));",
        ),
        ("boundary class one late", "wanted > class_weight_[size_t(c)]", "wanted >= class_weight_[size_t(c)]"),
        ("all equal logits kept", "place_of(last) + 1, 0}", "x.count, 0}"),
        ("negligible too early", "kSampleBits - 1.01)", "kSampleBits + 9.0)"),
        (
            "equal logits of the narrowed row",
            "tokens_.begin() + x.count, kept.equals_end) - tokens_.begin();",
            "tokens_.begin() + x.count, kept.equals_end) - tokens_.begin() + 1;",
        ),
        ("token within the narrowed row", "choice.token = tokens_[size_t(choice.token)];", ";"),
        ("a temperature near 0 divides by it", "std::min(kLog2E / r.temperature, 0x1p1000)", "kLog2E / r.temperature"),
        (
            "logprob after the penalty",
            "const SampleScale given{x.largest, kLog2E};",
            "const SampleScale given{x.largest, kLog2E / (r.temperature + 1)};",
        ),
    ),
    *planted(
        "sample",
        "csrc/ops/sample/sample.cpp",
        ("parameter of the first request", "const int64_t at = i * tensor_->stride(0);", "const int64_t at = 0 * i;"),
        ("padding read", "r.previous_count = lens[b];", "r.previous_count = t.size(1);"),
    ),
    *planted(
        "fused_adamw",
        kernel("fused_adamw"),
        ("clip left out", "part.load_from(g + i) * broadcast(s.clip)", "part.load_from(g + i)"),
        ("no weight decay", "x = x * broadcast(s.keep);", ";"),
        ("the moment before this step", "x - new_m / denominator", "x - old_m / denominator"),
        ("second moment not corrected", "sqrt(new_v) * broadcast(s.root_scale)", "sqrt(new_v)"),
        (
            "eps inside the root",
            "sqrt(new_v) * broadcast(s.root_scale)",
            "sqrt(new_v + s.eps) * broadcast(s.root_scale)",
        ),
        ("master not read", "master ? part.load_from(master + i) : part.load_from(p + i)", "part.load_from(p + i)"),
        ("master not written", "if (master) part.store_to(master + i, x);", ""),
        ("average of rounded parameters", "old + (x - old)", "old + (part.load_from(p + i) - old)"),
        ("rest of a sum left out", "if (i < count) {", "if (false) {"),
        ("float32 gradients as the parameter's", "if (t.grad_dtype == t.dtype)", "if (true)"),
    ),
    *planted(
        "fused_adamw",
        "csrc/ops/fused_adamw/fused_adamw.cpp",
        ("a NaN norm clips nothing", "share > 1 ? 1 : share", "share < 1 ? share : 1"),
        ("norm of the last piece", "for (const double s : sums) sum += s;", "for (const double s : sums) sum = s;"),
        ("maximize ignored", "float(maximize ? -clip : clip)", "float(clip)"),
        ("end of a tensor left out", "std::min(begin + kAdamwBlock, n)", "std::min(begin + kAdamwBlock, n - n % 2)"),
        ("overlaps not seen", "r.bytes.begin >= furthest->bytes.end", "true"),
        ("strides not looked at", "t.size(d) <= 1 || t.stride(d) == p.stride(d)", "true"),
        ("gaps not seen", "range.end - range.begin == t.numel() * size", "true"),
    ),
]
