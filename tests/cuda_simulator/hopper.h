// Models of what sm_90a adds: mbarriers, TMA, named barriers, setmaxnreg (hopper.cpp) and wgmma (wgmma.cpp).
#pragma once
#include <cstdint>

#include "cuda.h"
#include "simulator.h"

namespace simulator {

// An address of shared memory as instructions see it: an offset from a multiple of 1024.
uint32_t shared_offset(const void* p);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);

void tma_load(char* to, const CUtensorMap* map, uint64_t* barrier, const int (&at)[CUtensorMap::kRank]);
// Where byte `address` lies, with lines of `line` bytes (64 or 128) swizzled.
inline uint32_t swizzled(uint32_t address, int line) {
  return address ^ (address >> 7 & (uint32_t(line) / 16 - 1)) << 4;
}

void named_barrier(int id, int threads, bool wait);
void change_registers(int to, bool more);

// Of the calling thread: its registers of the sums, those of a or null, and the operands' descriptors.
struct Product {
  int n;
  bool half;  // float16; else bfloat16
  bool transpose_b;
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate;
};
void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace simulator
