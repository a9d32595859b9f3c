// Parallel loops on torch's own threads, through the stable ABI. Nothing here is compiled with OpenMP.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace genai_kernels {

// f(begin, end) over [0, n) in contiguous pieces of at least `grain` items. For items of equal cost.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) return f(int64_t(0), n);
  torch::stable::parallel_for(0, n, grain, f);
}

// f(item) for every item of [0, n), handed out in order to whichever thread is free. For items of unequal cost: put the
// most expensive first. Which thread runs an item is left to chance, so items must not share anything they write.
template <class F>
void parallel_for_dynamic(int64_t n, const F& f) {
  if (n <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  if (n == 1 || threads == 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) f(i);
  });
}

}  // namespace genai_kernels
