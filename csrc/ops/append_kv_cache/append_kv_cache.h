// What the host of append_kv_cache hands to its kernel.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace genai_kernels {

// A tensor [tokens][heads][dim] and the cache that it goes to, strides in elements.
struct AppendedPart {
  const char* from = nullptr;
  int64_t from_token = 0, from_head = 0, from_dim = 0, dim = 0;
  char* cache = nullptr;
  int64_t page = 0, token = 0, head = 0;
  float* scale = nullptr;  // of an int8 cache
  int64_t scale_page = 0, scale_token = 0, scale_head = 0;
};

struct AppendParams {
  Dtype dtype;  // of k and v, and of the cache unless it is int8
  bool int8_cache, interleaved, long_slots, long_positions;
  int64_t heads, page_size, rotary_dim;  // rotary_dim 0: k is not rotated
  const void *slots, *positions;         // positions: null, row t of the tables is token t's
  int64_t slot_stride, position_stride;
  Dtype table_dtype;
  const void *cos, *sin;
  int64_t cos_row, cos_dim, sin_row, sin_dim;
  AppendedPart k, v;

  static int64_t integer(const void* data, bool is_long, int64_t i) {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  int64_t slot(int64_t t) const { return integer(slots, long_slots, t * slot_stride); }
  int64_t position(int64_t t) const { return positions ? integer(positions, long_positions, t * position_stride) : t; }
};

// Tokens [begin, end). Scratch: append_kv_cache_scratch floats.
inline int64_t append_kv_cache_scratch(const AppendParams& p) {
  return (p.k.dim > p.v.dim ? p.k.dim : p.v.dim) + 2 * p.rotary_dim + 64;
}
void append_kv_cache_kernel(const AppendParams& p, int64_t begin, int64_t end, float* scratch);

}  // namespace genai_kernels
