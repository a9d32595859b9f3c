// Keys and values of new tokens to their slots of a paged cache: as they are, rotated, or as int8 with a scale for each
// token and head.
#include "cpu/region_headers.h"
#include "ops/append_kv_cache/append_kv_cache.h"

#define GENAI_KERNELS_ISA_FILE "ops/append_kv_cache/append_kv_cache_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr float kLargest = 127;  // of int8; -128 is left out, so that x and -x are stored alike

void read_table(Dtype dtype, const void* table, int64_t row, int64_t dim_stride, int64_t n, float* out) {
  switch_dtype(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const W* from = static_cast<const W*>(table) + row;
    for (int64_t i = 0; i < n; ++i) out[i] = float(to_compute(from[i * dim_stride]));
  });
}

// x[rotary_dim] in place; as rotary_embedding's kernel does, to the last bit.
void rotate(float* x, int64_t rotary_dim, bool interleaved, const float* cos, const float* sin) {
  const int64_t half = rotary_dim / 2, step = interleaved ? 2 : 1, second = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const VecF a = broadcast(x[i * step]), b = broadcast(x[i * step + second]);
    const VecF c = broadcast(cos[i]), s = broadcast(sin[i]);
    x[i * step] = interleaved ? fma(a, c, b * -s)[0] : fma(a, c, -(b * s))[0];
    x[i * step + second] = fma(b, c, a * s)[0];
  }
}

// One head to int8: scale = largest / 127. A head with a NaN or an infinity becomes NaN as a whole: no scale could keep
// the rest of it.
void quantize(const float* x, int64_t n, int8_t* out, float* scale) {
  float largest = 0, finite = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    largest = size > largest ? size : largest;
    finite += size - size;
  }
  if (finite != 0) {
    *scale = __builtin_nanf("");
    for (int64_t i = 0; i < n; ++i) out[i] = 1;
    return;
  }
  *scale = largest / kLargest;
  // a largest number so small that its scale is not one that can be divided by is stored as zeros
  const float inverse = *scale >= 0x1p-126f ? kLargest / largest : 0;
  for (int64_t i = 0; i < n; ++i) {
    const float shifter = 0x1.8p23f;  // adding it rounds to an integer, to nearest even
    out[i] = int8_t((x[i] * inverse + shifter) - shifter);
  }
}

template <class T>
void append(const AppendParams& p, const AppendedPart& part, bool rotated, int64_t t, int64_t slot, const float* cos,
            const float* sin, float* x) {
  const int64_t page = slot / p.page_size, token = slot - page * p.page_size;
  for (int64_t h = 0; h < p.heads; ++h) {
    const T* from = reinterpret_cast<const T*>(part.from) + t * part.from_token + h * part.from_head;
    const int64_t to = page * part.page + token * part.token + h * part.head;
    T* cache = reinterpret_cast<T*>(part.cache) + to;
    if (!rotated && !p.int8_cache) {
      if (part.from_dim == 1) {
        __builtin_memcpy(cache, from, size_t(part.dim) * sizeof(T));
      } else {
        for (int64_t i = 0; i < part.dim; ++i) cache[i] = from[i * part.from_dim];
      }
      continue;
    }
    for (int64_t i = 0; i < part.dim; ++i) x[i] = to_compute(from[i * part.from_dim]);
    if (rotated) rotate(x, p.rotary_dim, p.interleaved, cos, sin);
    if (p.int8_cache) {
      quantize(x, part.dim, reinterpret_cast<int8_t*>(part.cache) + to,
               part.scale + page * part.scale_page + token * part.scale_token + h * part.scale_head);
      continue;
    }
    const int64_t turned = rotated ? p.rotary_dim : 0;
    for (int64_t i = 0; i < turned; ++i) cache[i] = from_compute<T>(x[i]);
    for (int64_t i = turned; i < part.dim; ++i) cache[i] = from[i * part.from_dim];
  }
}

template <class T>
void append_tokens(const AppendParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t half = p.rotary_dim / 2;
  float *cos = scratch, *sin = scratch + half, *x = scratch + 2 * half;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = p.slot(t);
    if (slot < 0) continue;
    if (p.rotary_dim) {
      const int64_t position = p.position(t);
      read_table(p.table_dtype, p.cos, position * p.cos_row, p.cos_dim, half, cos);
      read_table(p.table_dtype, p.sin, position * p.sin_row, p.sin_dim, half, sin);
    }
    append<T>(p, p.k, p.rotary_dim > 0, t, slot, cos, sin, x);
    append<T>(p, p.v, false, t, slot, cos, sin, x);
  }
}

}  // namespace

void append_kv_cache_kernel(const AppendParams& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case Dtype::f32:
      return append_tokens<float>(p, begin, end, scratch);
    case Dtype::bf16:
      return append_tokens<bf16>(p, begin, end, scratch);
    case Dtype::f16:
      return append_tokens<fp16>(p, begin, end, scratch);
    case Dtype::f64:
      return;  // the host refuses it
  }
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, append_kv_cache_kernel,
                           (const AppendParams& p, int64_t begin, int64_t end, float* scratch),
                           (p, begin, end, scratch))

#endif
