// What an item of paged_attention works with: its rows and what each of them sees, the thread's scratch, and the keys and
// values of a step, where they lie or packed. Included inside an instruction-set region after vec.h, tile_gemm.h, transpose.h and
// attention_pack.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int kStepKeys = 128;  // as flash_attention's: the sums of a row are grouped by them
// Chains of a score, one for each word of the head dimension modulo this: 8 terms each for a head_dim of 128, which is as
// exact as PyTorch's product of one row with a matrix. A score's rounding is most of the error of a result.
constexpr int kSumLanes = 16;
// Words of a piece of a sum over keys: two chains of 4, for the same reason; 12 % more additions.
constexpr int64_t kPieceWords = 8;
template <class P>
constexpr int64_t kPieceKeys = kPieceWords * P::kPerWord;
constexpr int kFoldKeys = 64;          // whole pieces and tiles, whatever a word and a register hold
constexpr int64_t kPackedValues = 32;  // words of packed V at a time for all rows of a block: 16 KiB, a third of the L1
// Rows that are attended together: what the probabilities of a step are kept for. An item of no more reads K and V where
// they lie; one of more packs them first, which costs as much as the products of 12 rows or so.
constexpr int64_t kBlockRows = 16;
constexpr int kPackedKeys = 2 * kLanes;  // of a tile of packed keys; 4 rows times this are 8 chains of multiply-adds
// A row is asked for so many bytes before it is read. With as many cache lines on the way, rows scattered over pages are
// read as fast as memory that is read from end to end; a step ahead, they are not.
constexpr int64_t kAheadBytes = 4096;
constexpr int64_t kMostAhead = 32;

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
  int64_t q_words, q_stride, value_stride;  // q_words: whole chains of a score
  Row* rows;
  State *state, *total;
  Word *q, *k_t, *p_words;
  float *o, *total_o, *s, *products;
  char* zeros;  // a row of K or V that is not there
  int64_t zeros_bytes;
  Arena arena;
  Contracted<P> v;
  char* end;

  PagedScratch(const PagedAttentionParams& p, int64_t count, void* memory)
      : value_stride(row_stride<float>(p.value_dim)), arena(memory), v(arena, kStepKeys / P::kPerWord, value_stride) {
    q_words = round_up((p.head_dim + P::kPerWord - 1) / P::kPerWord, kSumLanes);
    q_stride = row_stride<float>(q_words);
    rows = arena.take<Row>(count);
    state = arena.take<State>(count);
    total = arena.take<State>(count);
    q = arena.take<Word>(count * q_stride);
    p_words = arena.take<Word>(kBlockRows * kStepKeys);
    s = arena.take<float>(kBlockRows * kStepKeys);
    products = arena.take<float>(kBlockRows * value_stride);
    o = arena.take<float>(count * value_stride);
    total_o = arena.take<float>(count * value_stride);
    zeros_bytes = max_of(p.head_dim, p.value_dim) * int64_t(sizeof(float));
    zeros = arena.take<char>(zeros_bytes);
    k_t = arena.take<Word>(count > kBlockRows ? q_words * kStepKeys : 0);
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
        const T* part = n > 0 ? contiguous(q + from * p.q_dim, p.q_dim, n, stage) : stage;
        const VecF words = n > 0 ? load_row_words<P>(part, 0, n) : VecF{};
        __builtin_memcpy(scratch.q + count * scratch.q_stride + w, &words, sizeof words);
      }
    }
  }
}

// ---- the keys of a step ----

// Where the rows of K and V of a step lie, for one key head, in the order in which they are read, and the first rows of
// the next step; zeros for keys that no row sees. The scales are int8's.
struct StepRows {
  const char* rows[2 * kStepKeys + kMostAhead];
  float k_scale[kStepKeys], v_scale[kStepKeys];
  const char** k() { return rows; }
  const char** v() { return rows + kStepKeys; }
  const char* const* k() const { return rows; }
  const char* const* v() const { return rows + kStepKeys; }
  const char** next() { return rows + 2 * kStepKeys; }
};

// The rows of keys [from, to) of the step at `key`, of elements of `size` bytes.
inline void find_rows(const PagedAttentionParams& p, const int32_t* pages, int64_t kv_head, int64_t key, int64_t from,
                      int64_t to, int64_t size, const char* zeros, StepRows& rows) {
  if (from > key || to < key + kStepKeys) {
    for (int64_t i = 0; i < 2 * kStepKeys; ++i) rows.rows[i] = zeros;
    for (int64_t i = 0; i < kStepKeys; ++i) rows.k_scale[i] = rows.v_scale[i] = 0;
  }
  for (int64_t at = from; at < to;) {  // a page at a time: a division for each key is dear
    const int64_t page = at / p.page_size, token = at - page * p.page_size, block = pages[page];
    const int64_t count = min_of(p.page_size - token, to - at);
    const char* k = p.k.data + (block * p.k.page + token * p.k.token + kv_head * p.k.head) * size;
    const char* v = p.v.data + (block * p.v.page + token * p.v.token + kv_head * p.v.head) * size;
    for (int64_t i = at - key; i < at - key + count; ++i, k += p.k.token * size, v += p.v.token * size)
      rows.k()[i] = k, rows.v()[i] = v;
    if (p.int8_cache) {
      const float* k_scale = p.k.scale + block * p.k.scale_page + token * p.k.scale_token + kv_head * p.k.scale_head;
      const float* v_scale = p.v.scale + block * p.v.scale_page + token * p.v.scale_token + kv_head * p.v.scale_head;
      for (int64_t i = 0; i < count; ++i) {
        rows.k_scale[at - key + i] = k_scale[i * p.k.scale_token];
        rows.v_scale[at - key + i] = v_scale[i * p.v.scale_token];
      }
    }
    at += count;
  }
}

// Asks for rows before they are read, one cache line at a time between the multiply-adds: the lines on their way are so
// few that a burst of them would hold up what follows. Nothing is read.
struct Ahead {
  int64_t count;  // rows
  explicit Ahead(int64_t row_bytes) : count(min_of(kMostAhead, kAheadBytes / row_bytes + 1)) {}
  // The line that begins `offset` bytes into the row that is read `count` rows after this one, if one does.
  GK_INLINE void ask(const char* const* row, int64_t offset) const {
    if (offset % 64 == 0) __builtin_prefetch(row[count] + offset);
  }
  void ask_row(const char* const* row, int64_t bytes) const {
    for (int64_t offset = 0; offset < bytes; offset += 64) ask(row, offset);
  }
};

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

// Two rows of V as words of pairs. Exact where they are bf16 or int8.
GK_INLINE VecU pair_words(VecF even, VecF odd) {
  return (bit_cast<VecU>(even) >> 16) | (bit_cast<VecU>(odd) & 0xffff0000);
}

// ---- packing, for many rows ----

// k_t[keys / kPackedKeys][words][kPackedKeys] = K^T of the first `keys` of a step, whole tiles.
template <class P, class T>
void pack_keys(const PagedAttentionParams& p, const StepRows& step, int64_t keys, const PagedScratch<P>& scratch) {
  const Ahead ahead(p.head_dim * int64_t(sizeof(T)));
  for (int64_t i = 0; i < keys; i += kLanes) {
    const char* const* rows = step.k() + i;
    for (int l = 0; l < kLanes; ++l) ahead.ask_row(rows + l, p.head_dim * int64_t(sizeof(T)));
    typename P::Word* to = scratch.k_t + i / kPackedKeys * kPackedKeys * scratch.q_words + i % kPackedKeys;
    for (int64_t w = 0; w < scratch.q_words; w += kLanes) {
      VecF x[kLanes];
      GK_UNROLL for (int l = 0; l < kLanes; ++l) x[l] =
          w * P::kPerWord < p.head_dim ? row_words<P>(reinterpret_cast<const T*>(rows[l]), w, p.head_dim) : VecF{};
      transpose(x);
      GK_UNROLL for (int l = 0; l < kLanes; ++l) __builtin_memcpy(to + (w + l) * kPackedKeys, &x[l], sizeof x[l]);
    }
  }
}

// V of the first `keys` of them: [key words][value_stride].
template <class P, class T>
void pack_values(const PagedAttentionParams& p, const StepRows& step, int64_t keys, const PagedScratch<P>& scratch) {
  const Ahead ahead(p.value_dim * int64_t(sizeof(T)));
  typename P::Word* out = scratch.v.packed;
  for (int64_t i = 0; i < keys; i += P::kPerWord, out += scratch.v.stride) {
    const char* const* rows = step.v() + i;
    for (int h = 0; h < P::kPerWord; ++h) ahead.ask_row(rows + h, p.value_dim * int64_t(sizeof(T)));
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      const VecF x = row_values(reinterpret_cast<const T*>(rows[0]), d, p.value_dim);
      if constexpr (P::kPerWord == 1) {
        __builtin_memcpy(out + d, &x, sizeof x);
      } else {
        const VecU words = pair_words(x, row_values(reinterpret_cast<const T*>(rows[1]), d, p.value_dim));
        __builtin_memcpy(out + d, &words, sizeof words);
      }
    }
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
