// What the hosts of group_norm_silu and group_norm_stats hand to their kernels, and how the work is cut.
//
// An image is [batch, channels, pixels], in one of two orders: the pixels of a channel side by side (channels first), or
// the channels of a pixel. A group of channels is, channels first, one run of `group_channels * pixels` elements.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/group_activation.h"
#include "core/rows.h"

namespace genai_kernels {

struct Image {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t line_stride = 0;  // channels first: between channels, `pixels`; channels last: between pixels

  template <class T>
  T* line(int64_t n, int64_t i) const {
    return static_cast<T*>(data) + n * batch_stride + i * line_stride;
  }
};

struct GroupNormParams {
  Dtype dtype;
  GroupActivation activation;
  bool channels_last;
  double eps;
  int64_t batch, channels, groups, pixels;
  Image x, residual, sum, y;  // forward: x + residual is normalised and written to sum, where there is a residual
  Image dy, dsum, dx;         // backward: x is what was normalised; dsum, the gradient of sum, or null
  Parameter weight, bias;
  SampleParameter scale, shift;
  double* stats;  // [batch, groups, 2]: mean and 1 / sqrt(variance + eps)

  int64_t group_channels() const { return channels / groups; }
  int64_t group_elements() const { return channels / groups * pixels; }
};

// Count, mean and summed squares around the mean of some elements, and those of two sets together (Chan, Golub, LeVeque).
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(const Moments& other) {
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    squares += other.squares + delta * delta * (count * (other.count / total));
    count = total;
  }
  // Mean and 1 / sqrt(variance + eps).
  void to_stats(double eps, double* stats) const {
    stats[0] = mean;
    stats[1] = 1 / __builtin_sqrt(squares / count + eps);
  }
};

// How a reduction is cut, by its length alone: chunks that are summed around a center of their own, and blocks of
// chunks, at most 32, that threads may share. Whoever computes them, chunks are added in order within their block, and
// blocks in order.
struct ReductionBlocks {
  int64_t length, chunk, size;

  // Channels first of the elements of a group, 16 KB of floats a chunk; channels last of the pixels.
  ReductionBlocks(const GroupNormParams& p)
      : length(p.channels_last ? p.pixels : p.group_elements()), chunk(p.channels_last ? 128 : 4096) {
    const int64_t part = (length + 31) / 32;
    size = (part + chunk - 1) / chunk * chunk;
  }
  int64_t count() const { return (length + size - 1) / size; }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return begin(block) + size < length ? begin(block) + size : length; }
};

// A part of the work: sample n, groups [group_begin, group_end). Channels first always of one group.
struct GroupSlab {
  int64_t n, group_begin, group_end;
};
struct GroupSlabs {
  int64_t groups, width;  // groups in a slab
  int64_t per_sample() const { return (groups + width - 1) / width; }
  GroupSlab operator[](int64_t i) const {
    const int64_t begin = i % per_sample() * width;
    return {i / per_sample(), begin, begin + width < groups ? begin + width : groups};
  }
};

// Doubles of scratch for each channel.
inline constexpr int kGroupNormScratch = 24;

// Pixels of a piece of work where the layout is channels last and a sample is shared by threads.
inline constexpr int64_t kPixelPiece = 32;

// ---- forward ----

// Slabs [begin, end): statistics and result, the slab staying in cache between them.
void group_norm_fwd_kernel(const GroupNormParams& p, const GroupSlabs& slabs, int64_t begin, int64_t end,
                           void* scratch);
// The same in two steps, where a slab is too large for that or there are too few of them. Moments of (slab, block) pairs
// [begin, end), to moments[n][block][group]; x + residual is written on the way.
void group_norm_moments_kernel(const GroupNormParams& p, const GroupSlabs& slabs, Moments* moments, int64_t begin,
                               int64_t end, void* scratch);
// The result, from stats: [begin, end) of all (n, channel), or of all (n, kPixelPiece pixels).
void group_norm_apply_kernel(const GroupNormParams& p, int64_t begin, int64_t end, void* scratch);

// ---- backward ----
//
// sums[n][0][c] = sum of dz, sums[n][1][c] = sum of dz x^ over the pixels, with z what the activation is applied to.

// Slabs [begin, end); behind the scratch of the channels there is a number of the compute type for each element of a slab.
void group_norm_bwd_kernel(const GroupNormParams& p, const GroupSlabs& slabs, double* sums, int64_t begin, int64_t end,
                           void* scratch);
// Channels first: sums of (n, channel) [begin, end). Channels last: of (n, block), to partial[n][block][2][c].
void group_norm_sums_kernel(const GroupNormParams& p, double* sums, int64_t begin, int64_t end, void* scratch);
// Channels last: sums of (n, channel) [begin, end) from those of the blocks, in order.
void group_norm_finish_kernel(const GroupNormParams& p, const double* partial, double* sums, int64_t begin,
                              int64_t end);
// dx, from sums: [begin, end) of all (n, channel), or of all (n, kPixelPiece pixels).
void group_norm_dx_kernel(const GroupNormParams& p, const double* sums, int64_t begin, int64_t end, void* scratch);

struct GroupNormParameterGrads {
  double *dw, *db;         // [channels], added to; or null
  SampleParameter dscale;  // written; or null
  SampleParameter dshift;
};
// From the sums of all samples, for channels [begin, end).
void group_norm_parameters_kernel(const GroupNormParams& p, const double* sums, const GroupNormParameterGrads& grads,
                                  int64_t begin, int64_t end, void* scratch);

}  // namespace genai_kernels
