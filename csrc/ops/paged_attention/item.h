// What an item of paged_attention works with: its rows and what each of them sees, the thread's scratch, and the keys and
// values of a step, packed. Included inside an instruction-set region after vec.h, tile_gemm.h, transpose.h and
// attention_pack.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int kStepKeys = 128;  // as flash_attention's: the sums of a row are grouped by them
// Words of a piece of a sum: two chains of 4. PyTorch's product of one row with a matrix has sums as short, and a score's
// rounding is most of the error of a result; 12 % more additions in work that is bound by memory.
constexpr int64_t kPieceWords = 8;
constexpr int kFoldKeys = 64;          // whole pieces of multiply_folded, whatever a word holds
constexpr int kBlockRows = kTileRows;  // rows multiplied together
// Registers of a product with so many rows: enough chains to hide the latency of the multiply-add, and no more
// accumulators than there are registers.
template <int Rows>
constexpr int kProductVectors = Rows >= 4   ? 2
                                : Rows == 2 ? (kTileRows == 2 ? 2 : 4)
                                            : 4;
constexpr int kWidestProduct = 4 * kLanes;

typedef float Quad __attribute__((vector_size(16)));

struct Row {
  int64_t first, last;  // visible keys, inclusive
  const bool* tree;     // of key `tree_begin` and those after it; or null
  int64_t tree_begin;
  float slope, diagonal;
  int64_t query, head;  // of its sequence
};

// The softmax of a row over some keys.
struct State {
  float max, sum;
};

template <class P>
struct PagedScratch {
  using Word = typename P::Word;
  int64_t q_words, q_stride, value_stride;
  Row* rows;
  State *state, *total;
  Word *q, *k_t, *p_words;
  float *o, *total_o, *s;
  Arena arena;
  Contracted<P> v;
  char* end;

  PagedScratch(const PagedAttentionParams& p, int64_t count, void* memory)
      : value_stride(row_stride<float>(round_up(p.value_dim, kWidestProduct))),
        arena(memory),
        v(arena, kStepKeys / P::kPerWord, value_stride) {
    q_words = (p.head_dim + P::kPerWord - 1) / P::kPerWord;
    q_stride = row_stride<float>(q_words);
    rows = arena.take<Row>(count);
    state = arena.take<State>(count);
    total = arena.take<State>(count);
    q = arena.take<Word>(count * q_stride);
    k_t = arena.take<Word>(round_up(q_words, kLanes) * kStepKeys);
    p_words = arena.take<Word>(kBlockRows * kStepKeys);
    s = arena.take<float>(kBlockRows * kStepKeys);
    o = arena.take<float>(count * value_stride);
    total_o = arena.take<float>(count * value_stride);
    end = arena.end();
  }
};

// ---- what a row sees ----

template <class P, class T>
void set_rows(const PagedAttentionParams& p, const PagedItem& item, PagedScratch<P>& scratch) {
  int64_t count = 0;
  for (int64_t i = 0; i < item.span_count; ++i) {
    const RowSpan span = item.spans[i];
    const PagedSequence& s = p.sequences[span.sequence];
    for (int64_t r = span.row_begin; r < span.row_end; ++r, ++count) {
      Row& row = scratch.rows[count];
      row.query = r / p.group;
      row.head = item.kv_head * p.group + r % p.group;
      const int64_t token = s.query_begin + row.query, diagonal = s.keys - s.queries + row.query;
      row.first = p.left < 0 ? 0 : max_of<int64_t>(0, diagonal - p.left);
      row.last = p.right < 0 ? s.keys - 1 : min_of(s.keys - 1, diagonal + p.right);
      row.tree = p.tree ? p.tree + token * p.tree_query : nullptr;
      row.tree_begin = s.keys - s.queries;
      row.slope = p.slopes ? p.slopes[span.sequence * p.slopes_sequence + row.head] : 0;
      row.diagonal = float(diagonal);
      const T* q = reinterpret_cast<const T*>(p.q) + token * p.q_token + row.head * p.q_head;
      T stage[kLanes * P::kPerWord];
      for (int64_t w = 0; w < scratch.q_words; w += kLanes) {
        const int64_t from = w * P::kPerWord, n = min_of<int64_t>(kLanes * P::kPerWord, p.head_dim - from);
        const T* part = contiguous(q + from * p.q_dim, p.q_dim, n, stage);
        const Vec<float> words = load_row_words<P>(part, 0, n);
        __builtin_memcpy(scratch.q + count * scratch.q_stride + w, &words, sizeof words);
      }
    }
  }
}

// ---- packing ----

// Where the rows of K and V of a step lie, for one key head; null for keys that no row sees. The scales are int8's.
struct StepRows {
  const char *k[kStepKeys], *v[kStepKeys];
  float k_scale[kStepKeys], v_scale[kStepKeys];
};

// The rows of keys [from, to) of the step at `key`, of elements of `size` bytes.
inline void find_rows(const PagedAttentionParams& p, const int32_t* pages, int64_t kv_head, int64_t key, int64_t from,
                      int64_t to, int64_t size, StepRows& rows) {
  for (int64_t i = 0; i < kStepKeys; ++i) rows.k[i] = rows.v[i] = nullptr, rows.k_scale[i] = rows.v_scale[i] = 0;
  if (from >= to) return;
  int64_t page = from / p.page_size, token = from - page * p.page_size;  // counted on: a division for each key is dear
  for (int64_t at = from; at < to; ++at, ++token) {
    if (token == p.page_size) token = 0, ++page;
    const int64_t block = pages[page];
    rows.k[at - key] = p.k.data + (block * p.k.page + token * p.k.token + kv_head * p.k.head) * size;
    rows.v[at - key] = p.v.data + (block * p.v.page + token * p.v.token + kv_head * p.v.head) * size;
    if (!p.int8_cache) continue;
    rows.k_scale[at - key] = p.k.scale[block * p.k.scale_page + token * p.k.scale_token + kv_head * p.k.scale_head];
    rows.v_scale[at - key] = p.v.scale[block * p.v.scale_page + token * p.v.scale_token + kv_head * p.v.scale_head];
  }
}

// Asks for the cache lines of a row; nothing is read.
GK_INLINE void prefetch_row(const char* row, int64_t bytes) {
  if (!row) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

GK_INLINE VecF int8_to_float(const int8_t* from, int64_t n) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes = {};
  if (n >= kLanes)  // a copy of known size is a load, one of any size is a call
    __builtin_memcpy(&bytes, from, kLanes);
  else
    __builtin_memcpy(&bytes, from, n);
  return __builtin_convertvector(__builtin_convertvector(bytes, VecI), VecF);
}

// One register of words from element `word * kPerWord` of a row of n.
template <class P, class T>
GK_INLINE VecF row_words(const T* row, int64_t word, int64_t n) {
  if constexpr (sizeof(T) > 1) {
    return load_row_words<P>(row, word, n);
  } else if constexpr (P::kPerWord == 1) {
    return int8_to_float(row + word, n - word);
  } else {  // an int8 is a bf16 exactly
    VecF words = {};
#if GENAI_KERNELS_ISA_BF16
    const int64_t left = n - 2 * word;
    const VecF low = int8_to_float(row + 2 * word, left);
    const VecF high = left > kLanes ? int8_to_float(row + 2 * word + kLanes, left - kLanes) : VecF{};
    words = (VecF)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
    return words;
  }
}
template <class T>
GK_INLINE VecF row_values(const T* row, int64_t i, int64_t n) {
  if constexpr (sizeof(T) > 1)
    return load_at(row, i, n);
  else
    return int8_to_float(row + i, n - i);
}

// k_t[words][kStepKeys] = K^T of the rows of a step, `padded` keys of it. The rows of the next one come into the cache
// meanwhile, a few at a time.
template <class P, class T>
void pack_keys(const PagedAttentionParams& p, const StepRows& rows, const StepRows& next, int64_t padded,
               const PagedScratch<P>& scratch) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) prefetch_row(next.k[i + l], p.head_dim * int64_t(sizeof(T)));
    for (int64_t w = 0; w < scratch.q_words; w += kLanes) {
      VecF x[kLanes];
      GK_UNROLL for (int l = 0; l < kLanes; ++l) {
        const T* row = reinterpret_cast<const T*>(rows.k[i + l]);
        x[l] = row ? row_words<P>(row, w, p.head_dim) : VecF{};
      }
      transpose(x);
      GK_UNROLL for (int l = 0; l < kLanes; ++l)  // rows past q_words lie in the rounding of k_t
          __builtin_memcpy(scratch.k_t + (w + l) * kStepKeys + i, &x[l], sizeof x[l]);
    }
  }
}

// V of the first `keys` of them: [key words][value_stride].
template <class P, class T>
bool pack_values(const PagedAttentionParams& p, const StepRows& rows, const StepRows& next, int64_t keys,
                 const PagedScratch<P>& scratch) {
  Finiteness<float> finite;
  typename P::Word* out = scratch.v.packed;
  for (int64_t i = 0; i < round_up(keys, kKeyGroup); i += P::kPerWord, out += scratch.v.stride) {
    for (int h = 0; h < P::kPerWord; ++h) prefetch_row(next.v[i + h], p.value_dim * int64_t(sizeof(T)));
    const T *row = reinterpret_cast<const T*>(rows.v[i]),
            *after = P::kPerWord == 2 ? reinterpret_cast<const T*>(rows.v[i + 1]) : nullptr;
    for (int64_t d = 0; d < scratch.value_stride; d += kLanes) {
      const VecF x = row && d < p.value_dim ? row_values(row, d, p.value_dim) : VecF{};
      finite.see(x);
      if constexpr (P::kPerWord == 1) {
        __builtin_memcpy(out + d, &x, sizeof x);
      } else {
        const VecF y = after && d < p.value_dim ? row_values(after, d, p.value_dim) : VecF{};
        finite.see(y);
        const VecU words = (bit_cast<VecU>(x) >> 16) | (bit_cast<VecU>(y) & 0xffff0000);  // exact: they are bf16
        __builtin_memcpy(out + d, &words, sizeof words);
      }
    }
  }
  return finite.all_finite();
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
