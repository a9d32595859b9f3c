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

// Loads and stores of element i.. of a row of n: whole registers, and the last one only as far as it goes.
template <class T>
GK_INLINE Vec<Compute<T>> load_at(const T* row, int64_t i, int64_t n) {
  return i + kLanesOf<Compute<T>> <= n ? load(row + i) : load_first(row + i, n - i);
}
template <class T>
GK_INLINE void store_at(T* row, int64_t i, int64_t n, Vec<Compute<T>> v) {
  if (i + kLanesOf<Compute<T>> <= n)
    store(row + i, v);
  else
    store_first(row + i, v, n - i);
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
