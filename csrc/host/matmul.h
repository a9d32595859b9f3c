// Products of matrices on all threads: csrc/cpu/matmul.h, cut into items.
#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "cpu/matmul.h"
#include "host/check.h"
#include "host/parallel.h"
#include "host/scratch.h"

namespace genai_kernels {

// A product as a grid of items. Rows are cut at multiples of 4, and columns at multiples of `columns_step`, as the tiles
// are; an item has at most `most_rows` rows and as many steps of columns as leave each thread about four items, but not so
// few that packing its rows costs more than multiplying them.
struct MatmulGrid {
  static constexpr int64_t kFewestColumns = 48;
  int64_t rows, columns, columns_step, row_blocks, steps, column_blocks;

  MatmulGrid(int64_t rows, int64_t columns, int64_t columns_step, int64_t most_rows, int64_t most_columns)
      : rows(rows), columns(columns), columns_step(columns_step) {
    row_blocks = (rows + most_rows - 1) / most_rows;
    steps = (columns + columns_step - 1) / columns_step;
    const int64_t fair = steps * row_blocks / (4 * torch::stable::get_num_threads());
    const int64_t fewest = std::min<int64_t>(steps, kFewestColumns / columns_step);
    const int64_t wide = std::clamp<int64_t>(fair, std::max<int64_t>(fewest, 1), most_columns / columns_step);
    column_blocks = (steps + wide - 1) / wide;
  }
  int64_t count() const { return row_blocks * column_blocks; }
  // The items of the same columns follow each other: they share B.
  MatmulItem item(int64_t i) const {
    const int64_t row = i % row_blocks, column = i / row_blocks;
    return {row_at(row), row_at(row + 1), column_at(column), column_at(column + 1)};
  }
  int64_t largest_rows() const { return std::min(rows, (rows + row_blocks - 1) / row_blocks + 4); }
  int64_t largest_columns() const { return (steps + column_blocks - 1) / column_blocks * columns_step; }

 private:
  int64_t row_at(int64_t block) const { return block == row_blocks ? rows : rows * block / row_blocks / 4 * 4; }
  int64_t column_at(int64_t block) const { return std::min(columns, steps * block / column_blocks * columns_step); }
};

// 128 rows of A in pieces of 4 KiB and as many rows of 768 sums are 900 KiB of an L2; B is read once for each 128 rows.
// A thin product, as with the A of an adapter, has its few columns in every item, and is cut by rows.
inline MatmulGrid grid_of(const DotMatmulParams& p) {
  const bool thin = p.columns <= 2 * MatmulGrid::kFewestColumns;
  return {p.rows, p.columns, 6, thin ? 32 : 128, 768 / p.parts};
}
// Two pieces of 256 rows of A and four panels of sums are 500 KiB of an L2; B is packed once for each 256 rows.
inline MatmulGrid grid_of(const MatmulParams& p) {
  return {p.rows, p.columns, kMatmulColumns, 256, 4 * kMatmulColumns};
}
inline int64_t scratch_of(const DotMatmulParams& p, int64_t rows, int64_t columns) {
  return dot_matmul_scratch(p, rows, columns);
}
inline int64_t scratch_of(const MatmulParams& p, int64_t rows, int64_t columns) {
  return matmul_scratch(p, rows, columns);
}
inline int64_t depth_of(const DotMatmulParams& p) { return p.depth; }
inline int64_t depth_of(const MatmulParams& p) { return p.terms[0].depth; }
inline int64_t parts_of(const DotMatmulParams& p) { return p.parts; }
inline int64_t parts_of(const MatmulParams&) { return 1; }
inline void run_item(const DotMatmulParams& p, const MatmulItem& item, void* scratch) {
  dot_matmul_kernel(p, item, scratch);
}
inline void run_item(const MatmulParams& p, const MatmulItem& item, void* scratch) { matmul_kernel(p, item, scratch); }

// Products that do not depend on each other.
template <class Params>
void run_matmuls(std::span<const Params> products) {
  struct Work {
    const Params* p;
    MatmulGrid grid;
    int64_t begin;
  };
  std::vector<Work> work;
  int64_t items = 0, bytes = 0, multiplications = 0;
  for (const Params& p : products) {
    if (p.rows == 0 || p.columns == 0) continue;
    const MatmulGrid grid = grid_of(p);
    bytes = std::max(bytes, scratch_of(p, grid.largest_rows(), grid.largest_columns()));
    work.push_back({&p, grid, items});
    items += grid.count();
    multiplications += p.rows * p.columns * depth_of(p) * parts_of(p);
  }
  // less than it costs to wake a thread
  if (multiplications < int64_t(1) << 17) {
    const Scratch scratch(bytes);
    for (const Work& w : work)
      for (int64_t i = 0; i < w.grid.count(); ++i) run_item(*w.p, w.grid.item(i), scratch.get());
    return;
  }
  parallel_for_dynamic(
      items, [&] { return Scratch(bytes); },
      [&](int64_t i, Scratch& scratch) {
        const auto next =
            std::upper_bound(work.begin(), work.end(), i, [](int64_t at, const Work& w) { return at < w.begin; });
        const Work& w = next[-1];
        run_item(*w.p, w.grid.item(i - w.begin), scratch.get());
      });
}
template <class Params>
void run_matmul(const Params& p) {
  run_matmuls(std::span<const Params>(&p, 1));
}

inline MatmulOperand operand(const char* op, const char* name, const TensorRef& t, int outer, int depth) {
  return {t.data(), float_dtype(op, name, t), t.stride(outer), t.stride(depth)};
}

}  // namespace genai_kernels
