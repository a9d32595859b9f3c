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

// The same over items of `elements` elements each, for work bound by memory: a thread gets at least 16384 elements, about
// 5 us of work, what it costs to wake it.
template <class F>
void parallel_for_elements(int64_t n, int64_t elements, const F& f) {
  parallel_for(n, 1 + 16384 / (elements + 1), f);
}

// f(item, state) for every item of [0, n), handed out in order to whichever thread is free; `make_state()` gives each
// thread its own state (scratch). For items of unequal cost: put the most expensive first. Which thread runs an item is
// left to chance, so items must not share anything they write.
template <class MakeState, class F>
void parallel_for_dynamic(int64_t n, const MakeState& make_state, const F& f) {
  if (n <= 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    auto state = make_state();
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) f(i, state);
  };
  if (n == 1 || threads == 1) return work(0, 1);
  torch::stable::parallel_for(0, threads < n ? threads : n, 1, work);
}

}  // namespace genai_kernels
