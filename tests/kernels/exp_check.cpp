// Errors of the elementary functions of csrc/cpu in units in the last place, over all bfloat16 numbers and over many or
// all non-positive floats, for every instruction set of this CPU. Torch-free; built and run by tests/ops/test_elementary.py.
//
// Usage: exp_check [stride]: every stride-th of the 2^31 non-positive floats (1: all). Prints one line per check and
// returns the number of failures.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/region_headers.h"

#ifndef GK_EXP_CHECK_FUNCTIONS  // this file includes itself, once per instruction set
#define GK_EXP_CHECK_FUNCTIONS
namespace genai_kernels {
enum class Function { exp, exp_nonpositive, sigmoid, tanh, silu, gelu, gelu_tanh, count };
}
#endif

#define GENAI_KERNELS_ISA_FILE "../tests/kernels/exp_check.cpp"  // from csrc, the include path
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tanh.h"
#include "cpu/activations.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

GK_INLINE VecF call(Function f, VecF x) {
  switch (f) {
    case Function::exp:
      return exp(x);
    case Function::exp_nonpositive:
      return exp_nonpositive(x);
    case Function::sigmoid:
      return sigmoid(x);
    case Function::tanh:
      return tanh(x);
    case Function::silu:
      return gate_value<Silu>(x);
    case Function::gelu:
      return gate_value<GeluErf>(x);
    default:
      return gate_value<GeluTanh>(x);
  }
}

}  // namespace

// y[i] = f(x[i]) for 16 floats, and y16 the same rounded to bfloat16.
void evaluate(Function f, const float* x, float* y, bf16* y16) {
  for (int i = 0; i < 16; i += kLanes) {
    const VecF v = call(f, load(x + i));
    store(y + i, v);
    store(y16 + i, v);
  }
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

namespace genai_kernels {

using Evaluate = void (*)(Function, const float*, float*, bf16*);
constexpr Evaluate kEvaluate[] = GENAI_KERNELS_ISA_TABLE(evaluate);

double exact(Function f, double x) {
  switch (f) {
    case Function::exp:
      return std::exp(x);
    case Function::exp_nonpositive:
      return std::exp(x);
    case Function::sigmoid:
      return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
    case Function::tanh:
      return std::tanh(x);
    case Function::silu:
      return x / (1 + std::exp(-x));
    case Function::gelu:
      return x * (0.5 * std::erfc(-x * 0.70710678118654752440));
    default: {
      const double u = 1.5957691216057308 * (x + 0.044715 * x * x * x);
      return x / (1 + std::exp(-u));
    }
  }
}

// |y - exact| in spacings of a format with `digits` significant bits (of the exact value; denormals below 2^-126). `flush`:
// results below it may be 0.
double ulps(double y, double e, int digits, double flush) {
  if (std::isnan(e)) return std::isnan(y) ? 0 : INFINITY;
  const double largest = std::ldexp(2 - std::ldexp(1, 1 - digits), 127);
  if (std::abs(e) > largest) return std::abs(y) >= largest ? 0 : INFINITY;
  if (std::isnan(y) || std::isinf(y)) return INFINITY;
  if (std::abs(e) < flush && y == 0) return 0;
  int exponent;
  std::frexp(e, &exponent);
  if (e == 0 || exponent < -125) exponent = -125;
  return std::abs(y - e) / std::ldexp(1, exponent - digits);
}

int failures = 0;

void report(const char* isa, const char* name, const char* over, double worst, float at, double limit) {
  std::printf("%-12s %-16s %-28s worst %.3f ULP at %g (limit %g)%s\n", isa, name, over, worst, at, limit,
              worst <= limit ? "" : "  FAILED");
  failures += !(worst <= limit);
}

constexpr const char* kFunctionNames[] = {"exp", "exp_nonpositive", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"};

void check_bf16(int isa, Function f) {
  double worst = 0;
  float at = 0;
  for (uint32_t base = 0; base < 65536; base += 16) {
    float x[16], y[16];
    bf16 y16[16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = (base + i) << 16;
      std::memcpy(&x[i], &bits, 4);
    }
    kEvaluate[isa](f, x, y, y16);
    for (int i = 0; i < 16; ++i) {
      if (f == Function::exp_nonpositive && x[i] > 0) continue;
      float rounded;
      const uint32_t bits = uint32_t(y16[i].bits) << 16;
      std::memcpy(&rounded, &bits, 4);
      const double error = ulps(rounded, exact(f, x[i]), 8, f == Function::exp_nonpositive ? 0x1p-125 : 0);
      if (error > worst) worst = error, at = x[i];
    }
  }
  report(kIsaNames[isa], kFunctionNames[int(f)], "all bfloat16", worst, at, 1);
}

// Asked once: cpuid takes long on a virtual machine.
bool supported(int isa) {
  static const std::vector<bool> answers = [] {
    std::vector<bool> found;
    for (int i = 0; i < kIsaCount; ++i) found.push_back(isa_supported(Isa(i)));
    return found;
  }();
  return answers[isa];
}

// The largest error of a function on an instruction set, and where.
struct Worst {
  double error = 0;
  float at = 0;
};
using AllWorst = Worst[2][kIsaCount];  // exp, exp_nonpositive

// The bits [begin, end) of floats, every stride-th. The exact value is computed once for all.
void worst_of_nonpositive(uint64_t begin, uint64_t end, uint64_t stride, AllWorst& worst) {
  constexpr Function kFunctions[2] = {Function::exp, Function::exp_nonpositive};
  for (uint64_t bits = begin; bits < end; bits += 16 * stride) {
    float x[16], y[16];
    bf16 y16[16];
    double e[16], per_ulp[16];
    for (int i = 0; i < 16; ++i) {
      const uint64_t own = bits + i * stride;
      const uint32_t b = own < end ? uint32_t(own) : uint32_t(end - 1);
      std::memcpy(&x[i], &b, 4);
      e[i] = std::exp(double(x[i]));
      int exponent;
      std::frexp(e[i], &exponent);
      per_ulp[i] = std::ldexp(1, 24 - (e[i] == 0 || std::isnan(e[i]) || exponent < -125 ? -125 : exponent));
    }
    for (int f = 0; f < 2; ++f)
      for (int isa = 0; isa < kIsaCount; ++isa) {
        if (!supported(isa)) continue;
        kEvaluate[isa](kFunctions[f], x, y, y16);
        for (int i = 0; i < 16; ++i) {
          if (f == 1 && y[i] == 0 && e[i] < 0x1p-125) continue;
          double error = std::abs(y[i] - e[i]) * per_ulp[i];
          if (std::isnan(error)) error = std::isnan(y[i]) && std::isnan(e[i]) ? 0 : INFINITY;
          if (error > worst[f][isa].error) worst[f][isa] = {error, x[i]};
        }
      }
  }
}

// From -0 (0x80000000) to the last NaN (0xffffffff), on all cores.
void check_nonpositive(uint64_t stride) {
  const uint64_t first = 0x80000000, past = 0x100000000, pieces = 256, size = (past - first) / pieces;
  AllWorst worst;
  std::mutex mutex;
  std::atomic<uint64_t> next{0};
  const auto work = [&] {
    for (uint64_t piece = next++; piece < pieces; piece = next++) {
      AllWorst found;
      worst_of_nonpositive(first + piece * size, first + (piece + 1) * size, stride, found);
      const std::lock_guard<std::mutex> lock(mutex);
      for (int f = 0; f < 2; ++f)
        for (int isa = 0; isa < kIsaCount; ++isa)
          if (found[f][isa].error > worst[f][isa].error) worst[f][isa] = found[f][isa];
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  for (int isa = 0; isa < kIsaCount; ++isa)
    for (int f = 0; supported(isa) && f < 2; ++f)
      report(kIsaNames[isa], kFunctionNames[f], "non-positive float32", worst[f][isa].error, worst[f][isa].at, 2);
}

void check_identities(int isa) {
  for (Function f : {Function::exp, Function::exp_nonpositive}) {
    const float x[16] = {0, -0.0f, -INFINITY};
    float y[16];
    bf16 y16[16];
    kEvaluate[isa](f, x, y, y16);
    const bool ok = y[0] == 1 && y[1] == 1 && y[2] == 0;
    std::printf("%-12s %-16s 1 at 0, 0 at -inf%s\n", kIsaNames[isa], kFunctionNames[int(f)], ok ? "" : "  FAILED");
    failures += !ok;
  }
}

}  // namespace genai_kernels

int main(int argc, char** argv) {
  using namespace genai_kernels;
  const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (!supported(isa)) continue;
    check_identities(isa);
    for (int f = 0; f < int(Function::count); ++f) check_bf16(isa, Function(f));
  }
  check_nonpositive(stride);
  return failures;
}

#endif
