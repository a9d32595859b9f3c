// The instructions of sm_90a that move data and order threads, one function each; the products are in wgmma_ptx.cuh.
// tests/cuda_simulator/cuda/hopper_ptx.cuh offers the same functions on the host.
#pragma once
#include <cuda.h>

#include "cuda/ptx.cuh"

namespace genai_kernels {

// ---- mbarrier: a phase is complete when all its arrivals and all its expected bytes are in ----
GK_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the last init, before the __syncthreads that lets others use the barriers: TMA must see them too.
GK_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
GK_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, and `bytes` that TMA is going to deliver in this phase.
GK_DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until a phase of this parity is complete: 0 for the first, third, ... The phase before the first counts as complete.
GK_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  const uint32_t at = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
  } while (!done);
}

// What this thread wrote to shared memory is seen by wgmma and TMA, once others have met it at a barrier.
GK_DEVICE void shared_fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA ----
// One box of a 4-D tensor at coordinates (x, y, z, w), zeros where it lies outside of the tensor. `barrier` gets the
// bytes of the whole box.
GK_DEVICE void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
GK_DEVICE void tma_prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- named barriers, 1 to 15: full when `kThreads` threads have synchronised or arrived; whole warps only ----
template <int kThreads>
GK_DEVICE void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <int kThreads>
GK_DEVICE void named_barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// x, of which the compiler no longer knows where it comes from: what follows from it is computed where it is used, and not
// ahead of a loop for every element of an unrolled tile, which no registers are left for.
GK_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- registers that a warpgroup hands back to the block, or takes from it (it waits until they are there) ----
template <int kRegisters>
GK_DEVICE void decrease_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
GK_DEVICE void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace genai_kernels
