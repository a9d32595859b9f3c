// csrc/cuda/ptx.cuh on the host: each function does what the instruction does, and checks what it asks for.
#pragma once
#include <cstring>
#include <deque>
#include <vector>

#include "core/dtype.h"
#include "cuda_words.h"

#define GK_DEVICE inline
#define GK_DEVICE_COLD [[gnu::noinline]] inline
#define GK_SHARED(name) char* name = simulator::shared()

namespace genai_kernels {

// ---- elements ----
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) { return float(std::bit_cast<_Float16>(x.bits)); }
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {std::bit_cast<uint16_t>(_Float16(x))};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
inline void check_aligned_16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) simulator::fail("an access to 16 bytes that are not aligned to 16");
}
inline uint4 load_16(const void* from) {
  check_aligned_16(from);
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}
inline uint4 load_constant_16(const void* from) { return load_16(from); }
inline void store_16(void* to, uint4 value) {
  check_aligned_16(to);
  std::memcpy(to, &value, 16);
}
inline void forget(uint32_t&) {}
inline float reciprocal_approx(float x) { return 1 / x; }
inline float exp2_approx(float x) { return std::exp2(x); }

// ---- asynchronous copies (sm_80) ----
namespace copies {
// Per thread: the copies of the open group, and of those committed, oldest first.
struct OfThread {
  std::vector<int64_t> open;
  std::deque<std::vector<int64_t>> groups;
};
inline OfThread of_threads[simulator::kMostThreads];
inline const bool hooked = [] {
  simulator::add_hooks({[] {
                          for (OfThread& t : of_threads) t = {};
                        },
                        {}});
  return true;
}();
}  // namespace copies

inline void copy_async_16(void* to, const void* from, bool valid) {
  simulator::check_shared(to, 16, 16, "cp.async");
  if (valid && reinterpret_cast<uintptr_t>(from) % 16) simulator::fail("cp.async: source not aligned to 16 bytes");
  std::memset(to, 0xff, 16);
  copies::of_threads[simulator::thread()].open.push_back(simulator::start(
      [=] {
        if (valid)
          std::memcpy(to, from, 16);
        else
          std::memset(to, 0, 16);
      },
      60));
}
inline void copy_async_commit() {
  copies::OfThread& t = copies::of_threads[simulator::thread()];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
template <int kPending>
void copy_async_wait() {
  copies::OfThread& t = copies::of_threads[simulator::thread()];
  for (; int(t.groups.size()) > kPending; t.groups.pop_front())
    for (const int64_t number : t.groups.front()) simulator::finish(number);
}

// ---- matrices of 16-bit elements in a warp's registers (sm_80) ----
inline void load_matrices_as(bool transposed, uint32_t (&r)[4], const void* row) {
  struct Mine {
    uint32_t* r;
    const char* row;
    bool transposed;
  } mine{r, static_cast<const char*>(row), transposed};
  simulator::check_shared(row, 16, 16, "ldmatrix");
  simulator::with_warp(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](void* const(&lanes)[32]) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          int at_row = l / 4, column = 2 * (l % 4) + i;
          if (static_cast<Mine*>(lanes[l])->transposed) std::swap(at_row, column);
          std::memcpy(&pair[i], static_cast<Mine*>(lanes[8 * m + at_row])->row + 2 * column, 2);
        }
        static_cast<Mine*>(lanes[l])->r[m] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_as(false, r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices_as(true, r, row); }

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Mine {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  simulator::with_warp("mma.sync", &mine, [](void* const(&lanes)[32]) {
    typedef double Row __attribute__((vector_size(64)));
    double a[16][16];
    Row b[16];
    const auto element = [](uint32_t pair, int i) { return double(to_float(T{uint16_t(pair >> 16 * i)})); };
    for (int l = 0; l < 32; ++l) {
      const Mine& from = *static_cast<Mine*>(lanes[l]);
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < 4; ++part)
          a[g + 8 * (part & 1)][2 * t + i + 8 * (part >> 1)] = element(from.a[part], i);
        for (int part = 0; part < 2; ++part) b[2 * t + i + 8 * part][g] = element(from.b[part], i);
      }
    }
    Row sums[16];  // the products are exact; the hardware's order of the sum is its own
    for (int row = 0; row < 16; ++row) {
      sums[row] = Row{};
      for (int k = 0; k < 16; ++k) sums[row] += a[row][k] * b[k];
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        float& to = static_cast<Mine*>(lanes[l])->d[i];
        to = float(to + sums[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)]);
      }
  });
}

}  // namespace genai_kernels
