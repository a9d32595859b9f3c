// csrc/cuda/hopper_ptx.cuh on the host.
#pragma once
#include "cuda/ptx.cuh"
#include "hopper.h"

namespace genai_kernels {

inline uint32_t shared_address(const void* p) { return simulator::shared_offset(p); }

inline void barrier_init(uint64_t* barrier, int arrivals) { simulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() { simulator::barrier_init_fence(); }
inline void barrier_arrive(uint64_t* barrier) { simulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) { simulator::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, int parity) { simulator::barrier_wait(barrier, parity); }

inline void shared_fence_async() {}
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  simulator::tma_load(static_cast<char*>(to), map, barrier, {x, y, z, w});
}
inline void tma_prefetch(const CUtensorMap*) {}

template <int kThreads>
void named_barrier_sync(int id) {
  simulator::named_barrier(id, kThreads, true);
}
template <int kThreads>
void named_barrier_arrive(int id) {
  simulator::named_barrier(id, kThreads, false);
}

inline int opaque(int x) { return x; }

template <int kRegisters>
void decrease_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simulator::change_registers(kRegisters, false);
}
template <int kRegisters>
void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simulator::change_registers(kRegisters, true);
}

}  // namespace genai_kernels
