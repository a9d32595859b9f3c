// Sums over a row, and sums over rows, in a fixed order and more exact than adding floats one after the other.
// Included inside an instruction-set region after staged_row.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

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
    GK_UNROLL for (int s = 0; s < Count; ++s)
      sums[s] += horizontal_sum<C>((acc[0][s] + acc[1][s]) + (acc[2][s] + acc[3][s]));
  }
}

// Squares leave float's range long before the numbers do: |x| ~ 1e30 overflows, and with eps ~ 0 |x| ~ 1e-25 vanishes.
// Where a sum of squares shows it, its row is summed again with every element times this power of two; otherwise 1.
template <class C>
GK_INLINE C rescue_scale(double sum_of_squares, double eps) {
  if constexpr (sizeof(C) == 8) return 1;
  if (sum_of_squares < 0x1p-60) return eps < 0x1p-40 ? 0x1p96f : 1.0f;
  return sum_of_squares < 0x1p126 ? 1.0f : 0x1p-96f;
}

template <class C>
GK_INLINE C reciprocal_root(double mean_square, double eps) {
  return C(1 / __builtin_sqrt(mean_square + eps));
}

// Adds a register to double sums in memory.
template <class Part>
GK_INLINE void add_to(double* sums, VecF v, Part part) {
  constexpr int kHalf = kLanes / 2;
  typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  if constexpr (requires { part.count; }) {
    const int64_t first = part.count < kHalf ? part.count : kHalf, second = part.count - first;
    store_first(sums, load_first(sums, first) + __builtin_convertvector(halves[0], VecD), first);
    store_first(sums + kHalf, load_first(sums + kHalf, second) + __builtin_convertvector(halves[1], VecD), second);
  } else {
    store(sums, load(sums) + __builtin_convertvector(halves[0], VecD));
    store(sums + kHalf, load(sums + kHalf) + __builtin_convertvector(halves[1], VecD));
  }
}
template <class Part>
GK_INLINE void add_to(double* sums, VecD v, Part part) {
  part.store_to(sums, part.load_from(sums) + v);
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
