// Rows in vectors of 16 bytes, the widest access there is. Vector j of a row is its elements [j * kCount, (j + 1) *
// kCount). Where alignment or strides forbid 16 bytes at once, the same thread reads the same elements one by one: the
// arithmetic, and so the bits, are the same.
#pragma once
#include "core/rows.h"
#include "core/switch.h"
#include "cuda/ptx.cuh"

namespace genai_kernels {

template <class T>
struct Vector {
  static constexpr int kCount = 16 / int(sizeof(T));
  uint32_t word[4] = {};

  GK_DEVICE float operator[](int i) const {  // i is known when the loop around it is unrolled
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word[i]);
    else
      return to_float(T{uint16_t(word[i / 2] >> 16 * (i % 2))});
  }
  GK_DEVICE T raw(int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word[i]);
    else
      return T{uint16_t(word[i / 2] >> 16 * (i % 2))};
  }
  GK_DEVICE void set_raw(int i, T x) {  // of an element that is still zero
    if constexpr (sizeof(T) == 4)
      word[i] = __float_as_uint(x);
    else
      word[i / 2] |= uint32_t(x.bits) << 16 * (i % 2);
  }
  GK_DEVICE void drop_first() {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t next = w < 3 ? word[w + 1] : 0;
      word[w] = sizeof(T) == 4 ? next : word[w] >> 16 | next << 16;
    }
  }
  GK_DEVICE static Vector of(uint4 x) { return {{x.x, x.y, x.z, x.w}}; }
  GK_DEVICE uint4 all() const { return make_uint4(word[0], word[1], word[2], word[3]); }
};

// Between two passes over held vectors: they stay as they are stored, not as the floats of the first pass.
template <class T, int kVectors>
GK_DEVICE void forget_floats(Vector<T> (&v)[kVectors]) {
  if constexpr (sizeof(T) == 2)
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) forget(v[j].word[w]);
}

template <class T, int kVectors>
GK_DEVICE void rotate_vectors(Vector<T> (&v)[kVectors]) {
  const Vector<T> first = v[0];
#pragma unroll
  for (int k = 0; k + 1 < kVectors; ++k) v[k] = v[k + 1];
  v[kVectors - 1] = first;
}

// Rounded to T.
template <class T>
GK_DEVICE Vector<T> rounded(const float (&x)[Vector<T>::kCount]) {
  Vector<T> v;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4)
      v.word[w] = __float_as_uint(x[w]);
    else
      v.word[w] = pack<T>(x[2 * w], x[2 * w + 1]);
  }
  return v;
}

// Rows::offset by divisions of 32 bits: those of 64 bits are calls, around which registers are saved. Launchers ask
// few_rows() first.
GK_DEVICE int64_t row_offset(const Rows& rows, int64_t row) {
  if (rows.dims <= 1) return rows.dims ? row * rows.stride[0] : 0;
  int64_t at = 0;
  uint32_t rest = uint32_t(row);
  for (int d = rows.dims - 1; d >= 0; --d) {
    const uint32_t size = uint32_t(rows.size[d]), q = rest / size;
    at += int64_t(rest - q * size) * rows.stride[d];
    rest = q;
  }
  return at;
}
inline bool few_rows(const Rows& rows) { return rows.dims <= 1 || rows.count <= int64_t(0xffffffff); }

template <class T>
GK_DEVICE Vector<T> all_nan() {
  float nan[Vector<T>::kCount];
#pragma unroll
  for (int i = 0; i < Vector<T>::kCount; ++i) nan[i] = NAN;
  return rounded<T>(nan);
}

// One row: `length` elements, `stride` apart. Index: an int where a row is known to be short, to spare registers.
template <class T, class Index = int64_t>
struct RowView {
  static constexpr int kPer = Vector<T>::kCount;
  T* data;
  int64_t stride;
  Index length;
  bool wide;  // 16 bytes at once

  RowView() = default;
  // `count` elements of a row, from `begin` on; `beyond`: more elements of memory from there.
  GK_DEVICE RowView(const Rows& rows, int64_t row, bool is_wide, Index count, int64_t begin = 0, int64_t beyond = 0)
      : data(static_cast<T*>(rows.data) + row_offset(rows, row) + begin * rows.inner_stride + beyond),
        stride(rows.inner_stride),
        length(count),
        wide(is_wide) {}

  // Vectors first, first + step, ...: those that lie in the row, zeros beyond it.
  template <int kVectors>
  GK_DEVICE void load(Vector<T> (&v)[kVectors], Index first, Index step) const {
    if (wide) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const Index at = (first + j * step) * kPer;
        v[j] = at < length ? Vector<T>::of(load_16(data + at)) : Vector<T>{};
      }
    } else {  // a loop, its vectors passed on from place to place: unrolled, it would take the registers of the hot path
#pragma unroll 1
      for (int j = 0; j < kVectors; ++j) {
        const Index at = (first + j * step) * kPer;
        Vector<T> last;
#pragma unroll
        for (int i = 0; i < kPer; ++i)
          if (at + i < length) last.set_raw(i, data[(at + i) * stride]);
#pragma unroll
        for (int k = 0; k + 1 < kVectors; ++k) v[k] = v[k + 1];
        v[kVectors - 1] = last;
      }
    }
  }
  GK_DEVICE Vector<T> load(Index vector) const {
    Vector<T> v[1];
    load(v, vector, 0);
    return v[0];
  }
  GK_DEVICE void store(Index vector, const Vector<T>& v) const {
    const Index at = vector * kPer;
    if (wide) {
      if (at < length) store_16(data + at, v.all());
    } else {
      Vector<T> rest = v;
#pragma unroll 1
      for (int i = 0; i < kPer && at + i < length; ++i) {
        data[(at + i) * stride] = rest.raw(0);
        rest.drop_first();
      }
    }
  }
};

// Whether every row can be read 16 bytes at once, cut into parts of `part` elements. For launchers.
inline bool is_wide(const Rows& rows, int64_t bytes_of_element, int64_t part) {
  if (!rows.data) return true;
  bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && part * bytes_of_element % 16 == 0;
  aligned = aligned && (rows.inner_stride == 1 || rows.length == 1);
  for (int d = 0; d < rows.dims; ++d)
    aligned = aligned && (rows.size[d] == 1 || rows.stride[d] * bytes_of_element % 16 == 0);
  return aligned;
}
inline bool is_wide(const Rows& rows, int64_t bytes_of_element) { return is_wide(rows, bytes_of_element, rows.length); }

// Calls f with the type of a tensor on the GPU; the hosts have refused float64.
template <class F>
inline void switch_gpu_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) return f(TypeTag<float>{});
  if (dtype == Dtype::bf16) return f(TypeTag<bf16>{});
  f(TypeTag<fp16>{});
}

}  // namespace genai_kernels
