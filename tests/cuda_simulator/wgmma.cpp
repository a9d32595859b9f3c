// wgmma: each warp's 16 rows of a product by themselves, so that the warps of a warpgroup may run apart. The operands are
// read, through their descriptors or from the registers, when the group happens: a random number of rounds after its
// commit. Until then the sums are NaN, and a kernel that writes to them is found out.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>

#include "hopper.h"

namespace simulator {
namespace {

constexpr int kLongestProduct = 40;  // rounds
constexpr uint32_t kPoison = 0xffc0dead;
constexpr int kMostN = 256, kDepth = 16, kRows = 16;

struct Sums {  // of one set of registers, while they belong to the hardware
  int n;
  float* registers[kWarp];
  float values[kRows][kMostN];
  int pending = 0;  // products
};
struct Operation {
  Product product;
  std::shared_ptr<Sums> sums;
  const uint32_t* a[kWarp];
};
struct Warp {
  std::map<float*, std::shared_ptr<Sums>> in_flight;  // by the registers of lane 0
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> committed;
  int64_t happened = 0;  // groups
  int64_t issued = 0;    // products
  bool fenced[kWarp] = {};
  int64_t commits[kWarp] = {};  // of each lane, to count its own groups
};
Warp warps[kMostThreads / kWarp];

const bool hooked = [] {
  const auto begin = [] {
    for (Warp& w : warps) w = {};
  };
  const auto end = [] {
    for (int i = 0; i < kMostThreads / kWarp; ++i) {
      if (!warps[i].open.empty()) fail("the block ended with products that were not committed");
      if (warps[i].issued != warps[i / 4 * 4].issued)
        fail("the warps of a warpgroup issued different numbers of wgmma");
    }
  };
  add_hooks({begin, end});
  return true;
}();

int row_of(int lane, int i) { return lane / 4 + 8 * (i >> 1 & 1); }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

// 8 elements of 16 bits to floats.
void unpack(bool half, const uint16_t* from, float* to) {
  static const std::vector<float> halves = [] {
    std::vector<float> table(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) table[size_t(i)] = float(std::bit_cast<_Float16>(uint16_t(i)));
    return table;
  }();
  for (int i = 0; i < 8; ++i) to[i] = half ? halves[from[i]] : std::bit_cast<float>(uint32_t(from[i]) << 16);
}

class Descriptor {
 public:
  explicit Descriptor(uint64_t d)
      : start_(uint32_t(d & 0x3fff) << 4),
        leading_(uint32_t(d >> 16 & 0x3fff) << 4),
        stride_(uint32_t(d >> 32 & 0x3fff) << 4),
        line_(d >> 62 == 1 ? 128 : 64) {
    if (d >> 62 != 1 && d >> 62 != 2) fail("wgmma: a descriptor with neither 128 nor 64 bytes of swizzle");
    if ((d >> 14 & 3) || (d >> 30 & 3) || (d >> 46 & 0xffff & ~0xc000)) fail("wgmma: a descriptor with unknown bits");
  }
  // Elements [8 part, 8 part + 8) of k of a row: lines of k, 8 rows after `stride` bytes.
  void along_columns(bool half, int row, int part, float* to) const {
    read(half, start_ + uint32_t(row / 8) * stride_ + uint32_t(row % 8 * line_ + part * 16), to);
  }
  // Elements [8 part, 8 part + 8) of the columns of row k: lines of columns, 8 rows after `stride`, further columns
  // after `leading` bytes.
  void along_rows(bool half, int k, int part, float* to) const {
    const int parts = line_ / 16;
    read(half,
         start_ + uint32_t(part / parts) * leading_ + uint32_t(k / 8) * stride_ +
             uint32_t(k % 8 * line_ + part % parts * 16),
         to);
  }

 private:
  void read(bool half, uint32_t address, float* to) const {
    const char* at = shared() + swizzled(address, line_);
    check_shared(at, 16, 16, "wgmma: an operand");
    unpack(half, reinterpret_cast<const uint16_t*>(at), to);
  }
  uint32_t start_, leading_, stride_;
  int line_;
};

void multiply(int warp, const Operation& o) {
  static float a[kRows][kDepth], b[kDepth][kMostN];
  const Product& p = o.product;
  const Descriptor b_at(p.b);
  if (p.transpose_b) {
    for (int k = 0; k < kDepth; ++k)
      for (int part = 0; part < p.n / 8; ++part) b_at.along_rows(p.half, k, part, &b[k][8 * part]);
  } else {
    float eight[8];
    for (int n = 0; n < p.n; ++n)
      for (int part = 0; part < 2; ++part) {
        b_at.along_columns(p.half, n, part, eight);
        for (int i = 0; i < 8; ++i) b[8 * part + i][n] = eight[i];
      }
  }
  if (p.a_registers) {
    for (int lane = 0; lane < kWarp; ++lane) {
      float values[8];
      unpack(p.half, reinterpret_cast<const uint16_t*>(o.a[lane]), values);
      for (int i = 0; i < 8; ++i) a[lane / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + lane % 4 * 2 + i % 2] = values[i];
    }
  } else {
    const Descriptor a_at(p.a);
    for (int row = 0; row < kRows; ++row)
      for (int part = 0; part < 2; ++part) a_at.along_columns(p.half, warp % 4 * kRows + row, part, &a[row][8 * part]);
  }
  for (int row = 0; row < kRows; ++row) {
    float* __restrict__ d = o.sums->values[row];
    if (!p.accumulate) std::fill_n(d, p.n, 0.f);
    for (int k = 0; k < kDepth; ++k) {
      const float by = a[row][k];
      const float* __restrict__ line = b[k];
      for (int n = 0; n < p.n; ++n) d[n] += by * line[n];
    }
  }
}

void give_back(Warp& w, Sums& sums) {
  if (--sums.pending) return;
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < sums.n / 2; ++i) {
      if (std::bit_cast<uint32_t>(sums.registers[lane][i]) != kPoison)
        fail("a register of sums was written while its wgmma was under way");
      sums.registers[lane][i] = sums.values[row_of(lane, i)][column_of(lane, i)];
    }
  w.in_flight.erase(sums.registers[0]);
}

void happen(int warp) {  // the oldest group
  Warp& w = warps[warp];
  const std::vector<Operation> group = std::move(w.committed.front());
  w.committed.pop_front();
  for (const Operation& o : group) {
    multiply(warp, o);
    give_back(w, *o.sums);
  }
  ++w.happened;
  ++progress();
}

}  // namespace

void wgmma_fence() { warps[thread() / kWarp].fenced[lane()] = true; }

void wgmma(const Product& product) {
  if (!warps[thread() / kWarp].fenced[lane()]) fail("wgmma without a wgmma.fence since the last commit");
  Product mine = product;
  with_warp("wgmma", &mine, [](void* const(&lanes)[kWarp]) {
    Warp& w = warps[thread() / kWarp];
    Operation o;
    o.product = *static_cast<Product*>(lanes[0]);
    std::shared_ptr<Sums>& sums = w.in_flight[o.product.d];
    const bool fresh = !sums;
    if (fresh) {
      sums = std::make_shared<Sums>();
      sums->n = o.product.n;
    } else if (sums->n != o.product.n) {
      fail("wgmma: registers of sums of another shape are under way");
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const Product& p = *static_cast<Product*>(lanes[lane]);
      if (p.a != o.product.a || p.b != o.product.b || p.n != o.product.n || p.accumulate != o.product.accumulate)
        fail("wgmma: the threads of a warp ask for different products");
      o.a[lane] = p.a_registers;
      if (!fresh && sums->registers[lane] != p.d) fail("wgmma: other registers than the product before");
      if (!fresh) continue;
      sums->registers[lane] = p.d;
      for (int i = 0; i < p.n / 2; ++i) {
        sums->values[row_of(lane, i)][column_of(lane, i)] = p.d[i];
        p.d[i] = std::bit_cast<float>(kPoison);
      }
    }
    ++sums->pending;
    ++w.issued;
    o.sums = sums;
    w.open.push_back(o);
  });
}

void wgmma_commit() {
  Warp& w = warps[thread() / kWarp];
  w.fenced[lane()] = false;
  ++w.commits[lane()];
  with_warp("wgmma.commit_group", nullptr, [](void* const(&)[kWarp]) {
    const int warp = thread() / kWarp;
    warps[warp].committed.push_back(std::move(warps[warp].open));
    warps[warp].open.clear();
    // Groups happen in their order: whichever delay is over first takes the oldest.
    start([warp] { happen(warp); }, kLongestProduct);
  });
}

void wgmma_wait(int pending) {
  Warp& w = warps[thread() / kWarp];
  while (w.commits[lane()] - w.happened > pending) wait_while(&w.happened, w.happened, "wgmma.wait_group");
}

}  // namespace simulator
