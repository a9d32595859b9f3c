// Host of sample: schema, checks, and the parallel loop over requests.
#include "ops/sample/sample.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "ops/sample/sample_row.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "sample";

// A parameter that is one number for all requests, or a tensor with one for each.
template <class Number>
class PerRequest {
 public:
  PerRequest(const char* name, const OptionalTensor& t, Number number, int64_t batch)
      : name_(name), number_(number), tensor_(t) {
    if (!t) return;
    constexpr bool whole = std::is_same_v<Number, int64_t>;
    const ScalarType type = t->scalar_type();
    wide_ = type == (whole ? ScalarType::Long : ScalarType::Double);
    GK_CHECK_TYPE(wide_ || type == (whole ? ScalarType::Int : ScalarType::Float), kOp, name,
                  whole ? ": expected a number, int32 or int64, got " : ": expected a number, float32 or float64, got ",
                  dtype_name(type));
    GK_CHECK_VALUE(t->dim() == 1 && t->size(0) == batch, kOp, name, ": expected a number or a tensor [", batch,
                   "], one for each row of logits, got shape ", shape_of(*t));
  }
  Number operator[](int64_t i) const {
    if (!tensor_) return number_;
    const int64_t at = i * tensor_->stride(0);
    if constexpr (std::is_same_v<Number, int64_t>)
      return wide_ ? tensor_->data_as<int64_t>()[at] : tensor_->data_as<int32_t>()[at];
    else
      return wide_ ? tensor_->data_as<double>()[at] : tensor_->data_as<float>()[at];
  }
  bool is_tensor() const { return tensor_.has_value(); }
  // For messages: its name, with the request's number where there is one.
  std::string name(int64_t i) const { return is_tensor() ? name_ + ("[" + std::to_string(i) + "]") : name_; }

 private:
  std::string name_;
  Number number_;
  const OptionalTensor& tensor_;
  bool wide_ = false;
};

struct Arguments {
  const TensorRef& logits;
  const OptionalTensor &previous_tokens, &previous_lens, &temperatures;
  double temperature;
  const OptionalTensor& top_ks;
  int64_t top_k;
  const OptionalTensor& top_ps;
  double top_p;
  const OptionalTensor& min_ps;
  double min_p;
  const OptionalTensor& penalties;
  double penalty;
  const OptionalTensor& seeds;
  int64_t seed;
  const OptionalTensor& offsets;
  int64_t offset;
};

bool is_integer(const char* name, const TensorRef& t) {
  const ScalarType type = t.scalar_type();
  GK_CHECK_TYPE(type == ScalarType::Int || type == ScalarType::Long, kOp, name, ": expected int32 or int64, got ",
                dtype_name(type));
  return true;
}

// The tokens that each request has seen.
void set_previous(const Arguments& a, std::vector<SampleRequest>& requests) {
  GK_CHECK_VALUE(a.previous_tokens || !a.previous_lens, kOp,
                 "previous_lens: expected previous_tokens beside it, got None");
  if (!a.previous_tokens) return;
  const TensorRef& t = *a.previous_tokens;
  const int64_t batch = int64_t(requests.size());
  is_integer("previous_tokens", t);
  GK_CHECK_VALUE(t.dim() == 2 && t.size(0) == batch, kOp, "previous_tokens: expected [", batch,
                 ", tokens], a row for each of logits, got shape ", shape_of(t));
  const PerRequest<int64_t> lens("previous_lens", a.previous_lens, t.size(1), batch);
  const bool wide = t.scalar_type() == ScalarType::Long;
  for (int64_t b = 0; b < batch; ++b) {
    SampleRequest& r = requests[size_t(b)];
    r.previous = t.data_as<char>() + b * t.stride(0) * (wide ? 8 : 4);
    r.long_previous = wide;
    r.previous_stride = t.stride(1);
    r.previous_count = lens[b];
    GK_CHECK_VALUE(lens[b] >= 0 && lens[b] <= t.size(1), kOp, lens.name(b), ": expected 0 to ", t.size(1),
                   ", the columns of previous_tokens, got ", lens[b]);
    for (int64_t i = 0; i < lens[b]; ++i)
      GK_CHECK_INDEX(r.previous_at(i) >= 0 && r.previous_at(i) < r.vocab, kOp, "previous_tokens[", b, ", ", i,
                     "]: expected 0 <= token < ", r.vocab, ", got ", r.previous_at(i));
  }
}

std::vector<SampleRequest> checked(const Arguments& a) {
  const TensorRef& x = a.logits;
  const Dtype dtype = float_dtype(kOp, "logits", x);
  GK_CHECK_TYPE(dtype != Dtype::f64, kOp, "logits: expected float32, bfloat16 or float16, got float64");
  GK_CHECK_VALUE(x.dim() == 2 && x.size(1) >= 1 && x.size(1) <= kSampleMost, kOp,
                 "logits: expected [batch, vocabulary] with 1 to ", kSampleMost, " tokens, got shape ", shape_of(x));
  const int64_t batch = x.size(0), vocab = x.size(1);
  const PerRequest<double> temperature("temperature", a.temperatures, a.temperature, batch),
      top_p("top_p", a.top_ps, a.top_p, batch), min_p("min_p", a.min_ps, a.min_p, batch),
      penalty("repetition_penalty", a.penalties, a.penalty, batch);
  const PerRequest<int64_t> top_k("top_k", a.top_ks, a.top_k, batch), seed("seed", a.seeds, a.seed, batch),
      offset("offset", a.offsets, a.offset, batch);
  const bool greedy = !temperature.is_tensor() && a.temperature == 0;
  GK_CHECK_VALUE(
      batch <= 1 || greedy || seed.is_tensor() || offset.is_tensor(), kOp, "seed: expected a tensor [", batch,
      "], or offset to be one: with one of each for all, every request would draw the same number, got ", a.seed);
  std::vector<SampleRequest> requests(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    GK_CHECK_VALUE(std::isfinite(temperature[b]) && temperature[b] >= 0, kOp, temperature.name(b),
                   ": expected a finite number >= 0 (0: the largest logit), got ", temperature[b]);
    GK_CHECK_VALUE(top_k[b] >= -1, kOp, top_k.name(b), ": expected at least 1, or 0 or -1 for no limit, got ",
                   top_k[b]);
    GK_CHECK_VALUE(top_p[b] >= 0 && top_p[b] <= 1, kOp, top_p.name(b), ": expected 0 <= p <= 1, got ", top_p[b]);
    GK_CHECK_VALUE(min_p[b] >= 0 && min_p[b] <= 1, kOp, min_p.name(b), ": expected 0 <= p <= 1, got ", min_p[b]);
    GK_CHECK_VALUE(std::isfinite(penalty[b]) && penalty[b] > 0, kOp, penalty.name(b),
                   ": expected a finite number > 0 (1: none), got ", penalty[b]);
    GK_CHECK_VALUE(penalty[b] == 1 || a.previous_tokens, kOp, penalty.name(b),
                   ": expected 1 without previous_tokens, got ", penalty[b]);
    SampleRequest& r = requests[size_t(b)];
    r = {};
    r.dtype = dtype;
    r.logits = x.data_as<char>() + b * x.stride(0) * element_size(x.scalar_type());
    r.stride = vocab == 1 ? 1 : x.stride(1);
    r.vocab = vocab;
    r.temperature = temperature[b];
    r.top_k = top_k[b] <= 0 || top_k[b] > vocab ? vocab : top_k[b];
    r.top_p = top_p[b];
    r.min_p = min_p[b];
    r.repetition_penalty = penalty[b];
    r.seed = uint64_t(seed[b]);
    r.offset = uint64_t(offset[b]);
  }
  set_previous(a, requests);
  return requests;
}

// The first row that no token can be drawn from is an error.
void check_tokens(const std::vector<SampleRequest>& requests, const int64_t* tokens) {
  for (size_t b = 0; b < requests.size(); ++b) {
    GK_CHECK_VALUE(tokens[b] != kNoLogit, kOp, "logits[", b, "]: expected a finite logit, got none but -inf");
    if (tokens[b] >= 0) continue;
    const SampleRequest& r = requests[b];
    const int64_t token = -1 - tokens[b];
    float y;
    sample_widen_kernel(
        r.dtype, static_cast<const char*>(r.logits) + token * r.stride * (r.dtype == Dtype::f32 ? 4 : 2), 1, 1, &y);
    GK_CHECK_VALUE(false, kOp, "logits[", b, ", ", token, "]: expected a finite number or -inf, got ", y,
                   std::isfinite(y) ? ", which is inf after the repetition penalty" : "");
  }
}

struct Result {
  Tensor tokens;
  std::optional<Tensor> logprobs, final_logprobs;
};

Result forward(const Arguments& a, bool with_logprobs) {
  const std::vector<SampleRequest> requests = checked(a);
  const int64_t batch = int64_t(requests.size());
  Result result{new_empty(a.logits, {batch}, ScalarType::Long), {}, {}};
  int64_t* tokens = static_cast<int64_t*>(result.tokens.mutable_data_ptr());
  float *logprobs = nullptr, *final_logprobs = nullptr;
  if (with_logprobs) {
    result.logprobs = new_empty(a.logits, {batch}, ScalarType::Float);
    result.final_logprobs = new_empty(a.logits, {batch}, ScalarType::Float);
    logprobs = static_cast<float*>(result.logprobs->mutable_data_ptr());
    final_logprobs = static_cast<float*>(result.final_logprobs->mutable_data_ptr());
  }
  parallel_for_dynamic(
      batch, [] { return TokenChooser(); },
      [&](int64_t b, TokenChooser& chooser) {
        const SampleChoice choice = chooser.choose(requests[size_t(b)], with_logprobs);
        tokens[b] = choice.token;
        if (!with_logprobs) return;
        logprobs[b] = choice.logprob;
        final_logprobs[b] = choice.final_logprob;
      });
  check_tokens(requests, tokens);
  return result;
}

#define GK_PARAMETERS                                                                                      \
  const TensorRef &logits, const OptionalTensor &previous_tokens, const OptionalTensor &previous_lens,     \
      const OptionalTensor &temperatures, double temperature, const OptionalTensor &top_ks, int64_t top_k, \
      const OptionalTensor &top_ps, double top_p, const OptionalTensor &min_ps, double min_p,              \
      const OptionalTensor &penalties, double penalty, const OptionalTensor &seeds, int64_t seed,          \
      const OptionalTensor &offsets, int64_t offset
#define GK_ARGUMENTS                                                                                                \
  Arguments {                                                                                                       \
    logits, previous_tokens, previous_lens, temperatures, temperature, top_ks, top_k, top_ps, top_p, min_ps, min_p, \
        penalties, penalty, seeds, seed, offsets, offset                                                            \
  }

Tensor sample(GK_PARAMETERS) { return forward(GK_ARGUMENTS, false).tokens; }
std::tuple<Tensor, Tensor, Tensor> sample_logprobs(GK_PARAMETERS) {
  Result result = forward(GK_ARGUMENTS, true);
  return {result.tokens, *result.logprobs, *result.final_logprobs};
}

}  // namespace
}  // namespace genai_kernels

#define GK_SCHEMA                                                                                                \
  "(Tensor logits, Tensor? previous_tokens, Tensor? previous_lens, Tensor? temperature, float one_temperature, " \
  "Tensor? top_k, int one_top_k, Tensor? top_p, float one_top_p, Tensor? min_p, float one_min_p, "               \
  "Tensor? repetition_penalty, float one_repetition_penalty, Tensor? seed, int one_seed, Tensor? offset, "       \
  "int one_offset) -> "

GK_CPU_OP(sample, genai_kernels::sample, GK_SCHEMA "Tensor")
GK_CPU_OP(sample_logprobs, genai_kernels::sample_logprobs,
          GK_SCHEMA "(Tensor tokens, Tensor logprobs, Tensor final_logprobs)")
