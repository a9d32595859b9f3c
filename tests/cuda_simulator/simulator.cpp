// Fibers, their scheduler, and what threads do together. See simulator.h.
#include "simulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // the registers of a thread and the frames of what it calls
constexpr size_t kGuardBytes = 4096;
constexpr int kStandingRounds = 200;                   // after which another warp stands still
constexpr int kSeldomAsleep = 32, kLongestSleep = 24;  // a sum over a block takes about 12 rounds

// ---- switching stacks: swapcontext costs a system call, so x86-64 has its own ----

#if defined(__x86_64__)
extern "C" void simulator_switch(void** from, void* to);
asm(R"(
.text
.globl simulator_switch
.type simulator_switch, @function
simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simulator_switch, .-simulator_switch
)");
struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15));
    *--top = nullptr;  // where entry would return to; it keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    stack_pointer = top;
  }
  void switch_to(Context& next) { simulator_switch(&stack_pointer, next.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& next) { swapcontext(&context, &next.context); }
};
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool done = false;
  const int64_t* waits_on = nullptr;
  int64_t waits_while = 0;
  const char* waits_for = nullptr;
};

struct Warp {
  Meeting meeting;
  void* handed[kWarp];
  int left = 0;  // threads that ended, or that the block has not
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int threads = 0, current = 0, left = 0;
  bool scheduling = true;  // no fiber runs
  Context scheduler;
  Meeting everyone;
  std::unique_ptr<char[]> arena;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  int64_t progress = 0, next_number = 0;
  std::map<int64_t, InFlight> in_flight;
  const std::function<void()>* kernel = nullptr;
  std::string fault;
} block;

uint64_t random_state = 0x9E3779B97F4A7C15;
std::mutex one_launch_at_a_time;

std::vector<Hooks>& hooks() {
  static std::vector<Hooks> all;
  return all;
}

void back_to_scheduler() { block.fibers[size_t(block.current)].context.switch_to(block.scheduler); }

void run_thread() {
  (*block.kernel)();
  Fiber& fiber = block.fibers[size_t(block.current)];
  fiber.done = true;
  ++block.left;
  ++block.warps[size_t(block.current / kWarp)].left;
  ++block.progress;
  back_to_scheduler();
}

void allocate_stacks(int threads) {
  while (int(block.fibers.size()) < threads) {
    Fiber fiber;
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simulator: no memory for the stacks of the threads");
    mprotect(memory, kGuardBytes, PROT_NONE);  // a kernel with too many registers ends here
    fiber.stack = static_cast<char*>(memory);
    block.fibers.push_back(fiber);
  }
}

void happen(std::map<int64_t, InFlight>::iterator at) {
  auto action = std::move(at->second.happen);
  block.in_flight.erase(at);
  ++block.progress;
  action();
}

void advance_what_is_in_flight(bool nobody_ran) {
  int rounds = 1;
  if (nobody_ran && !block.in_flight.empty()) {  // until the next event nothing else is going to change
    rounds = block.in_flight.begin()->second.delay;
    for (const auto& [_, what] : block.in_flight) rounds = std::min(rounds, what.delay);
  }
  for (auto at = block.in_flight.begin(); at != block.in_flight.end();) {
    const auto next = std::next(at);
    if ((at->second.delay -= rounds) <= 0) happen(at);
    at = next;
  }
}

std::string where() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (int i = 0; i < block.threads; ++i)
    if (!block.fibers[size_t(i)].done) ++waiting[block.fibers[size_t(i)].waits_for];
  std::string text = "deadlock:";
  for (const auto& [what, count] : waiting) text += " " + std::to_string(count) + " threads wait at " + what + ";";
  return text + " " + std::to_string(block.left) + " have left; " + where();
}

void run_block() {
  Block& b = block;
  b.left = 0;
  b.everyone = {};
  b.warps.assign(size_t((b.threads + kWarp - 1) / kWarp), Warp{});
  b.warps.back().left = int(b.warps.size()) * kWarp - b.threads;
  b.in_flight.clear();
  // The end of shared memory is the end of the arena, so that tools that watch the heap see an access beyond it.
  b.arena.reset(new char[b.shared_bytes + 1024]);
  b.shared = b.arena.get() + (1024 - reinterpret_cast<uintptr_t>(b.arena.get()) % 1024) % 1024;
  std::memset(b.arena.get(), 0xff, b.shared_bytes + 1024);  // NaN in every type
  for (int i = 0; i < b.threads; ++i) {
    Fiber& fiber = b.fibers[size_t(i)];
    fiber.done = false;
    fiber.waits_on = nullptr;
    fiber.context.prepare(fiber.stack + kGuardBytes, kStackBytes - kGuardBytes, run_thread);
  }
  for (const Hooks& h : hooks())
    if (h.begin) h.begin();
  const int warps = int(b.warps.size());
  // One warp (or none) stands still for as long as the others can go on: what lacks a barrier is then far apart.
  int standing = -1;
  bool stuck = false;
  std::vector<int> asleep(size_t(warps), 0);  // rounds: the others overtake it by as much as barriers let them
  for (int64_t round = 0; b.left < b.threads; ++round) {
    const int64_t before = b.progress;
    const int first = random(warps);
    bool nobody_ran = true, slept = false;
    if (round % kStandingRounds == 0) standing = random(2 * warps);
    const bool held = standing < warps && !stuck;
    for (int w = 0; w < warps; ++w) {
      const int warp = (first + w) % warps;
      if (held && warp == standing) continue;
      int& rounds = asleep[size_t(warp)];
      if (rounds == 0 && warps > 1 && random(kSeldomAsleep) == 0) rounds = 1 + random(kLongestSleep);
      if (rounds > 0) {
        --rounds;
        slept = true;
        continue;
      }
      for (int l = warp * kWarp; l < (warp + 1) * kWarp && l < b.threads; ++l) {
        Fiber& fiber = b.fibers[size_t(l)];
        if (fiber.done || (fiber.waits_on && *fiber.waits_on == fiber.waits_while)) continue;
        fiber.waits_on = nullptr;
        nobody_ran = false;
        b.current = l;
        threadIdx = dim3(unsigned(l));
        threadIdx.y = threadIdx.z = 0;
        b.scheduling = false;
        b.scheduler.switch_to(fiber.context);
        b.scheduling = true;
        if (!b.fault.empty()) return;
      }
    }
    const bool under_way = !b.in_flight.empty();
    advance_what_is_in_flight(nobody_ran && !slept);
    stuck = b.progress == before;
    if (stuck && !under_way && !held && !slept) {
      b.fault = deadlock();
      return;
    }
  }
  if (!b.in_flight.empty()) b.fault = "the block ended with copies or products under way; " + where();
  for (const Hooks& h : hooks())
    if (h.end && b.fault.empty()) h.end();
}

}  // namespace

void fail(const std::string& what) {
  block.fault = what + "; " + where() + " thread " + std::to_string(block.current);
  if (block.scheduling) throw std::runtime_error("simulator: " + block.fault);
  back_to_scheduler();
  std::abort();  // a thread with a fault is not resumed
}

void wait_while(const int64_t* counter, int64_t value, const char* label) {
  Fiber& fiber = block.fibers[size_t(block.current)];
  while (*counter == value) {
    fiber.waits_on = counter;
    fiber.waits_while = value;
    fiber.waits_for = label;
    back_to_scheduler();
  }
}

void meet(Meeting& meeting, int count, const char* label, const std::function<void()>& action) {
  if (meeting.arrived && meeting.label != label && std::strcmp(meeting.label, label) != 0)
    fail(std::string("threads meet at ") + meeting.label + " and at " + label);
  meeting.label = label;
  const int64_t generation = meeting.generation;
  if (++meeting.arrived < count) return wait_while(&meeting.generation, generation, label);
  meeting.arrived = 0;
  if (action) action();
  ++meeting.generation;
  ++block.progress;
}

int64_t start(std::function<void()> action, int longest_delay) {
  ++block.progress;
  block.in_flight[block.next_number] = {1 + random(longest_delay), std::move(action)};
  return block.next_number++;
}

void finish(int64_t number) {
  if (const auto at = block.in_flight.find(number); at != block.in_flight.end()) happen(at);
}

int thread() { return block.current; }
int lane() { return block.current % kWarp; }
int random(int n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return int((random_state >> 33) % uint64_t(n));
}
char* shared() { return block.shared; }
size_t shared_bytes() { return block.shared_bytes; }
int64_t& progress() { return block.progress; }
int64_t block_barriers() { return block.everyone.generation; }

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const char* at = static_cast<const char*>(p);
  if (at < block.shared || at + bytes > block.shared + block.shared_bytes)
    fail(std::string(what) + ": outside of shared memory, offset " + std::to_string(at - block.shared) + " of " +
         std::to_string(block.shared_bytes));
  if (size_t(at - block.shared) % alignment)
    fail(std::string(what) + ": offset " + std::to_string(at - block.shared) + " in shared memory, not a multiple of " +
         std::to_string(alignment));
}

void with_warp(const char* label, void* mine, const std::function<void(void* const (&lanes)[kWarp])>& action) {
  Warp& warp = block.warps[size_t(block.current / kWarp)];
  warp.handed[block.current % kWarp] = mine;
  if (warp.left) fail(std::string(label) + " in a warp that has lost some of its threads");
  if (warp.meeting.arrived + 1 < kWarp) return meet(warp.meeting, kWarp, label);
  meet(warp.meeting, kWarp, label, [&] { action(warp.handed); });
}

void synchronize_threads() { meet(block.everyone, block.threads, "__syncthreads"); }

void add_hooks(Hooks h) { hooks().push_back(std::move(h)); }

void launch(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (threads < 1 || threads > kMostThreads || shared_bytes > kMostSharedBytes || !grid.x || !grid.y || !grid.z ||
      grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("simulator: a launch that no GPU accepts: grid (" + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), " + std::to_string(threads) +
                             " threads, " + std::to_string(shared_bytes) + " bytes of shared memory");
  allocate_stacks(threads);
  block.kernel = &kernel;
  block.threads = threads;
  block.shared_bytes = size_t(shared_bytes);
  block.fault.clear();
  gridDim = grid;
  blockDim = dim3(unsigned(threads));
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z, first = random(int(blocks));
  for (int64_t i = 0; i < blocks && block.fault.empty(); ++i) {  // in an order that kernels cannot rely on
    const int64_t at = (first + i) % blocks;
    blockIdx.x = unsigned(at % grid.x);
    blockIdx.y = unsigned(at / grid.x % grid.y);
    blockIdx.z = unsigned(at / (int64_t(grid.x) * grid.y));
    run_block();
  }
  if (!block.fault.empty()) throw std::runtime_error("simulator: " + block.fault);
}

}  // namespace simulator
