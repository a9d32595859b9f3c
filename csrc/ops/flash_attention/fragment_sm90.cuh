// What a thread of a warpgroup holds of a tile of scores or sums (wgmma_ptx.cuh): register i of 64 rows x N columns belongs
// to the thread's row row_half(i) of two, 8 apart, and to column 8 (i / 4) + 2 c + i % 2 with c = lane % 4. The four
// lanes of a "quad" share their rows.
#pragma once
#include "cuda/wgmma_ptx.cuh"
#include "ops/flash_attention/score.cuh"

namespace genai_kernels::sm90 {

GK_DEVICE constexpr int row_half(int i) { return i >> 1 & 1; }
GK_DEVICE int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + (i & 1); }
// Of the 64 rows of the warpgroup, the first of this thread's.
GK_DEVICE int first_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

GK_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
GK_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The lanes of a quad exchange r[j] of lane c for r[c] of lane j.
GK_DEVICE void quad_transpose(uint32_t (&r)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & distance) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? r[j] : r[j + distance], distance);
      if (upper)
        r[j] = got;
      else
        r[j + distance] = got;
    }
  }
}

// A tile of scores as the operand of a product over its columns.
template <class T, int kRegisters>
GK_DEVICE void pack_operand(const float (&from)[kRegisters], uint32_t (&to)[kRegisters / 8][4]) {
#pragma unroll
  for (int i = 0; i < kRegisters / 2; ++i) to[i / 4][i % 4] = pack<T>(from[2 * i], from[2 * i + 1]);
}

// Where a thread's part of a tile of scores lies, in positions within the sequence, and what is within the window: of row
// h, columns [first[h], last[h]]. Queries are the rows, or (kKeysInRows) the columns.
template <bool kKeysInRows>
struct Place {
  int row, column;  // of register 0
  int first[2], last[2];

  GK_DEVICE int row_of(int i) const { return row + 8 * row_half(i); }
  GK_DEVICE int column_of(int i) const { return column + i / 4 * 8 + (i & 1); }
  GK_DEVICE int query(int i) const { return kKeysInRows ? column_of(i) : row_of(i); }
  GK_DEVICE int key(int i) const { return kKeysInRows ? row_of(i) : column_of(i); }
  GK_DEVICE bool seen(int i) const { return first[row_half(i)] <= column_of(i) && column_of(i) <= last[row_half(i)]; }
  // The same; nothing that follows from it is kept in registers from one use to the next.
  GK_DEVICE Place again() const {
    Place at = *this;
    at.row = opaque(row);
    at.column = opaque(column);
    return at;
  }
};

// -inf for what lies outside of the window.
template <bool kKeysInRows, int kRegisters>
GK_DEVICE void hide(const Place<kKeysInRows>& at, float (&s)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i)
    if (!at.seen(i)) s[i] = -kAttentionInfinity;
}

// Scores::modify of a whole tile, one feature after the other, so that what a call does not ask for costs it nothing.
// Outside of the window nothing is read, and the score becomes -inf. kWithSlope: also d(score) / d(scale * product),
// where there is a softcap.
template <bool kWithSlope, bool kKeysInRows, int kRegisters>
GK_DEVICE void modify_tile(const FlashAttentionParams& p, const Scores& scores, const Place<kKeysInRows>& place,
                           float (&s)[kRegisters], float* slope_of_cap) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) s[i] *= scores.scale;
  if (p.softcap > 0)
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const float t = tanhf(s[i] * scores.per_cap);
      if constexpr (kWithSlope) slope_of_cap[i] = 1 - t * t;
      s[i] = scores.cap * t;
    }
  if (p.slopes) {
    const Place at = place.again();
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const int distance = at.query(i) + scores.shift - at.key(i);
      s[i] -= scores.slope * float(distance < 0 ? -distance : distance);
    }
  }
  const auto add_bias = [&](const auto* bias) {
    bias += scores.bias;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const Place at = place.again();
      if (!at.seen(i)) continue;
      const float added = to_float(bias[at.query(i) * p.bias.query + at.key(i) * p.bias.key]);
      s[i] = added == -kAttentionInfinity ? added : s[i] + added;
    }
  };
  if (p.bias.data) {
    if (p.bias.dtype == Dtype::f32)
      add_bias(reinterpret_cast<const float*>(p.bias.data));
    else if (p.bias.dtype == Dtype::bf16)
      add_bias(reinterpret_cast<const bf16*>(p.bias.data));
    else
      add_bias(reinterpret_cast<const fp16*>(p.bias.data));
  }
  if (p.mask.data) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const Place at = place.again();
      if (at.seen(i) && !p.mask.data[scores.mask + at.query(i) * p.mask.query + at.key(i) * p.mask.key])
        s[i] = -kAttentionInfinity;
    }
  }
  hide(place.again(), s);
}

// Dropout of a tile of probabilities whose first key is `key`, a multiple of 8: what a word drops becomes 0, the rest is
// multiplied. Four neighbouring keys share one Philox; a quad's even lanes compute it for the upper row and odd ones for
// the lower, and they exchange the words.
template <int kRegisters>
GK_DEVICE void drop_rows(const FlashAttentionParams& p, int batch, int head, int query, int key,
                         float (&probability)[kRegisters]) {
  const bool odd = threadIdx.x & 1;
  const int own_query = query + (odd ? 8 : 0), in_eight = (threadIdx.x & 2) * 2;
#pragma unroll
  for (int j = 0; j < kRegisters / 4; ++j) {
    uint32_t words[4];
    dropout_words(p, batch, head, opaque(own_query), key + 8 * j + in_eight, words);
    uint32_t mine[2], others[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      mine[e] = odd ? words[2 + e] : words[e];
      others[e] = __shfl_xor_sync(~0u, odd ? words[e] : words[2 + e], 1);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = odd == bool(i >> 1) ? mine[i & 1] : others[i & 1];
      float& x = probability[4 * j + i];
      x = word >= p.dropout_threshold ? x * p.dropout_factor : 0.f;
    }
  }
}

// True if store_rows may write 16 bytes at once.
GK_DEVICE bool in_16_bytes(const HeadsView& to, int64_t dim) {
  return to.dim == 1 && ((to.batch | to.token | to.head | dim) & 7) == 0 &&
         (reinterpret_cast<uintptr_t>(to.data) & 15) == 0;
}

// 64 rows of sums to memory as T, each times its factor: row `row` of the tile to to(row), where count says it exists.
// A quad collects 16 bytes for each lane where all of memory is in multiples of that.
template <class T, int kRegisters, class RowAddress>
GK_DEVICE void store_rows(const float (&sums)[kRegisters], const float (&factor)[2], int count, int dim, int64_t stride,
                          bool in_16_bytes, const RowAddress& to) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row() + 8 * h;
    T* const line = row < count ? to(row) : nullptr;
#pragma unroll
    for (int j = 0; j < kRegisters / 4; j += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int g = 0; g < 4; ++g)
        pairs[g] = pack<T>(sums[4 * (j + g) + 2 * h] * factor[h], sums[4 * (j + g) + 2 * h + 1] * factor[h]);
      if (in_16_bytes) {
        quad_transpose(pairs);
        const int column = 8 * (j + threadIdx.x % 4);
        if (line && column < dim)
          *reinterpret_cast<uint4*>(line + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      } else if (line) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = 8 * (j + e / 2) + threadIdx.x % 4 * 2 + e % 2;
          if (column < dim) line[column * stride] = T{uint16_t(pairs[e / 2] >> 16 * (e % 2))};
        }
      }
    }
  }
}

}  // namespace genai_kernels::sm90
