// A tensor as Rows for the kernels.
#pragma once
#include "core/rows.h"
#include "host/check.h"

namespace genai_kernels {

inline Rows rows_of(const char* op, const char* name, const Tensor& t, void* data) {
  Rows rows;
  rows.data = data;
  const int64_t dim = t.dim();
  rows.length = t.size(dim - 1);
  rows.inner_stride = rows.length > 1 ? t.stride(dim - 1) : 1;
  for (int64_t d = 0; d + 1 < dim; ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    rows.count *= size;
    if (size == 1) continue;
    if (rows.dims && rows.stride[rows.dims - 1] == stride * size) {
      rows.size[rows.dims - 1] *= size;
      rows.stride[rows.dims - 1] = stride;
      continue;
    }
    GK_CHECK_IMPLEMENTED(rows.dims < Rows::kMaxDims, op, name, ": expected at most ", Rows::kMaxDims,
                         " dimensions that cannot be merged, got shape ", shape_of(t));
    rows.size[rows.dims] = size;
    rows.stride[rows.dims++] = stride;
  }
  return rows;
}
inline Rows read_rows(const char* op, const char* name, const Tensor& t) {
  return rows_of(op, name, t, const_cast<void*>(t.const_data_ptr()));
}
inline Rows write_rows(const char* op, const char* name, const Tensor& t) {
  check_writable(op, name, t);
  return rows_of(op, name, t, t.mutable_data_ptr());
}

}  // namespace genai_kernels
