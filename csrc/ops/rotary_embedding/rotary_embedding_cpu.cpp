// Rotary position embedding on the CPU. A pair (a, b) of a head becomes (a c - b s, b c + a s); the pairs are
// (x[i], x[i + rotary_dim / 2]) for NeoX, (x[2 i], x[2 i + 1]) interleaved. The cosines and sines of a token are brought
// into the order of the elements once and used for all its heads.
#include "cpu/region_headers.h"
#include "ops/rotary_embedding/rotary_embedding.h"

#define GENAI_KERNELS_ISA_FILE "ops/rotary_embedding/rotary_embedding_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Lanes 2 i and 2 i + 1 exchanged.
GK_INLINE VecF swap_pairs(VecF v) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_permute_ps((__m512)v, 0xb1);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecF)_mm256_permute_ps((__m256)v, 0xb1);
#else
  return VecF{v[1], v[0], v[3], v[2]};
#endif
}
GK_INLINE VecD swap_pairs(VecD v) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecD)_mm512_permute_pd((__m512d)v, 0x55);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecD)_mm256_permute_pd((__m256d)v, 0x5);
#else
  return VecD{v[1], v[0]};
#endif
}

template <class T>
void rotate_halves(const T* x, T* y, int64_t half, const Compute<T>* cos, const Compute<T>* sin) {
  using V = Vec<Compute<T>>;
  for_each_register<Compute<T>>(half, [&](int64_t i, auto part) {
    const V a = part.load_from(x + i), b = part.load_from(x + half + i);
    const V c = part.load_from(cos + i), s = part.load_from(sin + i);
    part.store_to(y + i, fma(a, c, -(b * s)));
    part.store_to(y + half + i, fma(b, c, a * s));
  });
}

// cos and sin hold every value twice, sin the first time negated.
template <class T>
void rotate_pairs(const T* x, T* y, int64_t n, const Compute<T>* cos, const Compute<T>* sin) {
  using V = Vec<Compute<T>>;
  for_each_register<Compute<T>>(n, [&](int64_t i, auto part) {
    const V v = part.load_from(x + i);
    part.store_to(y + i, fma(v, part.load_from(cos + i), swap_pairs(v) * part.load_from(sin + i)));
  });
}

// The cosines or sines of a token, `count` of them, in the order of the elements of a head.
template <class C, bool Interleaved>
void stage_table(Dtype dtype, const Rows& table, int64_t row, int64_t count, C first, C second, C* out) {
  switch_dtype(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const W* from = table.row<W>(row);
    for (int64_t i = 0; i < count; ++i) {
      const C value = C(to_compute(from[i * table.inner_stride]));
      if constexpr (Interleaved) {
        out[2 * i] = first * value;
        out[2 * i + 1] = second * value;
      } else {
        out[i] = second * value;
      }
    }
  });
}

template <class T, bool Interleaved>
void rotate_tokens(const RotaryParams& p, int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  const int64_t n = p.rotary_dim, half = n / 2;
  C *cos = scratch, *sin = scratch + n;
  T* staged = reinterpret_cast<T*>(scratch + 2 * n);
  const C sign = p.inverse ? -1 : 1;
  for (int64_t token = begin; token < end; ++token) {
    int64_t row = token;
    if (p.positions.data) {
      const int64_t at = p.positions.offset(token);
      row = p.long_positions ? static_cast<const int64_t*>(p.positions.data)[at]
                             : static_cast<const int32_t*>(p.positions.data)[at];
    }
    stage_table<C, Interleaved>(p.table_dtype, p.cos, row, half, 1, 1, cos);
    stage_table<C, Interleaved>(p.table_dtype, p.sin, row, half, -sign, sign, sin);
    const T* x = p.x.row<T>(token);
    T* y = p.y.row<T>(token);
    for (int64_t h = 0; h < p.heads; ++h, x += p.x_head_stride, y += p.y_head_stride) {
      const T* from = x;
      T* to = p.y.inner_stride == 1 ? y : staged;
      if (p.x.inner_stride != 1) {
        for (int64_t i = 0; i < p.head_dim; ++i) staged[i] = x[i * p.x.inner_stride];
        from = staged;
      }
      if constexpr (Interleaved)
        rotate_pairs(from, to, n, cos, sin);
      else
        rotate_halves(from, to, half, cos, sin);
      if (from != to)
        for (int64_t i = n; i < p.head_dim; ++i) to[i] = from[i];
      if (to != y)
        for (int64_t i = 0; i < p.head_dim; ++i) y[i * p.y.inner_stride] = to[i];
    }
  }
}

}  // namespace

void rotary_fwd_kernel(const RotaryParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch_bool(p.interleaved, [&](auto interleaved) {
      rotate_tokens<T, decltype(interleaved)::value>(p, begin, end, static_cast<Compute<T>*>(scratch));
    });
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, rotary_fwd_kernel, (const RotaryParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))

#endif
