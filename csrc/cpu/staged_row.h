// A row as contiguous elements: where it lies if they are, otherwise collected in the caller's scratch.
// Included inside an instruction-set region after vec.h; include core/rows.h before the region.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class T>
GK_INLINE const T* read_row(const Rows& rows, int64_t r, T* scratch) {
  const T* row = rows.row<T>(r);
  if (rows.inner_stride == 1) return row;
  for (int64_t i = 0; i < rows.length; ++i) scratch[i] = row[i * rows.inner_stride];
  return scratch;
}

// The place to write a row to, and its delivery once written.
template <class T>
GK_INLINE T* begin_row(const Rows& rows, int64_t r, T* scratch) {
  return rows.inner_stride == 1 ? rows.row<T>(r) : scratch;
}
template <class T>
GK_INLINE void finish_row(const Rows& rows, int64_t r, const T* written) {
  if (rows.inner_stride == 1) return;
  T* row = rows.row<T>(r);
  for (int64_t i = 0; i < rows.length; ++i) row[i * rows.inner_stride] = written[i];
}

// One register's part of a row, whole or the end of it: what a kernel's text loads and stores through.
struct Whole {
  template <class T>
  GK_INLINE Vec<Compute<T>> load_from(const T* p) const {
    return load(p);
  }
  template <class T>
  GK_INLINE void store_to(T* p, Vec<Compute<T>> v) const {
    store(p, v);
  }
  template <class V>
  GK_INLINE V or_zero(V v) const {  // zero in the lanes beyond the row
    return v;
  }
};
struct End {
  int64_t count;
  template <class T>
  GK_INLINE Vec<Compute<T>> load_from(const T* p) const {
    return load_first(p, count);
  }
  template <class T>
  GK_INLINE void store_to(T* p, Vec<Compute<T>> v) const {
    store_first(p, v, count);
  }
  template <class V>
  GK_INLINE V or_zero(V v) const {
    for (int lane = 0; lane < int(sizeof v / sizeof v[0]); ++lane)
      if (lane >= count) v[lane] = 0;
    return v;
  }
};

template <class Part>
constexpr bool is_end = false;
template <>
constexpr bool is_end<End> = true;

// f(i, part) for every register of a row of n elements of the compute type C.
template <class C, class F>
GK_INLINE void for_each_register(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanesOf<C> <= n; i += kLanesOf<C>) f(i, Whole{});
  if (i < n) f(i, End{n - i});
}

// A weight or bias in the compute type: where it lies if it is in it already, otherwise converted into scratch.
template <class C>
GK_INLINE const C* stage_parameter(const Parameter& parameter, int64_t n, C if_absent, C* scratch) {
  constexpr Dtype kCompute = sizeof(C) == 8 ? Dtype::f64 : Dtype::f32;
  if (!parameter.data) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = if_absent;
    return scratch;
  }
  if (parameter.dtype == kCompute && parameter.stride == 1) return static_cast<const C*>(parameter.data);
  switch_dtype(parameter.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const W* from = static_cast<const W*>(parameter.data);
    if constexpr (sizeof(Compute<W>) == sizeof(C))
      if (parameter.stride == 1)
        return for_each_register<C>(
            n, [&](int64_t i, auto part) { part.store_to(scratch + i, part.load_from(from + i)); });
    for (int64_t i = 0; i < n; ++i) scratch[i] = C(to_compute(from[i * parameter.stride]));
  });
  return scratch;
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
