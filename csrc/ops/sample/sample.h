// What the host of sample hands to the choice of a token, and that to the kernels. README.md beside the Python side says
// why the result is exact.
#pragma once
#include "core/dtype.h"

namespace genai_kernels {

// Elements that are weighed at a time: their weights stay in the first-level cache, and 1024 sums of blocks, for a large
// vocabulary, are few enough to be searched one by one.
constexpr int64_t kSampleBlock = 256;
// A weight is 2^40 for the largest logit, so that the sum over kSampleMost of them stays below 2^63.
constexpr int kSampleBits = 40;
constexpr int64_t kSampleMost = int64_t(1) << 22;
// Classes of nearly equal logits: 32 for each halving of the weight, the last for all whose weight is 0.
constexpr int kSampleClasses = 42 * 32 + 1;

// The weight of a logit y is 2^((y - largest) rate), in units of 2^-40.
struct SampleScale {
  double largest, rate;
};

// ---- kernels, over contiguous elements ----

// The largest of each block. False if an element is NaN or +infinity.
bool sample_maxima_kernel(Dtype dtype, const void* x, int64_t count, float* maxima);
// The weights of at most a block, 0 where x < low or the weight < least; `weights` has room for a whole block. Returns
// their sum.
int64_t sample_weights_kernel(Dtype dtype, const void* x, int64_t count, const SampleScale& scale, double low,
                              double least, int64_t* weights);
// The classes of at most a block, 0 for the largest logit; a smaller logit never has a smaller class. `classes` has room
// for a whole block.
void sample_classes_kernel(Dtype dtype, const void* x, int64_t count, const SampleScale& scale, int32_t* classes);
void sample_widen_kernel(Dtype dtype, const void* x, int64_t stride, int64_t count, float* out);

// ---- one request ----

struct SampleRequest {
  Dtype dtype;
  const void* logits;
  int64_t stride, vocab;  // stride in elements
  double temperature, top_p, min_p, repetition_penalty;
  int64_t top_k;  // 1 to vocab
  uint64_t seed, offset;
  const void* previous;  // int32 or int64
  bool long_previous;
  int64_t previous_stride, previous_count;

  int64_t previous_at(int64_t i) const {
    const int64_t at = i * previous_stride;
    return long_previous ? static_cast<const int64_t*>(previous)[at] : static_cast<const int32_t*>(previous)[at];
  }
};

struct SampleChoice {
  int64_t token;
  float logprob, final_logprob;  // of the logits as given; of the distribution that was drawn from
};

// Tokens that say why there is none: kNoLogit for a row of -infinity, -1 - i for element i that is NaN or +infinity.
constexpr int64_t kNoLogit = -(int64_t(1) << 62);

}  // namespace genai_kernels
