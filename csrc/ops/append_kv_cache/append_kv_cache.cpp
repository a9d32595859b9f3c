// Host of append_kv_cache: everything is checked before anything is written.
#include "ops/append_kv_cache/append_kv_cache.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/pages.h"
#include "host/parallel.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "append_kv_cache";

bool is_long(const char* name, const TensorRef& t) {
  const ScalarType type = t.scalar_type();
  GK_CHECK_TYPE(type == ScalarType::Int || type == ScalarType::Long, kOp, name, ": expected int32 or int64, got ",
                dtype_name(type));
  return type == ScalarType::Long;
}

// No slot outside of the cache, none twice.
void check_slots(const AppendParams& p, int64_t tokens, int64_t slots) {
  int64_t before = -1;
  bool rising = true;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = p.slot(t);
    GK_CHECK_INDEX(slot >= -1 && slot < slots, kOp, "slot_mapping[", t, "]: expected -1 (skip) or 0 <= slot < ", slots,
                   ", got ", slot);
    if (slot < 0) continue;
    rising = rising && slot > before;
    before = slot;
  }
  if (rising) return;
  std::vector<std::pair<int64_t, int64_t>> seen;
  seen.reserve(size_t(tokens));
  for (int64_t t = 0; t < tokens; ++t)
    if (p.slot(t) >= 0) seen.emplace_back(p.slot(t), t);
  std::sort(seen.begin(), seen.end());
  for (size_t i = 1; i < seen.size(); ++i)
    GK_CHECK_VALUE(seen[i].first != seen[i - 1].first, kOp, "slot_mapping[", seen[i].second,
                   "]: expected a slot of its own, got ", seen[i].first, ", which slot_mapping[", seen[i - 1].second,
                   "] has");
}

struct Rotation {
  const OptionalTensor &cos, &sin, &positions;
  bool interleaved;
};

void set_rotation(AppendParams& p, const Rotation& r, int64_t tokens, int64_t head_dim) {
  GK_CHECK_VALUE(r.cos.has_value() == r.sin.has_value(), kOp, "sin: expected it together with cos");
  if (!r.cos) {
    GK_CHECK_VALUE(!r.positions, kOp, "positions: expected it together with cos and sin");
    return;
  }
  const TensorRef &cos = *r.cos, &sin = *r.sin;
  p.table_dtype = float_dtype(kOp, "cos", cos);
  check_same_dtype(kOp, "sin", sin, "cos", cos);
  check_same_shape(kOp, "sin", sin, "cos", cos);
  GK_CHECK_VALUE(cos.dim() == 2 && cos.size(1) >= 1 && 2 * cos.size(1) <= head_dim, kOp,
                 "cos: expected [positions, rotary_dim / 2] with a rotary_dim of at most ", head_dim, ", got shape ",
                 shape_of(cos));
  p.rotary_dim = 2 * cos.size(1);
  p.interleaved = r.interleaved;
  p.cos = cos.data();
  p.sin = sin.data();
  p.cos_row = cos.stride(0), p.cos_dim = cos.stride(1);
  p.sin_row = sin.stride(0), p.sin_dim = sin.stride(1);
  if (!r.positions) {
    GK_CHECK_VALUE(cos.size(0) == tokens, kOp, "cos: expected a row for each of the ", tokens,
                   " tokens, as there are no positions, got shape ", shape_of(cos));
    return;
  }
  const TensorRef& positions = *r.positions;
  p.long_positions = is_long("positions", positions);
  GK_CHECK_VALUE(positions.dim() == 1 && positions.size(0) == tokens, kOp, "positions: expected [", tokens,
                 "], got shape ", shape_of(positions));
  p.positions = positions.data();
  p.position_stride = positions.stride(0);
  for (int64_t t = 0; t < tokens; ++t)
    GK_CHECK_INDEX(p.position(t) >= 0 && p.position(t) < cos.size(0), kOp, "positions[", t,
                   "]: expected 0 <= position < ", cos.size(0), ", got ", p.position(t));
}

AppendedPart part_of(const char* name, const TensorRef& t, const CacheView& cache, const char* cache_name,
                     const TensorRef& cache_tensor, int64_t tokens) {
  GK_CHECK_VALUE(t.dim() == 3 && t.size(0) == tokens && t.size(1) == cache.heads && t.size(2) == cache.dim, kOp, name,
                 ": expected [", tokens, ", ", cache.heads, ", ", cache.dim, "], tokens and the heads of ", cache_name,
                 ", got shape ", shape_of(t));
  check_writable(kOp, cache_name, cache_tensor);
  AppendedPart part;
  part.from = static_cast<const char*>(t.data());
  part.from_token = t.stride(0), part.from_head = t.stride(1), part.from_dim = t.size(2) > 1 ? t.stride(2) : 1;
  part.dim = cache.dim;
  part.cache = cache.data;
  part.page = cache.page, part.token = cache.token, part.head = cache.head;
  return part;
}

void append(const TensorRef& k, const TensorRef& v, const TensorRef& k_cache, const TensorRef& v_cache,
            const TensorRef& slots, const Rotation& rotation, const OptionalTensor& k_scale,
            const OptionalTensor& v_scale, bool heads_first) {
  AppendParams p{};
  p.dtype = float_dtype(kOp, "k", k);
  GK_CHECK_TYPE(p.dtype != Dtype::f64, kOp, "k: expected float32, bfloat16 or float16, got float64");
  check_same_dtype(kOp, "v", v, "k", k);
  const CacheView k_view = cache_view(kOp, "k_cache", k_cache, heads_first);
  const CacheView v_view = cache_view(kOp, "v_cache", v_cache, heads_first);
  check_cache_pair(kOp, k_view, v_view, k_cache, v_cache);
  p.int8_cache = k_view.type == ScalarType::Char;
  GK_CHECK_TYPE(p.int8_cache || k_view.type == k.scalar_type(), kOp, "k_cache: expected the dtype of k, ",
                dtype_name(k.scalar_type()), ", or int8, got ", dtype_name(k_view.type));
  const int64_t tokens = k.dim() == 3 ? k.size(0) : 0;
  p.heads = k_view.heads;
  p.page_size = k_view.page_size;
  p.k = part_of("k", k, k_view, "k_cache", k_cache, tokens);
  p.v = part_of("v", v, v_view, "v_cache", v_cache, tokens);
  set_scales(kOp, p.k, "k_scale", k_scale, k_view, heads_first);
  set_scales(kOp, p.v, "v_scale", v_scale, v_view, heads_first);
  p.long_slots = is_long("slot_mapping", slots);
  GK_CHECK_VALUE(slots.dim() == 1 && slots.size(0) == tokens, kOp, "slot_mapping: expected [", tokens,
                 "], a slot for each token of k, got shape ", shape_of(slots));
  p.slots = slots.data();
  p.slot_stride = slots.stride(0);
  set_rotation(p, rotation, tokens, k_view.dim);
  // what is written must not be what is read, nor what the other part is written to
  const std::pair<const char*, const OptionalTensor> written[] = {
      {"k_cache", k_cache}, {"v_cache", v_cache}, {"k_scale", k_scale}, {"v_scale", v_scale}};
  const std::pair<const char*, const OptionalTensor> read[] = {{"k", k},
                                                               {"v", v},
                                                               {"slot_mapping", slots},
                                                               {"cos", rotation.cos},
                                                               {"sin", rotation.sin},
                                                               {"positions", rotation.positions}};
  const auto interleaved_pair = [](const TensorRef& a, const TensorRef& b) {
    // k and v as the two halves of one tensor [blocks, 2, ...]: the same strides, a page apart by less than a page
    const int64_t apart = (b.data_as<char>() - a.data_as<char>()) / element_size(a.scalar_type());
    const auto span = [](const TensorRef& t) {
      int64_t last = 0;
      for (int64_t d = 1; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
      return last + 1;
    };
    const int64_t stride = a.stride(0), offset = apart < 0 ? -apart : apart;
    return a.stride(0) == b.stride(0) && offset >= span(apart < 0 ? b : a) &&
           offset + span(apart < 0 ? a : b) <= stride;
  };
  for (const auto& [name, output] : written) {
    if (!output) continue;
    for (const auto& [input_name, input] : read)
      if (input) check_no_overlap(kOp, name, *output, input_name, *input);
    for (const auto& [other_name, other] : written)
      if (other && std::string_view(other_name) < std::string_view(name) && !interleaved_pair(*other, *output))
        check_no_overlap(kOp, name, *output, other_name, *other);
  }
  check_slots(p, tokens, k_view.pages * p.page_size);

  parallel_for_elements(tokens, p.heads * (p.k.dim + p.v.dim), [&](int64_t begin, int64_t end) {
    const Scratch scratch(append_kv_cache_scratch(p) * int64_t(sizeof(float)));
    append_kv_cache_kernel(p, begin, end, static_cast<float*>(scratch.get()));
  });
}

void append_kv_cache(const TensorRef& k, const TensorRef& v, const Output& k_cache, const Output& v_cache,
                     const TensorRef& slots, const OptionalTensor& cos, const OptionalTensor& sin,
                     const OptionalTensor& positions, bool interleaved, bool heads_first) {
  append(k, v, k_cache, v_cache, slots, {cos, sin, positions, interleaved}, {}, {}, heads_first);
}
void append_kv_cache_int8(const TensorRef& k, const TensorRef& v, const Output& k_cache, const Output& v_cache,
                          const Output& k_scale, const Output& v_scale, const TensorRef& slots,
                          const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& positions,
                          bool interleaved, bool heads_first) {
  append(k, v, k_cache, v_cache, slots, {cos, sin, positions, interleaved}, TensorRef(k_scale), TensorRef(v_scale),
         heads_first);
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(append_kv_cache, genai_kernels::append_kv_cache,
          "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? cos, Tensor? sin, "
          "Tensor? positions, bool interleaved, bool heads_first) -> ()")
GK_CPU_OP(append_kv_cache_int8, genai_kernels::append_kv_cache_int8,
          "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, Tensor(d!) v_scale, "
          "Tensor slot_mapping, Tensor? cos, Tensor? sin, Tensor? positions, bool interleaved, bool heads_first) -> ()")
