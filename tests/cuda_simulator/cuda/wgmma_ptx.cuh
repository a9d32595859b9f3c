// csrc/cuda/wgmma_ptx.cuh on the host.
#pragma once
#include "core/switch.h"
#include "cuda/hopper_ptx.cuh"

namespace genai_kernels {

inline void wgmma_fence() { simulator::wgmma_fence(); }
inline void wgmma_commit() { simulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  simulator::wgmma_wait(kPending);
}
template <class R, int kCount>
void register_fence(R (&)[kCount]) {}

template <class T, bool kTransposeB, int kRegisters>
void wgmma_shared(float (&d)[kRegisters], uint64_t a, uint64_t b, int accumulate) {
  simulator::wgmma({2 * kRegisters, is_same<T, fp16>, kTransposeB, d, nullptr, a, b, accumulate != 0});
}
template <class T, bool kTransposeB, int kRegisters>
void wgmma_registers(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  simulator::wgmma({2 * kRegisters, is_same<T, fp16>, kTransposeB, d, a, 0, b, accumulate != 0});
}

}  // namespace genai_kernels
