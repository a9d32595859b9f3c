"""Planted faults of attention's CUDA kernels: (name, file, old, new, unit, check), as in faults.py, for attention_checks.py.

What a header defines stands in several objects; the linker takes it from the first that did not inline it. So a fault of
a long function of score.cuh has the unit that is linked first, the backward's.
"""

ROOM = "csrc/ops/flash_attention/"
SCORE, SIMT, TILE = ROOM + "score.cuh", ROOM + "simt.cuh", ROOM + "sm80.cuh"
FORWARD, BACKWARD = ROOM + "flash_attention_fwd_sm80.cuh", ROOM + "flash_attention_bwd_sm80.cuh"
FORWARD_UNIT, BACKWARD_UNIT = ROOM + "flash_attention_fwd_sm80.cu", ROOM + "flash_attention_bwd_sm80.cu"
SIMT_UNIT = ROOM + "flash_attention_simt.cu"


def judge(samples, dtype="bfloat16"):
    return ("judge", dtype, samples)


DAILY = ["K is not waited for", "one key too many", "fragments exchanged", "O is not rescaled", "wrong head of the keys"]

FAULTS = [
    # ---- forward, mma.sync ----
    ("K is not waited for", FORWARD, "copy_async_wait<0>();\n      __syncthreads();  // K is", "__syncthreads();  // K is",
     FORWARD_UNIT, judge("plain")),
    ("V is not waited for", FORWARD, "copy_async_wait<0>();\n      __syncthreads();  // V is", "__syncthreads();  // V is",
     FORWARD_UNIT, judge("plain")),
    ("no barrier before V is loaded again", FORWARD,
     "      __syncthreads();  // K is there, and V of the step before is read\n", "", FORWARD_UNIT,
     judge("longer_keys,several_tiles")),
    ("no barrier before K is loaded again", FORWARD, "      __syncthreads();  // V is there, and K is read\n", "",
     FORWARD_UNIT, judge("longer_keys,several_tiles")),
    ("one key too many", SCORE, "at = query + s.shift + int(p.right);", "at = query + s.shift + int(p.right) + 1;",
     FORWARD_UNIT, judge("causal")),
    ("one key too few at the left", SCORE, "at = query + s.shift - int(p.left);",
     "at = query + s.shift - int(p.left) + 1;", FORWARD_UNIT, judge("window,window_one_key")),
    ("a tile taken for fully visible", SCORE, "(first_key(p, s, end) + size - 1) / size * size,",
     "first_key(p, s, end) / size * size,", FORWARD_UNIT, judge("window")),
    ("the last tile is skipped", FORWARD, "key < visit.end; key += C::kKeys", "key + C::kKeys <= visit.end; key += C::kKeys",
     FORWARD_UNIT, judge("longer_keys")),
    ("fragments exchanged", TILE, "mma_16x8x16<T>(c[i][2 * j], left[i], right[0], right[1]);",
     "mma_16x8x16<T>(c[i][2 * j], left[i], right[1], right[0]);", FORWARD_UNIT, judge("plain")),
    ("rows of a fragment exchanged", TILE, "lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2",
     "lane / 8 % 2 * 8 + lane % 8, 2 * k + lane / 16", FORWARD_UNIT, judge("plain")),
    ("loaded without the swizzle", TILE, "copy_async_16(to.chunk(row, c),", "copy_async_16(to.data + row * kDim + 8 * c,",
     FORWARD_UNIT, judge("plain")),
    ("O is not rescaled", FORWARD, "o[i][d][e] *= alpha;", "o[i][d][e] *= 1;", FORWARD_UNIT, judge("several_tiles")),
    ("the sum is not rescaled", FORWARD, "sum[i][half] * alpha + part", "sum[i][half] + part", FORWARD_UNIT,
     judge("several_tiles")),
    ("the maximum of two lanes of four", FORWARD, "        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));\n", "",
     FORWARD_UNIT, judge("plain")),
    ("wrong head of the keys", FORWARD, "t.head / int(p.group),\n", "t.head % int(p.kv_heads),\n", FORWARD_UNIT, judge("gqa")),
    ("the next counter of dropout", SCORE, "philox<1>(uint32_t(key) / 4,", "philox<1>(uint32_t(key) / 4 + 1,", FORWARD_UNIT,
     judge("dropout")),
    ("dropout of one row for two", TILE, "query + 8 * odd", "query", FORWARD_UNIT, judge("dropout")),
    ("the sink is not in the output", SCORE, "end.total = sum * end.beside_sink + expf(sink - higher);",
     "end.total = sum * end.beside_sink;", FORWARD_UNIT, judge("sink")),
    ("a sequence starts one tile late", SCORE, "if (cu[middle] / size + middle <= tile)",
     "if (cu[middle] / size + middle < tile)", BACKWARD_UNIT, judge("different,plain")),
    ("dims beyond the last are read", TILE, "valid = row < count && 8 * c < dims", "valid = row < count", FORWARD_UNIT,
     judge("value_dim,head_dim_128,mqa")),
    ("NaN of V is multiplied in the second pass", FORWARD, "block.attend(dirty);", "block.attend(false);", FORWARD_UNIT,
     ("unseen", "bfloat16")),
    ("a NaN that is seen is not brought back", FORWARD, "  if (!dirty) return;\n", "  return;\n", FORWARD_UNIT,
     ("unseen", "bfloat16")),
    # ---- backward, mma.sync ----
    ("delta is not subtracted", BACKWARD, "y = x * (y - f.delta);", "y = x * y;", BACKWARD_UNIT, judge("several_tiles")),
    ("a step is loaded over the one in use", BACKWARD,
     "      __syncthreads();  // this step is there, and the one before is read\n", "", BACKWARD_UNIT,
     judge("longer_keys,several_tiles")),
    ("a step is not waited for", BACKWARD, "      copy_async_wait<0>();\n", "", BACKWARD_UNIT, judge("plain")),
    ("the wrong heads of a group", BACKWARD, "t.head * group + n / steps", "t.head + n / steps", BACKWARD_UNIT, judge("gqa")),
    ("the slope of the softcap is forgotten", BACKWARD, "y = cap * gradient(", "y = gradient(", BACKWARD_UNIT, judge("softcap")),
    ("dK without the scale", BACKWARD, "store(sum, float(p.scale), p.dk,", "store(sum, 1.f, p.dk,", BACKWARD_UNIT, judge("plain")),
    ("dropout is not in dP", BACKWARD, "gradient(x, factor * mine_too", "gradient(x, mine_too", BACKWARD_UNIT, judge("dropout")),
    ("the last query tile is skipped", SCORE, "return {first / size * size, last + 1, (full_first",
     "return {first / size * size, last / size * size, (full_first", BACKWARD_UNIT, judge("causal")),
    ("a row with one key keeps its rounding", BACKWARD, "if (hides && inverse == 1.f", "if (false && inverse == 1.f",
     BACKWARD_UNIT, judge("window_one_key")),
    # ---- one warp at a time ----
    ("the sum of a row is not rescaled", SIMT, "sum = fmaf(sum, alpha, probability);", "sum += probability;", SIMT_UNIT,
     judge("several_tiles", "float32")),
    ("no barrier before probabilities are read", SIMT,
     "    room[lane] = probability;\n    __syncwarp();\n", "    room[lane] = probability;\n", SIMT_UNIT, judge("plain", "float32")),
    ("dlse is forgotten", SIMT_UNIT, "float(sum - dlse_of(p, s, t.head, query))", "float(sum)", SIMT_UNIT,
     judge("causal", "float32")),
    ("one head of the bias's gradient", SIMT_UNIT, "h < (all_heads ? int(p.heads) : head + 1)", "h < head + 1", SIMT_UNIT,
     judge("bias_over_heads", "float32")),
    ("the sink's share without the scale", SIMT_UNIT, "exp(sink - double(state.max) * unit)", "exp(sink - double(state.max))",
     SIMT_UNIT, judge("sink", "float32")),
]  # fmt: skip
