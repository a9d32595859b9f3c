// A tensor as Rows for the kernels.
#pragma once
#include "core/rows.h"
#include "host/check.h"

namespace genai_kernels {

// The last `row_dims` dimensions (0 or 1, or 2 for rows of rows) are left to the kernel.
inline Rows rows_of(const char* op, const char* name, const TensorRef& t, void* data, int64_t row_dims = 1) {
  Rows rows;
  rows.data = data;
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dim = int64_t(sizes.size());
  if (row_dims > 0) {
    rows.length = sizes[dim - 1];
    rows.inner_stride = rows.length > 1 ? strides[dim - 1] : 1;
  }
  for (int64_t d = 0; d < dim - row_dims; ++d)
    GK_CHECK_IMPLEMENTED(rows.append(sizes[d], strides[d]), op, name, ": expected at most ", Rows::kMaxDims,
                         " dimensions that cannot be merged, got shape ", shape_of(t));
  return rows;
}
inline Rows read_rows(const char* op, const char* name, const TensorRef& t) { return rows_of(op, name, t, t.data()); }
inline Rows write_rows(const char* op, const char* name, const TensorRef& t) {
  check_writable(op, name, t);
  return rows_of(op, name, t, t.data());
}

// A weight or bias of `length` elements, of any floating dtype.
inline Parameter read_parameter(const char* op, const char* name, const OptionalTensor& t, int64_t length) {
  if (!t) return {};
  GK_CHECK_VALUE(t->dim() == 1 && t->size(0) == length, op, name, ": expected shape [", length,
                 "], the last dimension of x, got ", shape_of(*t));
  return {t->data(), t->stride(0), float_dtype(op, name, *t)};
}

}  // namespace genai_kernels
