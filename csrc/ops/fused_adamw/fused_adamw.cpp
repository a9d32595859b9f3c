// Host of fused_adamw_ and global_norm: schemas, checks of all tensors before the first is written, and the parallel loop
// over pieces of all of them.
#include "ops/fused_adamw/fused_adamw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "fused_adamw_";
using Tensors = std::vector<Tensor>;

std::string at(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// A piece of one tensor, of at most kAdamwBlock elements.
struct Piece {
  size_t tensor;
  int64_t begin, end;
};

template <class Count>
std::vector<Piece> pieces_of(size_t tensors, const Count& count) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors; ++i)
    for (int64_t begin = 0, n = count(i); begin < n; begin += kAdamwBlock)
      pieces.push_back({i, begin, std::min(begin + kAdamwBlock, n)});
  return pieces;
}

// f(piece, its number) on all threads, as many small ones together as make up a large one.
template <class F>
void for_pieces(const std::vector<Piece>& pieces, const F& f) {
  const int64_t count = int64_t(pieces.size());
  int64_t elements = 0;
  for (const Piece& piece : pieces) elements += piece.end - piece.begin;
  parallel_for(count, 1 + count * kAdamwBlock / (elements + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(pieces[size_t(i)], i);
  });
}

Dtype stored_dtype(const char* op, const std::string& name, const TensorRef& t) {
  const Dtype dtype = float_dtype(op, name.c_str(), t);
  GK_CHECK_TYPE(dtype != Dtype::f64, op, name, ": expected float32, bfloat16 or float16, got float64");
  return dtype;
}

// Its elements fill its memory, in whatever order of the dimensions.
void check_dense(const char* op, const std::string& name, const TensorRef& t) {
  const int64_t size = element_size(t.scalar_type());
  const ByteRange range = byte_range(t);
  bool overlaps = false;
  for (int64_t d = 0; d < t.dim(); ++d) overlaps |= t.size(d) > 1 && t.stride(d) == 0;
  GK_CHECK_VALUE(range.end - range.begin == t.numel() * size && !overlaps, op, name,
                 ": expected a tensor whose elements fill its memory, got shape ", shape_of(t),
                 " with others between them; pass a copy (.clone())");
}

// As many tensors as parameters, each like its parameter.
void check_like(const char* name, const Tensors& list, const Tensors& params, bool optional) {
  if (optional && list.empty()) return;
  GK_CHECK_VALUE(list.size() == params.size(), kOp, name, ": expected ", params.size(),
                 " tensors, one for each of params, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const TensorRef t(list[i]), p(params[i]);
    const std::string own = at(name, i), other = at("params", i);
    GK_CHECK_VALUE(t.device().type() == p.device().type(), kOp, own, ": expected the device of ", other,
                   ", got another");
    check_same_shape(kOp, own.c_str(), t, other.c_str(), p);
    for (int64_t d = 0; d < t.dim(); ++d)
      GK_CHECK_VALUE(t.size(d) <= 1 || t.stride(d) == p.stride(d), kOp, own, ": expected the strides of ", other, ", ",
                     p.stride(d), " in dimension ", d, ", got ", t.stride(d));
  }
}

float* floats(const char* name, const Tensors& list, size_t i) {
  if (list.empty()) return nullptr;
  const Output t(list[i]);
  GK_CHECK_TYPE(t.scalar_type() == ScalarType::Float, kOp, at(name, i), ": expected float32, got ",
                dtype_name(t.scalar_type()));
  return static_cast<float*>(t.data());
}

// What is written overlaps nothing else of the call.
void check_apart(std::initializer_list<std::pair<const char*, const Tensors*>> lists) {
  struct Range {
    ByteRange bytes;
    const char* name;
    size_t i;
    bool written;
  };
  std::vector<Range> ranges;
  for (const auto& [name, list] : lists)
    for (size_t i = 0; i < list->size(); ++i) {
      const ByteRange bytes = byte_range(TensorRef((*list)[i]));
      if (bytes.begin != bytes.end) ranges.push_back({bytes, name, i, std::string(name) != "grads"});
    }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.bytes.begin < b.bytes.begin; });
  const Range* furthest = nullptr;  // of those before, the one that ends last
  for (const Range& r : ranges) {
    GK_CHECK_VALUE(!furthest || r.bytes.begin >= furthest->bytes.end || !(r.written || furthest->written), kOp,
                   at(r.name, r.i), ": expected memory that does not overlap ", at(furthest->name, furthest->i),
                   ", got an overlap");
    if (!furthest || r.bytes.end > furthest->bytes.end) furthest = &r;
  }
}

// Each sum of a piece is added to the next in order: no thread count changes a bit.
Tensor global_norm(const TensorRef& like, const Tensors& tensors) {
  std::vector<Dtype> dtypes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = at("tensors", i);
    dtypes.push_back(stored_dtype("global_norm", name, tensors[i]));
    check_dense("global_norm", name, tensors[i]);
  }
  const auto pieces = pieces_of(tensors.size(), [&](size_t i) { return tensors[i].numel(); });
  std::vector<double> sums(pieces.size());
  for_pieces(pieces, [&](const Piece& piece, int64_t i) {
    const void* x = tensors[piece.tensor].const_data_ptr();
    sums[size_t(i)] = sum_of_squares_kernel(dtypes[piece.tensor], x, piece.begin, piece.end);
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  Tensor norm = new_empty(like, {}, ScalarType::Float);
  *static_cast<float*>(norm.mutable_data_ptr()) = float(std::sqrt(sum));
  return norm;
}

void fused_adamw(const TensorRef& norm, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                 const Tensors& exp_avg_sqs, const Tensors& masters, const Tensors& emas, double max_norm,
                 bool maximize, double keep, double beta1, double beta2, double root_scale, double eps, double rate,
                 double ema_decay) {
  check_like("grads", grads, params, false);
  check_like("exp_avgs", exp_avgs, params, false);
  check_like("exp_avg_sqs", exp_avg_sqs, params, false);
  check_like("masters", masters, params, true);
  check_like("emas", emas, params, true);
  std::vector<AdamwTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    const Output p(params[i]);
    const TensorRef g(grads[i]);
    check_dense(kOp, at("params", i), p);
    AdamwTensor t{};
    t.dtype = stored_dtype(kOp, at("params", i), p);
    t.grad_dtype = stored_dtype(kOp, at("grads", i), g);
    GK_CHECK_TYPE(t.grad_dtype == t.dtype || t.grad_dtype == Dtype::f32, kOp, at("grads", i),
                  ": expected float32 or the dtype of ", at("params", i), ", ", dtype_name(p.scalar_type()), ", got ",
                  dtype_name(g.scalar_type()));
    t.param = p.data();
    t.grad = g.data();
    t.exp_avg = floats("exp_avgs", exp_avgs, i);
    t.exp_avg_sq = floats("exp_avg_sqs", exp_avg_sqs, i);
    t.master = floats("masters", masters, i);
    t.ema = floats("emas", emas, i);
    t.count = p.numel();
    tensors.push_back(t);
  }
  check_apart({{"params", &params},
               {"grads", &grads},
               {"exp_avgs", &exp_avgs},
               {"exp_avg_sqs", &exp_avg_sqs},
               {"masters", &masters},
               {"emas", &emas}});
  double clip = 1;
  if (max_norm >= 0) {
    GK_CHECK_VALUE(norm.scalar_type() == ScalarType::Float && norm.numel() == 1, kOp,
                   "grad_norm: expected one float32, got shape ", shape_of(norm));
    // min() would lose a NaN
    const double share = max_norm / (double(*norm.data_as<float>()) + 1e-6);
    clip = share > 1 ? 1 : share;
  }
  const AdamwStep step{float(maximize ? -clip : clip),
                       float(keep),
                       float(1 - beta1),
                       float(beta2),
                       float(1 - beta2),
                       float(root_scale),
                       float(eps),
                       float(rate),
                       float(1 - ema_decay)};
  for_pieces(pieces_of(tensors.size(), [&](size_t i) { return tensors[i].count; }), [&](const Piece& piece, int64_t) {
    fused_adamw_kernel(tensors[piece.tensor], step, piece.begin, piece.end);
  });
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(global_norm, genai_kernels::global_norm, "(Tensor like, Tensor[] tensors) -> Tensor")
GK_CPU_OP(fused_adamw_, genai_kernels::fused_adamw,
          "(Tensor norm, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
          "Tensor(d!)[] masters, Tensor(e!)[] emas, float max_norm, bool maximize, float keep, float beta1, float "
          "beta2, float root_scale, float eps, float rate, float ema_decay) -> ()")
