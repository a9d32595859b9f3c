// Sums over a row, and sums over rows, in a fixed order and more exact than adding floats one after the other.
// Included inside an instruction-set region after staged_row.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// A register of floats as two of doubles.
struct Doubles {
  VecD low, high;
};
GK_INLINE Doubles to_doubles(VecF v) {
  typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  return {__builtin_convertvector(halves[0], VecD), __builtin_convertvector(halves[1], VecD)};
}

// In double, since for a short row these are most of the additions.
GK_INLINE VecD in_double(VecF v) {
  const Doubles d = to_doubles(v);
  return d.low + d.high;
}
GK_INLINE VecD in_double(VecD v) { return v; }

// add(i, part, sums) adds one register's terms to each of the `Count` sums. Floats are added within pieces of 32 terms per
// lane and accumulator, pieces in double: the error does not grow with the length of the row.
template <class C, int Count, class F>
GK_INLINE void sum_row(int64_t n, double (&sums)[Count], F&& add) {
  constexpr int kStep = kLanesOf<C>, kAccumulators = 4;  // enough to hide the latency of an addition
  constexpr int64_t kPiece = 32 * kAccumulators * kStep;
  GK_UNROLL for (int s = 0; s < Count; ++s) sums[s] = 0;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t end = n - begin < kPiece ? n : begin + kPiece;
    Vec<C> acc[kAccumulators][Count] = {};
    int64_t i = begin;
    for (; i + kAccumulators * kStep <= end; i += kAccumulators * kStep)
      GK_UNROLL for (int j = 0; j < kAccumulators; ++j) add(i + j * kStep, Whole{}, acc[j]);
    for (; i + kStep <= end; i += kStep) add(i, Whole{}, acc[0]);
    if (i < end) add(i, End{end - i}, acc[0]);
    GK_UNROLL for (int s = 0; s < Count; ++s) sums[s] += horizontal_sum<double>(
        (in_double(acc[0][s]) + in_double(acc[1][s])) + (in_double(acc[2][s]) + in_double(acc[3][s])));
  }
}

// The sum of a row, in double throughout: exact enough for a mean that the elements nearly cancel.
template <class S>
double row_sum(const S* x, int64_t n) {
  constexpr int kUnroll = 4;
  VecD acc[kUnroll] = {};
  int64_t i = 0;
  if constexpr (sizeof(Compute<S>) == 8) {
    constexpr int kStep = kLanesOf<double>;
    for (; i + kUnroll * kStep <= n; i += kUnroll * kStep)
      GK_UNROLL for (int j = 0; j < kUnroll; ++j) acc[j] = acc[j] + load(x + i + j * kStep);
    for (; i + kStep <= n; i += kStep) acc[0] = acc[0] + load(x + i);
    if (i < n) acc[0] = acc[0] + load_first(x + i, n - i);
  } else {
    auto add = [&](VecF v, int j) {
      const Doubles d = to_doubles(v);
      acc[j] = acc[j] + d.low;
      acc[j + 1] = acc[j + 1] + d.high;
    };
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      add(load(x + i), 0);
      add(load(x + i + kLanes), 2);
    }
    for (; i + kLanes <= n; i += kLanes) add(load(x + i), 0);
    if (i < n) add(load_first(x + i, n - i), 0);
  }
  return horizontal_sum<double>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// The sum of (x - mean)^2 in double throughout, for rows so short that the rounding of a single square shows.
constexpr int64_t kShortRow = 128;
template <class S>
double short_row_squares(const S* x, int64_t n, double mean) {
  VecD acc[2] = {};
  auto add = [&](auto part, int64_t i) {
    if constexpr (sizeof(Compute<S>) == 8) {
      const VecD d = part.or_zero(part.load_from(x + i) - mean);
      acc[0] = fma(d, d, acc[0]);
    } else {
      Doubles d = to_doubles(part.load_from(x + i));
      d.low = d.low - mean;
      d.high = d.high - mean;
      if constexpr (is_end<decltype(part)>) {
        d.low = End{part.count}.or_zero(d.low);
        d.high = End{part.count - kLanes / 2}.or_zero(d.high);
      }
      acc[0] = fma(d.low, d.low, acc[0]);
      acc[1] = fma(d.high, d.high, acc[1]);
    }
  };
  for_each_register<Compute<S>>(n, [&](int64_t i, auto part) { add(part, i); });
  return horizontal_sum<double>(acc[0] + acc[1]);
}

// Squares leave float's range long before the numbers do: |x| ~ 1e30 overflows, and with eps ~ 0 |x| ~ 1e-25 vanishes.
// Where a sum of squares shows it, its row is summed again with every element times this power of two; otherwise 1.
template <class C>
GK_INLINE C rescue_scale(double sum_of_squares, double eps) {
  if constexpr (sizeof(C) == 8) return 1;
  if (sum_of_squares < 0x1p-60) return eps < 0x1p-40 ? 0x1p96f : 1.0f;
  return sum_of_squares < 0x1p126 ? 1.0f : 0x1p-96f;
}

// One register's columns summed over rows in double, and their addition to doubles in memory.
template <class C>
struct ColumnSums;
template <>
struct ColumnSums<float> {
  VecD low = {}, high = {};
  GK_INLINE void add(VecF v) {
    const Doubles d = to_doubles(v);
    low = low + d.low;
    high = high + d.high;
  }
  template <class Part>
  GK_INLINE void put(double* sums, Part part) const {
    constexpr int kHalf = kLanes / 2;
    if constexpr (is_end<Part>) {
      const int64_t first = part.count < kHalf ? part.count : kHalf;
      store_first(sums, low, first);
      store_first(sums + kHalf, high, part.count - first);
    } else {
      store(sums, low);
      store(sums + kHalf, high);
    }
  }
  template <class Part>
  GK_INLINE void add_to(double* sums, Part part) const {
    constexpr int kHalf = kLanes / 2;
    if constexpr (is_end<Part>) {
      const int64_t first = part.count < kHalf ? part.count : kHalf, second = part.count - first;
      store_first(sums, load_first(sums, first) + low, first);
      store_first(sums + kHalf, load_first(sums + kHalf, second) + high, second);
    } else {
      store(sums, load(sums) + low);
      store(sums + kHalf, load(sums + kHalf) + high);
    }
  }
};
template <>
struct ColumnSums<double> {
  VecD sum = {};
  GK_INLINE void add(VecD v) { sum = sum + v; }
  template <class Part>
  GK_INLINE void put(double* sums, Part part) const {
    part.store_to(sums, sum);
  }
  template <class Part>
  GK_INLINE void add_to(double* sums, Part part) const {
    part.store_to(sums, part.load_from(sums) + sum);
  }
};

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
