#include "ops/sample/sample_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "core/philox.h"

namespace genai_kernels {
namespace {

constexpr double kLog2E = 0x1.71547652b82fep0;
constexpr double kUnit = double(int64_t(1) << kSampleBits);
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Fewer logits than this are ranked directly: the classes of all would take longer.
constexpr int64_t kFew = 4 * kSampleBlock;
constexpr int64_t kEveryClass = -1;

// The third counter: other uses of Philox with the same seed, as in dropout, see other numbers.
constexpr uint32_t kPurpose = 0x73616d70;  // "samp"

uint64_t random_bits(uint64_t seed, uint64_t offset) {
  uint32_t words[4][1];
  philox<1>(uint32_t(offset), {uint32_t(offset >> 32)}, {0}, kPurpose, seed, words);
  return uint64_t(words[1][0]) << 32 | words[0][0];
}

uint64_t rank_of(float y, int64_t place) {
  y += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return uint64_t(bits) << 32 | uint32_t(~uint32_t(place));
}
float logit_of(uint64_t rank) {
  uint32_t bits = uint32_t(rank >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
int64_t place_of(uint64_t rank) { return uint32_t(~uint32_t(rank)); }

// The least integer that is at least p * total, at least 1; exact: a double is an integer of 53 bits times a power of 2.
int64_t share_of(double p, int64_t total) {
  int exponent;
  const uint64_t mantissa = uint64_t(std::ldexp(std::frexp(p, &exponent), 53));
  const int shift = 53 - exponent;
  const unsigned __int128 product = (unsigned __int128)mantissa * uint64_t(total);
  if (shift > 126) return 1;
  const unsigned __int128 whole = product >> shift;
  return std::max<int64_t>(1, int64_t(whole) + ((whole << shift) != product));
}

// Logits below have a weight less than `least`, and need not be weighed.
double negligible_below(const SampleScale& scale, double least) {
  // 1 because a weight is rounded to the next integer, which is at most half as large again; 0.01 for this line's rounding
  return scale.largest + (std::log2(std::max(least, 1.0)) - kSampleBits - 1.01) / scale.rate;
}

}  // namespace

const float* TokenChooser::floats(const Logits& x, int64_t block, float* room) {
  const void* from = x.from(block * kSampleBlock);
  if (x.dtype == Dtype::f32) return static_cast<const float*>(from);
  sample_widen_kernel(x.dtype, from, 1, x.size_of(block), room);
  return room;
}

// False if a logit is NaN or +infinity.
bool TokenChooser::measure(Logits& x, std::vector<float>& maxima) {
  maxima.resize(size_t(x.blocks()));
  if (!sample_maxima_kernel(x.dtype, x.data, x.count, maxima.data())) return false;
  x.maxima = maxima.data();
  x.largest = *std::max_element(maxima.begin(), maxima.end());
  return true;
}

void TokenChooser::penalise(const SampleRequest& r, Logits& x) {
  if (reinterpret_cast<const char*>(own_.data()) != x.data) {
    own_.resize(size_t(x.count));
    sample_widen_kernel(x.dtype, x.data, 1, x.count, own_.data());
  }
  for (int64_t i = 0; i < r.previous_count; ++i) {
    const int64_t token = r.previous_at(i);
    // from the row as given, so that a token that occurs twice is penalised once
    float y;
    sample_widen_kernel(
        r.dtype, static_cast<const char*>(r.logits) + token * r.stride * (r.dtype == Dtype::f32 ? 4 : 2), 1, 1, &y);
    own_[size_t(token)] = float(y > 0 ? double(y) / r.repetition_penalty : double(y) * r.repetition_penalty);
  }
  x.dtype = Dtype::f32;
  x.data = reinterpret_cast<const char*>(own_.data());
}

// The rank-th largest of the blocks' maxima, counted from 1: as many logits at least reach it, and seldom many more.
float TokenChooser::block_maximum(const Logits& x, int64_t rank) {
  narrow_maxima_.assign(x.maxima, x.maxima + x.blocks());
  const auto at = narrow_maxima_.begin() + (rank - 1);
  std::nth_element(narrow_maxima_.begin(), at, narrow_maxima_.end(), std::greater<float>());
  return *at;
}

// The logits that are not below `low`.
TokenChooser::Logits TokenChooser::narrow(const Logits& x, float low) {
  int64_t found = 0;
  float room[kSampleBlock];
  for (int64_t b = 0; b < x.blocks(); ++b) {
    if (x.maxima[b] < low) continue;
    narrow_.resize(size_t(found + kSampleBlock));
    tokens_.resize(size_t(found + kSampleBlock));
    const float* y = floats(x, b, room);
    for (int64_t i = 0, n = x.size_of(b); i < n; ++i) {
      narrow_[size_t(found)] = y[i];
      tokens_[size_t(found)] = b * kSampleBlock + i;
      found += y[i] >= low;
    }
  }
  Logits found_logits{Dtype::f32, reinterpret_cast<const char*>(narrow_.data()), found, nullptr, x.largest};
  measure(found_logits, narrow_maxima_);
  return found_logits;
}

// What the logits of each class weigh together, and how many there are. Blocks without weight are left out.
void TokenChooser::classify(const Logits& x, const SampleScale& scale, bool counts) {
  const int64_t blocks = x.blocks();
  block_class_.resize(size_t(blocks + kSampleBlock));
  for (int64_t b = 0; b < blocks; b += kSampleBlock)
    sample_classes_kernel(Dtype::f32, x.maxima + b, std::min(kSampleBlock, blocks - b), scale,
                          &block_class_[size_t(b)]);
  class_count_.assign(kSampleClasses, 0);
  class_weight_.assign(kSampleClasses, 0);
  int64_t weights[kSampleBlock];
  int32_t classes[kSampleBlock];
  for (int64_t b = 0; b < blocks; ++b) {
    if (block_class_[size_t(b)] == kSampleClasses - 1) continue;
    const int64_t n = x.size_of(b);
    sample_weights_kernel(x.dtype, x.from(b * kSampleBlock), n, scale, -double(kInfinity), 0, weights);
    sample_classes_kernel(x.dtype, x.from(b * kSampleBlock), n, scale, classes);
    for (int64_t i = 0; i < n; ++i) class_weight_[size_t(classes[i])] += weights[i];
    if (counts)
      for (int64_t i = 0; i < n; ++i) ++class_count_[size_t(classes[i])];
  }
}

// The ranks of a class, in no order.
void TokenChooser::list(const Logits& x, const SampleScale& scale, int64_t wanted) {
  ranks_.clear();
  float room[kSampleBlock];
  int32_t classes[kSampleBlock];
  for (int64_t b = 0; b < x.blocks(); ++b) {
    if (wanted != kEveryClass) {
      if (block_class_[size_t(b)] > wanted) continue;
      sample_classes_kernel(x.dtype, x.from(b * kSampleBlock), x.size_of(b), scale, classes);
    }
    const float* y = floats(x, b, room);
    for (int64_t i = 0, n = x.size_of(b); i < n; ++i)
      if (wanted == kEveryClass || classes[i] == wanted) ranks_.push_back(rank_of(y[i], b * kSampleBlock + i));
  }
}

int64_t TokenChooser::weight_of_ranks(const SampleScale& scale, int64_t begin, int64_t end) {
  int64_t total = 0;
  float y[kSampleBlock];
  int64_t weights[kSampleBlock];
  for (; begin < end; begin += kSampleBlock) {
    const int64_t n = std::min(kSampleBlock, end - begin);
    for (int64_t i = 0; i < n; ++i) y[i] = logit_of(ranks_[size_t(begin + i)]);
    total += sample_weights_kernel(Dtype::f32, y, n, scale, -double(kInfinity), 0, weights);
  }
  return total;
}

// How many of the listed logits, from the largest on, weigh at least `weight` together. Halves the list instead of
// sorting it. Afterwards that many are in front, the last of them at its place.
int64_t TokenChooser::rank_that_reaches(const SampleScale& scale, int64_t weight) {
  int64_t begin = 0, end = int64_t(ranks_.size());
  while (end - begin > 1) {
    const int64_t middle = begin + (end - begin) / 2;
    std::nth_element(ranks_.begin() + begin, ranks_.begin() + middle, ranks_.begin() + end, std::greater<Rank>());
    const int64_t first = weight_of_ranks(scale, begin, middle);
    if (first >= weight) {
      end = middle;
    } else {
      weight -= first;
      begin = middle;
    }
  }
  return end;
}

// Top-k, then top-p of what it left.
TokenChooser::Kept TokenChooser::cut(const Logits& x, const SampleScale& scale, int64_t top_k, double top_p) {
  const bool few = x.count <= kFew;
  if (few)
    list(x, scale, kEveryClass);
  else
    classify(x, scale, top_k < x.count);
  Rank last = 0;  // that is kept
  int64_t total = 0, listed = few ? kEveryClass : kSampleClasses;
  if (top_k < x.count) {
    int64_t above = 0, c = 0;
    if (!few)
      for (; c < kSampleClasses && above + class_count_[size_t(c)] < top_k; ++c) {
        above += class_count_[size_t(c)];
        total += class_weight_[size_t(c)];
      }
    // otherwise those without weight make up the number, and it does not matter which of them are kept
    if (c < kSampleClasses) {
      if (!few) list(x, scale, listed = c);
      const int64_t n = top_k - above;
      std::nth_element(ranks_.begin(), ranks_.begin() + (n - 1), ranks_.end(), std::greater<Rank>());
      last = ranks_[size_t(n - 1)];
      total += weight_of_ranks(scale, 0, n);
    }
  } else if (few) {
    total = weight_of_ranks(scale, 0, x.count);
  } else {
    for (const int64_t weight : class_weight_) total += weight;
  }
  if (top_p < 1) {
    int64_t wanted = share_of(top_p, total), c = 0;
    if (!few) {
      for (; wanted > class_weight_[size_t(c)]; ++c) wanted -= class_weight_[size_t(c)];
      if (listed != c) list(x, scale, c);
    }
    // never beyond top_k's: what that kept reaches any share of itself
    last = ranks_[size_t(rank_that_reaches(scale, wanted) - 1)];
  }
  if (!last) return {-kInfinity, x.count, 0};
  return {logit_of(last), place_of(last) + 1, 0};
}

int64_t TokenChooser::weigh_block(const Logits& x, const SampleScale& scale, const Kept& kept, int64_t block,
                                  int64_t* weights) {
  const int64_t n = x.size_of(block), begin = block * kSampleBlock;
  const int64_t with_equals = std::clamp<int64_t>(kept.equals_end - begin, 0, n);
  int64_t total = 0;
  if (with_equals)
    total += sample_weights_kernel(x.dtype, x.from(begin), with_equals, scale, kept.low, kept.least, weights);
  if (with_equals == n) return total;
  const double above = std::nextafter(kept.low, kInfinity);
  int64_t rest[kSampleBlock];
  total += sample_weights_kernel(x.dtype, x.from(begin + with_equals), n - with_equals, scale, above, kept.least, rest);
  std::memcpy(weights + with_equals, rest, size_t(n - with_equals) * sizeof *rest);
  return total;
}

// Each block's weight, into block_weight_.
int64_t TokenChooser::weigh(const Logits& x, const SampleScale& scale, const Kept& kept) {
  const double low = std::max(double(kept.low), negligible_below(scale, kept.least));
  int64_t total = 0, weights[kSampleBlock];
  block_weight_.resize(size_t(x.blocks()));
  for (int64_t b = 0; b < x.blocks(); ++b)
    total += block_weight_[size_t(b)] = x.maxima[b] < low ? 0 : weigh_block(x, scale, kept, b, weights);
  return total;
}

SampleChoice TokenChooser::choose(const SampleRequest& r, bool with_logprobs) {
  Logits x{r.dtype, static_cast<const char*>(r.logits), r.vocab, nullptr, 0};
  if (r.stride != 1) {
    own_.resize(size_t(r.vocab));
    sample_widen_kernel(r.dtype, r.logits, r.stride, r.vocab, own_.data());
    x.dtype = Dtype::f32;
    x.data = reinterpret_cast<const char*>(own_.data());
  }
  bool ordinary = measure(x, maxima_);
  const SampleScale given{x.largest, kLog2E};
  const int64_t given_total =
      ordinary && with_logprobs && x.largest > -kInfinity ? weigh(x, given, {-kInfinity, x.count, 0}) : 0;
  if (ordinary && r.repetition_penalty != 1 && r.previous_count) {
    penalise(r, x);
    ordinary = measure(x, maxima_);
  }
  float room[kSampleBlock];
  if (!ordinary) {
    for (int64_t b = 0;; ++b) {
      const float* y = floats(x, b, room);
      for (int64_t i = 0, n = x.size_of(b); i < n; ++i)
        if (!(y[i] < kInfinity)) return {-1 - (b * kSampleBlock + i), 0, 0};
    }
  }
  if (x.largest == -kInfinity) return {kNoLogit, 0, 0};

  SampleChoice choice{0, 0, 0};
  if (r.temperature == 0) {
    const int64_t b = std::find(x.maxima, x.maxima + x.blocks(), x.largest) - x.maxima;
    const float* y = floats(x, b, room);
    choice.token = b * kSampleBlock + (std::find(y, y + x.size_of(b), x.largest) - y);
  } else {
    // the rate of a temperature close to 0 must not be infinite: 0 times it would be NaN
    const SampleScale scale{x.largest, std::min(kLog2E / r.temperature, 0x1p1000)};
    bool narrowed = false;
    if (x.count > kFew && r.top_k <= x.blocks()) {
      x = narrow(x, block_maximum(x, r.top_k));
      narrowed = true;
    }
    Kept kept{-kInfinity, x.count, 0};
    if (r.top_k < x.count || r.top_p < 1) kept = cut(x, scale, r.top_k, r.top_p);
    if (!narrowed && x.count > kFew && kept.low > -kInfinity) {  // one more pass of comparisons saves exponentials
      x = narrow(x, kept.low);
      narrowed = true;
      kept.equals_end = std::lower_bound(tokens_.begin(), tokens_.begin() + x.count, kept.equals_end) - tokens_.begin();
    }
    kept.least = std::ceil(r.min_p * kUnit);
    const int64_t total = weigh(x, scale, kept);
    int64_t left = int64_t((unsigned __int128)random_bits(r.seed, r.offset) * uint64_t(total) >> 64);
    int64_t b = 0, i = 0, weights[kSampleBlock];
    while (left >= block_weight_[size_t(b)]) left -= block_weight_[size_t(b++)];
    weigh_block(x, scale, kept, b, weights);
    while (left >= weights[i]) left -= weights[i++];
    choice.token = b * kSampleBlock + i;
    if (narrowed) choice.token = tokens_[size_t(choice.token)];
    choice.final_logprob = float(std::log(double(weights[i]) / double(total)));
  }
  if (with_logprobs) {
    float y;
    const int64_t at = choice.token * r.stride * (r.dtype == Dtype::f32 ? 4 : 2);
    sample_widen_kernel(r.dtype, static_cast<const char*>(r.logits) + at, 1, 1, &y);
    choice.logprob = float((double(y) - given.largest) - std::log(double(given_total) / kUnit));
  }
  return choice;
}

}  // namespace genai_kernels
