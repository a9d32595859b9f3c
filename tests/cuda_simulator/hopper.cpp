// mbarriers, TMA, named barriers and setmaxnreg. See hopper.h and csrc/cuda/hopper_ptx.cuh.
#include "hopper.h"

#include <algorithm>
#include <bitset>
#include <cstring>
#include <map>

namespace simulator {
namespace {

constexpr int kLongestCopy = 300;  // rounds: long beside everything else, so that a missing wait finds NaN
constexpr uint32_t kMagic = 0x7e4503a9;

struct Mbarrier {
  int arrivals, pending;
  int64_t bytes = 0;      // expected and not yet delivered
  int64_t completed = 0;  // phases
  bool fenced = false;
  int made_by;
  int64_t made_at;  // block_barriers() then
};
std::map<uint64_t*, Mbarrier> mbarriers;
int64_t loads = 0;  // since the start of the process

struct NamedBarrier {
  int threads = 0, arrived = 0;
  int64_t generation = 0;
  std::bitset<kMostThreads> who;
};
NamedBarrier named[16];

constexpr int kRegisterFile = 65536;
struct Registers {
  int free;  // of the block's share, in registers of the threads of one warp
  int64_t changes;
  int of_warp[kMostThreads / kWarp];
  int changed[kMostThreads / kWarp];  // how often
} registers;

void begin() {
  mbarriers.clear();
  for (NamedBarrier& b : named) b = {};
  const int threads = int(blockDim.x);
  const int each = std::min(255, kRegisterFile / threads / 8 * 8);  // what __launch_bounds__(threads, 1) leaves
  registers = {};
  for (int& r : registers.of_warp) r = each;
}
void end() {
  for (int id = 0; id < 16; ++id)
    if (named[id].arrived)
      fail("the block ended with " + std::to_string(named[id].arrived) + " threads arrived at named barrier " +
           std::to_string(id));
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
    if (registers.changed[w] != registers.changed[w / 4 * 4])
      fail("setmaxnreg was not executed by all warps of a warpgroup");
}
const bool hooked = (add_hooks({begin, end}), true);

Mbarrier& usable(uint64_t* barrier) {
  const auto at = mbarriers.find(barrier);
  if (at == mbarriers.end()) fail("mbarrier used before it was initialised");
  Mbarrier& b = at->second;
  if (!b.fenced) fail("mbarrier used before the fence that publishes its initialisation");
  if (b.made_by != thread() && b.made_at == block_barriers())
    fail("mbarrier used without a __syncthreads since another thread initialised it");
  return b;
}
void complete_if_done(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.completed;
  b.pending = b.arrivals;
  ++progress();
}

}  // namespace

uint32_t shared_offset(const void* p) { return uint32_t(static_cast<const char*>(p) - shared()); }

// ---- mbarrier ----
void barrier_init(uint64_t* barrier, int arrivals) {
  check_shared(barrier, 8, 8, "mbarrier.init");
  if (arrivals < 1) fail("mbarrier.init: no arrivals");
  mbarriers[barrier] = {arrivals, arrivals, 0, 0, false, thread(), block_barriers()};
}
void barrier_init_fence() {
  for (auto& [_, b] : mbarriers) b.fenced = b.fenced || b.made_by == thread();
}
void barrier_arrive(uint64_t* barrier, int expected_bytes) {
  Mbarrier& b = usable(barrier);
  if (b.pending == 0) fail("mbarrier: more arrivals than this phase has");
  --b.pending;
  b.bytes += expected_bytes;
  complete_if_done(b);
}
void barrier_wait(uint64_t* barrier, int parity) {
  if (parity != 0 && parity != 1) fail("mbarrier wait: a parity that is neither 0 nor 1");
  const Mbarrier& b = usable(barrier);
  while ((b.completed & 1) == parity) wait_while(&b.completed, b.completed, "an mbarrier");
}

// ---- TMA ----
void tma_load(char* to, const CUtensorMap* map, uint64_t* barrier, const int (&at)[CUtensorMap::kRank]) {
  if (map->magic != kMagic || reinterpret_cast<uintptr_t>(map) % 64)
    fail("TMA: not a tensor map, or not aligned to 64");
  const int line = map->box[0] * 2, lines = map->box[1] * map->box[2] * map->box[3], bytes = line * lines;
  check_shared(to, size_t(bytes), size_t(map->swizzle) * 8, "TMA: the box");
  usable(barrier);
  ++loads;
  std::memset(to, 0xff, size_t(bytes));  // NaN until it is there
  start(
      [=, map = *map, x = at[0], y = at[1], z = at[2], w = at[3]] {
        const uint32_t base = shared_offset(to);
        for (int i = 0; i < lines; ++i) {
          const int64_t row[3] = {y + i % map.box[1], z + i / map.box[1] % map.box[2],
                                  w + i / (map.box[1] * map.box[2])};
          const char* from = map.data;
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            inside = inside && row[d] >= 0 && row[d] < map.size[d + 1];
            from += row[d] * map.stride[d + 1];
          }
          for (int piece = 0; piece < line / 16; ++piece) {  // what lies outside of the tensor is not read
            char* target = shared() + swizzled(base + uint32_t(i * line + piece * 16), map.swizzle);
            std::memset(target, 0, 16);
            for (int64_t e = 0; inside && e < 8; ++e) {
              const int64_t column = x + piece * 8 + e;
              if (column >= 0 && column < map.size[0]) std::memcpy(target + 2 * e, from + 2 * column, 2);
            }
          }
        }
        Mbarrier& b = mbarriers.at(barrier);
        if ((b.bytes -= bytes) < 0) fail("TMA delivered more bytes than its mbarrier expects");
        complete_if_done(b);
      },
      kLongestCopy);
}

// ---- named barriers ----
void named_barrier(int id, int threads, bool wait) {
  if (id < 1 || id > 15) fail("named barrier " + std::to_string(id) + ": expected 1 to 15, 0 is __syncthreads");
  if (threads % kWarp || threads > int(blockDim.x)) fail("named barrier: not a number of whole warps of the block");
  NamedBarrier& b = named[id];
  if (b.arrived && b.threads != threads) fail("named barrier " + std::to_string(id) + " with two numbers of threads");
  if (b.who[size_t(thread())]) fail("named barrier " + std::to_string(id) + ": a thread arrived twice in one phase");
  b.threads = threads;
  b.who.set(size_t(thread()));
  const int64_t generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.who.reset();
    ++b.generation;
    ++progress();
  } else if (wait) {
    wait_while(&b.generation, generation, "a named barrier");
  }
}

// ---- setmaxnreg ----
void change_registers(int to, bool more) {
  const auto change = [to, more](void* const(&)[kWarp]) {
    const int warp = thread() / kWarp;
    if (more ? to < registers.of_warp[warp] : to > registers.of_warp[warp])
      fail(more ? "setmaxnreg.inc to fewer registers" : "setmaxnreg.dec to more registers");
    ++registers.changed[warp];
    if (!more) {
      registers.free += registers.of_warp[warp] - to;
      registers.of_warp[warp] = to;
      ++registers.changes;
      ++progress();
    }
  };
  with_warp("setmaxnreg", nullptr, change);
  if (!more) return;
  const int warp = thread() / kWarp;
  while (registers.of_warp[warp] < to && registers.free < to - registers.of_warp[warp])
    wait_while(&registers.changes, registers.changes, "registers that others hand back");
  registers.free -= to - registers.of_warp[warp];  // the first thread of the warp takes them for all
  registers.of_warp[warp] = to;
}

}  // namespace simulator

// For tests that want to know whether a kernel for Hopper has run.
extern "C" __attribute__((visibility("default"))) int64_t simulator_tma_loads() { return simulator::loads; }

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const uint64_t line = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 64;
  if (rank != CUtensorMap::kRank || reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(data) % 16 ||
      box[0] * 2 % 16 || box[0] * 2 > line)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {};
  map->data = static_cast<const char*>(data);
  map->swizzle = int32_t(line);
  map->magic = simulator::kMagic;
  for (int d = 0; d < CUtensorMap::kRank; ++d) {
    const uint64_t stride = d ? strides[d - 1] : 2;
    if (sizes[d] < 1 || sizes[d] > uint64_t(1) << 32 || box[d] < 1 || box[d] > 256 || element_strides[d] != 1 ||
        (d && (stride % 16 || stride == 0 || stride >= uint64_t(1) << 40)))
      return CUDA_ERROR_INVALID_VALUE;
    map->size[d] = int64_t(sizes[d]);
    map->stride[d] = int64_t(stride);
    map->box[d] = int32_t(box[d]);
  }
  return CUDA_SUCCESS;
}
