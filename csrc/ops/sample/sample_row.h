// The choice of one request's token, from passes over its row of logits.
#pragma once
#include <vector>

#include "ops/sample/sample.h"

namespace genai_kernels {

// What a thread needs for it; kept from row to row.
class TokenChooser {
 public:
  SampleChoice choose(const SampleRequest& request, bool with_logprobs);

 private:
  // Contiguous logits in order of their tokens, and the largest of each block.
  struct Logits {
    Dtype dtype;
    const char* data;
    int64_t count;
    const float* maxima;
    float largest;

    const void* from(int64_t i) const { return data + i * (dtype == Dtype::f32 ? 4 : 2); }
    int64_t blocks() const { return (count + kSampleBlock - 1) / kSampleBlock; }
    int64_t size_of(int64_t block) const {
      const int64_t rest = count - block * kSampleBlock;
      return rest < kSampleBlock ? rest : kSampleBlock;
    }
  };
  // Logits that may be drawn: those above `low`, and those equal to it in front of `equals_end`.
  struct Kept {
    float low;
    int64_t equals_end;
    double least;  // weight, for min_p
  };
  // A logit and its place in one number that is larger the earlier it comes in the ranking.
  using Rank = uint64_t;

  bool measure(Logits& x, std::vector<float>& maxima);
  void penalise(const SampleRequest& r, Logits& x);
  float block_maximum(const Logits& x, int64_t rank);
  Logits narrow(const Logits& x, float low);
  Kept cut(const Logits& x, const SampleScale& scale, int64_t top_k, double top_p);
  void classify(const Logits& x, const SampleScale& scale, bool counts);
  void list(const Logits& x, const SampleScale& scale, int64_t wanted);
  int64_t weight_of_ranks(const SampleScale& scale, int64_t begin, int64_t end);
  int64_t rank_that_reaches(const SampleScale& scale, int64_t weight);
  int64_t weigh_block(const Logits& x, const SampleScale& scale, const Kept& kept, int64_t block, int64_t* weights);
  int64_t weigh(const Logits& x, const SampleScale& scale, const Kept& kept);
  const float* floats(const Logits& x, int64_t block, float* room);

  std::vector<float> own_, maxima_, narrow_, narrow_maxima_;
  std::vector<int64_t> tokens_;  // of narrow_
  std::vector<int32_t> block_class_;
  std::vector<int64_t> class_count_, class_weight_, block_weight_;
  std::vector<Rank> ranks_;
};

}  // namespace genai_kernels
