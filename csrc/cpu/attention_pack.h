// What the attention kernels pack K, V and Q with: room in a thread's scratch, rows of words, and the numbers that must
// not be multiplied by a probability of zero. Included inside an instruction-set region after vec.h and tile_gemm.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Keys are skipped, and the last ones padded, in groups of this: whole rows of a product, pairs of its two chains, and
// the four words of a Philox counter.
constexpr int kKeyGroup = 8;

template <class C>
constexpr C kInfinity = __builtin_inff();

template <class T>
GK_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
GK_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
GK_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Elements from one packed row to the next: whole registers, and one more where the rows would otherwise lie a multiple
// of 1 KiB apart and share a few sets of the L1.
template <class C>
GK_INLINE int64_t row_stride(int64_t n) {
  const int64_t whole = round_up(n, kLanesOf<C>);
  return whole * int64_t(sizeof(C)) % 1024 ? whole : whole + kLanesOf<C>;
}

// Hands out pieces of a thread's scratch, each beginning on a cache line.
class Arena {
 public:
  explicit Arena(void* begin) : at_(static_cast<char*>(begin)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
  char* end() const { return at_; }

 private:
  char* at_;
};

// `n` elements of a token, contiguous: where they lie, or collected in `stage`.
template <class T>
GK_INLINE const T* contiguous(const T* from, int64_t stride, int64_t n, T* stage) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < n; ++i) stage[i] = from[i * stride];
  return stage;
}

// One register from element i of a contiguous row of n, zeros past the end.
template <class T>
GK_INLINE Vec<Compute<T>> load_at(const T* row, int64_t i, int64_t n) {
  return i + kLanesOf<Compute<T>> <= n ? load(row + i) : load_first(row + i, n - i);
}

// NaN if any element packed so far was NaN or infinite.
template <class C>
struct Finiteness {
  Vec<C> sum{};
  GK_INLINE void see(Vec<C> v) { sum = sum + (v - v); }
  GK_INLINE bool all_finite() const { return horizontal_sum<C>(sum) == 0; }
};

// One register of words from a contiguous row: elements [word * kPerWord, ...) of n, zeros past the end.
template <class P, class T>
GK_INLINE Vec<typename P::Compute> load_row_words(const T* row, int64_t word, int64_t n) {
  if constexpr (P::kPerWord == 1) {
    return load_at(row, word, n);
  } else {
    VecF words = {};
    const int64_t bytes = (n - 2 * word) * 2;
    if (bytes >= kRegisterBytes)  // a copy of known size is a load, one of any size is a call
      __builtin_memcpy(&words, row + 2 * word, kRegisterBytes);
    else
      __builtin_memcpy(&words, row + 2 * word, bytes);
    return words;
  }
}

// A packed matrix that is multiplied by probabilities or their gradients. Those of a hidden key are 0, and 0 * NaN must
// not reach a result that does not see it. `finite` has zeros in the place of NaN and infinities (it is `packed` where
// there are none), so that a product has the bits it has without them; add_nonfinite brings them to what sees them.
template <class P>
struct Contracted {
  using C = typename P::Compute;
  using Word = typename P::Word;
  int64_t stride;
  Word *packed, *copy, *finite;

  Contracted(Arena& arena, int64_t rows, int64_t stride)
      : stride(stride), packed(arena.take<Word>(rows * stride)), copy(arena.take<Word>(rows * stride)) {}

  // To be called when `rows` rows of words were packed.
  void separate(bool all_finite, int64_t rows) {
    finite = all_finite ? packed : copy;
    for (int64_t i = 0; !all_finite && i < rows * stride; ++i) {
      Word word = packed[i];
      if constexpr (P::kPerWord == 1) {
        if (word - word != 0) word = 0;
      } else {
        if (part(word, 0) - part(word, 0) != 0) word &= 0xffff0000;
        if (part(word, 1) - part(word, 1) != 0) word &= 0x0000ffff;
      }
      copy[i] = word;
    }
  }
  // Element d of row r, where a word holds kPerWord rows.
  C at(int64_t r, int64_t d) const { return part(packed[r / P::kPerWord * stride + d], r % P::kPerWord); }
  static C part(Word word, int64_t half) {
    if constexpr (P::kPerWord == 1)
      return word;
    else
      return bit_cast<float>(half ? word & 0xffff0000 : word << 16);
  }
};

// add(r, d, value) for every NaN and infinity of rows [begin, end) of a packed matrix.
template <class P, class F>
void for_each_nonfinite(const Contracted<P>& matrix, int64_t begin, int64_t end, int64_t dim, F&& add) {
  if (matrix.finite == matrix.packed) return;
  for (int64_t r = begin; r < end; ++r)
    for (int64_t d = 0; d < dim; ++d)
      if (const auto value = matrix.at(r, d); value - value != 0) add(r, d, value);
}

// How exactly a probability is computed: enough for results of 16 bits; for float32, with the scale and log2(e) in one
// factor; or for scores that took a pass of their own anyway, without the rounding of that factor.
enum class Exponential { coarse, fine, finest };

// The probability of a score that lies x below the largest. `by` takes it to an exponent of 2 (of e for finest).
template <Exponential Kind, class V>
GK_INLINE V probability_of(V x, V by) {
  if constexpr (Kind == Exponential::finest) return exp_nonpositive(x);
  return exp2_nonpositive<Kind == Exponential::fine>(x * by);
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
