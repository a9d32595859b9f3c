// Runs the source of a CUDA kernel on the host: one fiber for each CUDA thread of a block, block after block.
//
// A thread runs until it waits for others (a barrier, a shuffle, data under way). What is not yet written is NaN, what is
// asynchronous arrives at a random later moment, and threads start in random order: a missing wait, a wrong phase or a
// buffer released too early becomes a wrong result, and a wait for nothing is reported as a deadlock. README.md says
// what cannot be seen here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simulator {

inline constexpr int kWarp = 32;
inline constexpr int kMostThreads = 1024;
inline constexpr int kMostSharedBytes = 227 * 1024;

// Reports a fault of the kernel and ends its launch: the launcher's caller gets a std::runtime_error.
[[noreturn]] void fail(const std::string& what);

// ---- waiting ----

// Suspends this thread until *counter is no longer `value`. `label` tells in a report of a deadlock what it waits for.
void wait_while(const int64_t* counter, int64_t value, const char* label);

// A point that threads must reach together.
struct Meeting {
  int arrived = 0;
  int64_t generation = 0;
  const char* label = nullptr;
};
// The last of `count` threads to arrive runs `action`, then all go on. Threads that meet here with different labels are
// at different instructions: a fault.
void meet(Meeting& meeting, int count, const char* label, const std::function<void()>& action = {});

// ---- the running block ----

// Something under way (a copy, a product of matrices): it happens when `delay` rounds of all threads are over, or when it
// is waited for.
struct InFlight {
  int delay;
  std::function<void()> happen;
};
// Returns a number to wait for with finish(), which makes it happen now if it has not yet.
int64_t start(std::function<void()> happen, int longest_delay);
void finish(int64_t number);

int thread();       // of the block
int lane();         // of the warp
int random(int n);  // in [0, n)
char* shared();     // dynamic shared memory of the block
size_t shared_bytes();
int64_t block_barriers();  // how often all threads have met at __syncthreads
int64_t& progress();       // counts events; whoever lets another thread go on adds one

// `bytes` at `p` must lie in shared memory at a multiple of `alignment`.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what);

// What each lane hands to its warp in a collective instruction. `action(lanes)` is run once, when all have arrived, with
// what the 32 lanes handed over; lanes that have left the kernel are null.
void with_warp(const char* label, void* mine, const std::function<void(void* const (&lanes)[kWarp])>& action);

// ---- launching ----

// Runs `kernel` in every thread of every block. Throws std::runtime_error at the first fault.
void launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);

// Shared by the models of named instructions: called when a block begins and ends, to reset and to check their state.
struct Hooks {
  std::function<void()> begin, end;
};
void add_hooks(Hooks hooks);

}  // namespace simulator
