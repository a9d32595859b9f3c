// The machine's limits as torch ops, on torch's own threads, for `bench`.
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <string>
#include <vector>

#include "cpu/machine_limits.h"
#include "host/check.h"
#include "host/parallel.h"

namespace genai_kernels {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// FLOP/s of all threads together; 0 where the selected instruction set has no such operation.
double measure_peak(std::string what, int64_t iterations) {
  constexpr const char* kOp = "measure_peak";
  constexpr const char* kNames[] = {"fma_f32", "fma_f64", "dot_bf16"};
  int kind = -1;
  for (int i = 0; i < 3; ++i)
    if (what == kNames[i]) kind = i;
  GK_CHECK_VALUE(kind >= 0, kOp, "what: expected fma_f32, fma_f64 or dot_bf16, got '", what, "'");
  GK_CHECK_VALUE(iterations >= 1, kOp, "iterations: expected >= 1, got ", iterations);
  struct alignas(128) Slot {  // a cache line pair of its own: threads must not share one
    float values[2] = {0.999999f, 1e-6f};
    double operations = 0;
  };
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<Slot> slots(threads);
  const auto start = Clock::now();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) slots[i].operations = peak_kernel(Peak(kind), iterations, slots[i].values);
  });
  const double seconds = seconds_since(start);
  double operations = 0;
  for (const Slot& slot : slots) operations += slot.operations;
  return operations / seconds;
}

// Bytes/s over a contiguous buffer: "read" reads it once; "copy" copies its first half to its second half and counts
// both (not what the caches fetch to write).
double measure_stream(std::string what, Tensor buffer) {
  constexpr const char* kOp = "measure_stream";
  GK_CHECK_VALUE(what == "read" || what == "copy", kOp, "what: expected read or copy, got '", what, "'");
  GK_CHECK_VALUE(buffer.is_contiguous(), kOp, "buffer: expected a contiguous tensor, got another one");
  char* data = static_cast<char*>(buffer.mutable_data_ptr());
  const int64_t bytes = buffer.numel() * int64_t(buffer.element_size());
  const int64_t half = bytes / 2, length = what == "read" ? bytes : half;
  volatile float sink = 0;
  const auto start = Clock::now();
  parallel_for(length, 4096, [&](int64_t begin, int64_t end) {
    if (what == "read")
      sink = stream_read_kernel(data, begin, end);
    else
      stream_copy_kernel(data, data + half, begin, end);
  });
  return double(what == "read" ? bytes : 2 * half) / seconds_since(start);
}

}  // namespace
}  // namespace genai_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels, m) {
  m.def("measure_peak(str what, int iterations) -> float");
  m.def("measure_stream(str what, Tensor(a!) buffer) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CompositeExplicitAutograd, m) {
  m.impl("measure_peak", TORCH_BOX(&genai_kernels::measure_peak));
}
STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CPU, m) {
  m.impl("measure_stream", TORCH_BOX(&genai_kernels::measure_stream));
}
