// The gradients of RMS norm and layer norm, by the names of cuda/norm_rows.cuh.
//
//   g = dy * w,   dx = rstd * (g - mean(g) - x^ * mean(g * x^)) + dsum,   dw = sum of dy * x^,   db = sum of dy over rows
//
// A block has some rows one after the other (or several at a time, where they are short) and measures them again, which
// costs less than saving and reading. The terms of dw and db of its rows are added in shared memory, every thread to
// its own columns: float where x has 16 bits, double where it is float32. The blocks' sums are added by sum_blocks.
#pragma once
#include "cuda/norm_rows.cuh"

namespace genai_kernels {

// The type of partial sums over rows.
template <class T>
using ColumnSum = std::conditional_t<sizeof(T) == 4, double, float>;

// One thread's column sums in shared memory: 32 bytes for each of its vectors, in two halves of 16 so that neighbouring
// threads have neighbouring places.
template <class T, int kVectors>
struct ColumnSums {
  using Sum = ColumnSum<T>;
  static constexpr int kHalf = 16 / int(sizeof(Sum));
  char* at;

  static constexpr int bytes(int threads) { return threads * kVectors * 32; }
  GK_DEVICE Sum* half(int j, int h, int thread) const {
    return reinterpret_cast<Sum*>(at + (int64_t(2 * j + h) * blockDim.x + thread) * 16);
  }
  GK_DEVICE void clear() const {
#pragma unroll
    for (int j = 0; j < 2 * kVectors; ++j) store_16(half(0, j, threadIdx.x), make_uint4(0, 0, 0, 0));
  }
  GK_DEVICE void add(int j, const float (&x)[Vector<T>::kCount]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Sum* const place = half(j, h, threadIdx.x);
      if constexpr (sizeof(T) == 4) {
        double2 sum = *reinterpret_cast<const double2*>(place);
        sum.x += double(x[2 * h]);
        sum.y += double(x[2 * h + 1]);
        *reinterpret_cast<double2*>(place) = sum;
      } else {
        float4 sum = *reinterpret_cast<const float4*>(place);
        sum.x += x[4 * h];
        sum.y += x[4 * h + 1];
        sum.z += x[4 * h + 2];
        sum.w += x[4 * h + 3];
        *reinterpret_cast<float4*>(place) = sum;
      }
    }
  }
};

template <class T, bool kCentered, int kVectors, bool kHeld>
GK_DEVICE void normalise_rows_backward(const NormParams& p, const RowBlocks& blocks, const RowLaunch& launch) {
  constexpr int kPer = Vector<T>::kCount;
  using Index = std::conditional_t<kHeld, int, int64_t>;
  using View = RowView<T, Index>;
  using Sum = ColumnSum<T>;
  GK_SHARED(shared);
  RowGroup group(launch.group, shared);
  const int64_t n = p.x.length, block = blockIdx.x;
  const Index first = group.rank(), step = group.size;
  Sum* const dw = p.dw_partial ? static_cast<Sum*>(p.dw_partial) + block * n : nullptr;
  Sum* const db = kCentered && p.db_partial ? static_cast<Sum*>(p.db_partial) + block * n : nullptr;
  using Columns = ColumnSums<T, kVectors>;
  const Columns sum_dw{shared + sizeof(RowGroup::Shared)};
  const Columns sum_db{sum_dw.at + (dw ? Columns::bytes(blockDim.x) : 0)};
  if constexpr (kHeld) {
    if (dw) sum_dw.clear();
    if (db) sum_db.clear();
  } else {  // in memory, where each thread adds to its own columns too
    for (Index at = first * kPer; at < n; at += step * kPer)
      for (int i = 0; i < kPer && at + i < n; ++i) {
        if (dw) dw[at + i] = 0;
        if (db) db[at + i] = 0;
      }
  }
  const HeldParameter<T, kHeld ? kVectors : 8> weight(p.weight, first, step, Index(n));

  // Every group of the block goes through as many rows, the last of nothing, since they meet in collectives.
  for (int64_t begin = blocks.begin(block); begin < blocks.end(block); begin += group.count()) {
    const int64_t row = begin + group.number();
    const Index length = row < blocks.end(block) ? Index(n) : 0;
    const auto view = [&](const Rows& rows) { return View(rows, length ? row : 0, launch.wide, length); };
    const View x_row = view(p.x), dy_row = view(p.dy), dsum_row = view(p.dsum.data ? p.dsum : p.dy);
    RowTile<T, kVectors> x, dy, dsum;
    const auto load = [&](Index at) {
      x_row.load(x.v, at, step);
      dy_row.load(dy.v, at, step);
    };
    const auto each_tile = [&](auto&& f) {
      if constexpr (kHeld) {
        f(first);
      } else {
        for (Index at = first; at * kPer < length; at += kVectors * step) {
          load(at);
          f(at);
        }
      }
    };
    if constexpr (kHeld) {
      load(first);
      if (p.dsum.data) dsum_row.load(dsum.v, first, step);
    }

    double mean = 0;
    if constexpr (kCentered) {
      double sum[1] = {0};
      each_tile([&](Index) { add_elements<T, kVectors>(x, sum[0]); });
      group.sum(sum);
      x.forget();
      mean = mean_of(sum[0], launch);
    }
    // the sums of d^2, g d and g, where d = (x - mean) * scale
    constexpr int kSums = kCentered ? 3 : 2;
    double sums[kSums];
    const float center = float(mean);
    const auto measure = [&](float scale) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] = 0;
      each_tile([&](Index at) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          const Index vector = at + j * step, left = length - vector * kPer;
          if (left <= 0) continue;
          float w[kPer], part[3] = {};
          weight.get(p.weight, j, vector, 1, w);
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            const float g = __fmul_rn(dy(j, i), w[i]);  // 0 beyond the row
            if constexpr (kExact<T, kVectors>) {
              const double d = !kCentered || i < left ? double(x(j, i)) - mean : 0;
              sums[0] = fma(d, d, sums[0]);
              sums[1] = fma(double(g), d, sums[1]);
              if (kCentered) sums[kSums - 1] += double(g);
            } else {
              const float d = !kCentered ? x(j, i) * scale : i < left ? (x(j, i) - center) * scale : 0;
              part[0] = __fmaf_rn(d, d, part[0]);
              part[1] = __fmaf_rn(g, d, part[1]);
              part[2] += g;
            }
          }
          if constexpr (!kExact<T, kVectors>)
#pragma unroll
            for (int k = 0; k < kSums; ++k) sums[k] += double(part[k]);
        }
      });
      group.sum(sums);
      x.forget();
      dy.forget();
    };
    measure(1);
    double unscale = 1, rest = 0;
    if constexpr (!kExact<T, kVectors>) {
      const float scale = rescue_scale(sums[0], p.eps);
      if (group.any(scale != 1)) measure(scale);
      unscale = scale == 1 ? 1 : scale > 1 ? 0x1p-96 : 0x1p96;
      rest = mean - double(center);
    }
    const double variance = mean_of(sums[0] * unscale * unscale, launch) - rest * rest;
    const double rstd = reciprocal_root((variance < 0 ? 0 : variance) + p.eps);
    const Moments moments = Moments::of(mean, rstd);
    const double sum_g = kCentered ? sums[kSums - 1] : 0;
    const float pull = float(-mean_of((sums[1] * unscale - rest * sum_g) * rstd, launch));
    const float mean_g = float(kCentered ? mean_of(sum_g, launch) : 0);

    const View dx_row = view(p.dx);
    each_tile([&](Index at) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const Index vector = at + j * step, left = length - vector * kPer;
        if (left <= 0) continue;
        if constexpr (!kHeld)
          if (p.dsum.data) dsum.v[j] = dsum_row.load(vector);
        float w[kPer], dx[kPer], term[kPer], dy_of[kPer];
        weight.get(p.weight, j, vector, 1, w);
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const float normed = moments.normed<kCentered>(x(j, i)), d = dy(j, i);
          dy_of[i] = d;
          term[i] = i < left ? __fmul_rn(d, normed) : 0;
          // not fused: exactly 0 where all g are equal
          const float g = kCentered ? __fadd_rn(__fmul_rn(d, w[i]), -mean_g) : __fmul_rn(d, w[i]);
          const float own = __fmul_rn(__fmaf_rn(normed, pull, g), moments.rstd);
          dx[i] = p.dsum.data ? __fadd_rn(own, dsum(j, i)) : own;
        }
        dx_row.store(vector, rounded<T>(dx));
        if constexpr (kHeld) {
          if (dw) sum_dw.add(j, term);
          if (db) sum_db.add(j, dy_of);
        } else {
          for (int i = 0; i < kPer; ++i) {
            if (i >= left) break;
            if (dw) dw[vector * kPer + i] += Sum(term[i]);
            if (db) db[vector * kPer + i] += Sum(dy_of[i]);
          }
        }
      }
    });
  }
  if constexpr (kHeld) {  // the groups' sums, in their order
    if (group.count() > 1) __syncthreads();
    if (group.number() > 0) return;
    constexpr int kHalf = Columns::kHalf;
    for (int j = 0; j < kVectors; ++j)
      for (int i = 0; i < kPer; ++i) {
        const Index column = (first + j * step) * kPer + i;
        if (column >= n) break;
        Sum of_dw = 0, of_db = 0;
        for (int g = 0; g < group.count(); ++g) {
          const int thread = g * group.size + int(threadIdx.x);
          if (dw) of_dw += sum_dw.half(j, i / kHalf, thread)[i % kHalf];
          if (db) of_db += sum_db.half(j, i / kHalf, thread)[i % kHalf];
        }
        if (dw) dw[column] = of_dw;
        if (db) db[column] = of_db;
      }
  }
}

// `kernel(type, vectors, held)` gives the op's kernel for a type and a tile.
template <class Kernel>
cudaError_t launch_norm_backward(const NormParams& p, const RowBlocks& blocks, cudaStream_t stream,
                                 const Kernel& kernel) {
  cudaError_t error = cudaSuccess;
  for (const Rows* t : {&p.x, &p.dy, &p.dx, &p.dsum})
    if (!few_rows(*t)) return cudaErrorInvalidValue;
  switch_gpu_dtype(p.dtype, [&](auto type) {
    constexpr int kSize = int(sizeof(typename decltype(type)::type));
    const bool wide = is_wide(p.x, kSize) && is_wide(p.dy, kSize) && is_wide(p.dx, kSize) && is_wide(p.dsum, kSize);
    RowLaunch rows = backward_row_launch(p.x.length, p.dtype);
    rows.wide = wide;
    const dim3 grid(unsigned(blocks.count()));
    const int wanted = (p.dw_partial ? 1 : 0) + (p.db_partial ? 1 : 0);
    const int shared = int(sizeof(RowGroup::Shared)) + wanted * rows.threads * rows.vectors * 32;
    const auto run = [&](auto vectors, auto held) {
      error = launch(kernel(type, vectors, held), grid, rows.threads, shared, stream, p, blocks, rows);
    };
    if (rows.vectors == 1) run(std::integral_constant<int, 1>{}, BoolTag<true>{});
    if (rows.vectors == 4) run(std::integral_constant<int, 4>{}, BoolTag<true>{});
    if (rows.vectors == 0) run(std::integral_constant<int, 4>{}, BoolTag<false>{});
  });
  return error;
}

}  // namespace genai_kernels
