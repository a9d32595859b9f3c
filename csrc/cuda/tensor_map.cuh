// Host: describes a [batch, tokens, heads, dim] tensor to TMA.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/tensor_box.h"

namespace genai_kernels {

// A tensor of 16-bit elements whose last dimension is contiguous; strides in elements.
struct BoxedTensor {
  const void* data;
  int64_t dim, tokens, heads, batch;
  int64_t token_stride, head_stride, batch_stride;

  // What the hardware asks for: addresses in multiples of 16 bytes, strides between 1 and 2^40 bytes, sizes that fit.
  bool fits() const {
    const auto stride_fits = [](int64_t size, int64_t stride) {
      return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t(1) << 39);
    };
    const auto size_fits = [](int64_t size) { return size >= 1 && size < int64_t(1) << 31; };
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && size_fits(dim) && size_fits(tokens) && size_fits(heads) &&
           size_fits(batch) && stride_fits(tokens, token_stride) && stride_fits(heads, head_stride) &&
           stride_fits(batch, batch_stride);
  }
};

// For boxes of `rows` tokens of one head, of tensor_box_columns(columns) elements each.
inline cudaError_t encode_tensor_map(CUtensorMap* map, const BoxedTensor& t, Dtype dtype, int rows, int columns) {
  // The driver's function is asked for by name: the library does not link against the driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<Encode>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  constexpr int64_t kAnyStride = 8;  // of a dimension of size 1, whose own stride may not fit
  const auto bytes = [&](int64_t size, int64_t stride) { return cuuint64_t(2 * (size == 1 ? kAnyStride : stride)); };
  const cuuint64_t sizes[4] = {cuuint64_t(t.dim), cuuint64_t(t.tokens), cuuint64_t(t.heads), cuuint64_t(t.batch)};
  const cuuint64_t strides[3] = {bytes(t.tokens, t.token_stride), bytes(t.heads, t.head_stride),
                                 bytes(t.batch, t.batch_stride)};
  const int box_columns = tensor_box_columns(columns);
  const cuuint32_t box[4] = {cuuint32_t(box_columns), cuuint32_t(rows), 1, 1}, every[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(t.data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace genai_kernels
