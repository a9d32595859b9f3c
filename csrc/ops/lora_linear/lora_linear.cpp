// Host of lora_linear and lora_linear_multi: schemas, checks, who has which adapter, and the products of both passes.
//
//     S = scaling drop(x) A'            [rows with the adapter][rank], float32 (float64 for float64)
//     y = x W' + S B' + bias            one product: the columns of S go on in the sums of x W'
//
//     dS = scaling dy B,   dx = dy W + mask (dS A),   dA = dS' drop(x),   dB = dy' S
//
// One adapter is the case of many in which every row has the first. What comes after the product is done on its sums: a
// factor for each column (DoRA), or the gate of a gated layer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "core/philox.h"
#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/matmul.h"
#include "host/quantized.h"

namespace genai_kernels {
namespace {

// S has zeros up to a multiple of this, which is what a product takes at once.
constexpr int64_t kRankStep = 16;

struct Adapter {
  TensorRef a, b;  // [rank][in], [columns][rank]
  double scaling;
  int64_t column_begin, column_end;
  std::string name;  // for messages: "" or "[i]"
  int64_t rank() const { return a.size(0); }
  int64_t stride() const { return (rank() + kRankStep - 1) / kRankStep * kRankStep; }
};

// The rows that have an adapter, and where their part of S begins, in elements.
struct Share {
  bool all;
  std::vector<int64_t> tokens;  // ascending; of no meaning where all have it
  int64_t count, s_begin;
  const int64_t* rows() const { return all ? nullptr : tokens.data(); }
};

struct Call {
  const char* op;
  Dtype dtype;
  LinearWeight weight;
  int64_t rows, in, out;
  std::vector<Adapter> adapters;
  std::vector<Share> shares;
  int64_t s_size = 0;
  std::optional<Dropout> dropout;
  Dtype compute() const { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
  const Dropout* drops() const { return dropout ? &*dropout : nullptr; }
};

Dtype adapter_dtype(const Call& c, const char* name, const TensorRef& t, const TensorRef& x) {
  const Dtype dtype = float_dtype(c.op, name, t);
  GK_CHECK_TYPE(t.scalar_type() == x.scalar_type() || (dtype == Dtype::f32 && c.dtype != Dtype::f64), c.op, name,
                ": expected the dtype of x, ", dtype_name(x.scalar_type()), c.dtype == Dtype::f64 ? "" : ", or float32",
                ", got ", dtype_name(t.scalar_type()));
  return dtype;
}

// The tensors of a weight, as the ops take them.
struct WeightTensors {
  const TensorRef& data;
  const OptionalTensor &scale, &zero, &code_scale;
  int64_t group_size;
};

Call checked(const char* op, const TensorRef& x, const WeightTensors& w, const OptionalTensor& rng_state,
             double dropout_p) {
  const Dtype dtype = float_dtype(op, "x", x);
  GK_CHECK_VALUE(x.dim() == 2, op, "x: expected [rows, in], got shape ", shape_of(x));
  const LinearWeight weight(op, w.data, w.scale, w.zero, w.code_scale, x.size(1), w.group_size);
  if (!weight.quantized) check_same_dtype(op, "weight", w.data, "x", x);
  GK_CHECK_VALUE(x.size(1) == weight.in, op, "x: expected a last dimension of ", weight.in,
                 " as weight has, got shape ", shape_of(x));
  Call c{op, dtype, weight, x.size(0), weight.in, weight.out, {}, {}, 0, {}};
  GK_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, op, "dropout_p: expected 0 <= p < 1, got ", dropout_p);
  if (dropout_p > 0) {
    GK_CHECK_VALUE(rng_state && rng_state->numel() == 1 && rng_state->scalar_type() == ScalarType::Long, op,
                   "rng_state: expected int64 [1], the seed, where dropout_p > 0");
    c.dropout = Dropout{uint64_t(*rng_state->data_as<int64_t>()), dropout_threshold(dropout_p), 1 / (1 - dropout_p)};
  }
  return c;
}

void add_adapter(Call& c, const TensorRef& x, const TensorRef& a, const TensorRef& b, double scaling, std::string name,
                 int64_t column_begin, int64_t column_end) {
  const std::string a_name = "lora_a" + name, b_name = "lora_b" + name;
  adapter_dtype(c, a_name.c_str(), a, x);
  adapter_dtype(c, b_name.c_str(), b, x);
  check_same_dtype(c.op, b_name.c_str(), b, a_name.c_str(), a);
  GK_CHECK_VALUE(a.dim() == 2 && a.size(1) == c.in, c.op, a_name, ": expected [rank, ", c.in, "], got shape ",
                 shape_of(a));
  GK_CHECK_VALUE(b.dim() == 2 && b.size(0) == column_end - column_begin && b.size(1) == a.size(0), c.op, b_name,
                 ": expected [", column_end - column_begin, ", ", a.size(0), "], out and the rank of ", a_name,
                 ", got shape ", shape_of(b));
  GK_CHECK_VALUE(std::isfinite(scaling), c.op, "scaling", name, ": expected a finite number, got ", scaling);
  c.adapters.push_back({a, b, scaling, column_begin, column_end, std::move(name)});
}

void place(Call& c) {
  for (size_t i = 0; i < c.adapters.size(); ++i) {
    c.shares[i].s_begin = c.s_size;
    c.s_size += c.shares[i].count * c.adapters[i].stride();
  }
}

// Which rows have which adapter: ids [rows, slots], -1 for none.
void share(Call& c, const TensorRef& ids) {
  GK_CHECK_TYPE(ids.scalar_type() == ScalarType::Int, c.op, "adapter_ids: expected int32, got ",
                dtype_name(ids.scalar_type()));
  GK_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == c.rows && ids.is_contiguous(), c.op, "adapter_ids: expected [",
                 c.rows, ", any], one row for each of x, got shape ", shape_of(ids));
  const int64_t slots = ids.size(1), count = int64_t(c.adapters.size());
  const int32_t* id = ids.data_as<int32_t>();
  c.shares.resize(c.adapters.size());
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t s = 0; s < slots; ++s) {
      const int32_t at = id[r * slots + s];
      GK_CHECK_INDEX(at >= -1 && at < count, c.op, "adapter_ids[", r, ", ", s, "]: expected -1 <= id < ", count,
                     ", got ", at);
      if (at < 0) continue;
      std::vector<int64_t>& tokens = c.shares[size_t(at)].tokens;
      GK_CHECK_VALUE(tokens.empty() || tokens.back() != r, c.op, "adapter_ids[", r, ", ", s,
                     "]: expected an adapter once for each row, got ", at, " again");
      tokens.push_back(r);
    }
  for (Share& s : c.shares) {
    s.count = int64_t(s.tokens.size());
    s.all = s.count == c.rows;
  }
  place(c);
}

void share_with_all(Call& c) {
  c.shares.push_back({true, {}, c.rows, 0});
  place(c);
}

void* part_of(const Call& c, size_t adapter, void* s) {
  return static_cast<char*>(s) + c.shares[adapter].s_begin * compute_bytes(c.dtype);
}

// Of every adapter scaling x A', the operands given by `of(adapter)`: S from x and A, and dS from dy and B'.
struct Shrunk {
  MatmulOperand rows, matrix;
  int64_t depth;
};
template <class Of>
void shrink(const Call& c, void* s, const Of& of) {
  std::memset(s, 0, size_t(c.s_size * compute_bytes(c.dtype)));
  std::vector<DotMatmulParams> products;
  for (size_t i = 0; i < c.adapters.size(); ++i) {
    const Shrunk shrunk = of(c.adapters[i]);
    DotMatmulParams p{};
    p.a = shrunk.rows;
    p.a.tokens = c.shares[i].rows();
    p.b = shrunk.matrix;
    p.rows = c.shares[i].count;
    p.columns = c.adapters[i].rank();
    p.depth = shrunk.depth;
    p.scale = c.adapters[i].scaling;
    p.out = part_of(c, i, s);
    p.out_dtype = c.compute();
    p.out_row = c.adapters[i].stride();
    products.push_back(p);
  }
  run_matmuls(std::span<const DotMatmulParams>(products));
}

// to[c][r] = from[r][c].
template <class Word>
void transpose(const Word* from, int64_t row, int64_t column, int64_t rows, int64_t columns, Word* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * row + c * column];
}

// B' of an adapter as an operand that lies along the contraction, which a product reads for every few rows of dy; in
// `room`, unless it does so already.
MatmulOperand along_columns(const Call& c, const TensorRef& b, std::vector<char>& room) {
  MatmulOperand m = operand(c.op, "lora_b", b, 1, 0);
  if (m.depth == 1 || b.numel() == 0) return m;
  const int64_t bytes = element_size(b.scalar_type()), rows = b.size(0), columns = b.size(1);
  room.resize(size_t(b.numel() * bytes));
  const auto run = [&](auto word) {
    using Word = decltype(word);
    transpose(static_cast<const Word*>(m.data), m.depth, m.outer, rows, columns, reinterpret_cast<Word*>(room.data()));
  };
  bytes == 2 ? run(uint16_t()) : bytes == 4 ? run(uint32_t()) : run(uint64_t());
  return {room.data(), m.dtype, rows, 1};
}

// Columns [begin, ...) of a matrix, as an operand whose rows it has along `outer`.
MatmulOperand columns_from(const Call& c, const TensorRef& t, int64_t begin, int outer, int depth) {
  MatmulOperand m = operand(c.op, "dy", t, outer, depth);
  m.data = static_cast<const char*>(m.data) + begin * t.stride(1) * element_size(t.scalar_type());
  return m;
}

// What is done with the sums of the product: a factor for each column, or a gate over two halves of the columns.
struct Epilogue {
  const OptionalTensor& column_scale;
  int64_t gate;  // of Gate; -1: none
  bool gate_last;
  bool keep_inner;
};

// y; S; and what an epilogue begins from, if it is kept.
using Forward = std::tuple<Tensor, Tensor, Tensor>;

Forward forward(const Call& c, const TensorRef& x, const OptionalTensor& bias, const Epilogue& epilogue) {
  DotMatmulParams p{};
  if (epilogue.gate >= 0) {
    GK_CHECK_VALUE(c.out % 2 == 0, c.op, "weight: expected [2 n, in], a gate and what it multiplies, got ", c.out,
                   " rows");
    p.parts = 2;
    p.gate = Gate(epilogue.gate);
    p.gate_part = epilogue.gate_last;
  }
  if (epilogue.column_scale) {
    const TensorRef& scale = *epilogue.column_scale;
    GK_CHECK_VALUE(scale.dim() == 1 && scale.size(0) == c.out, c.op, "magnitude: expected [", c.out, "], got shape ",
                   shape_of(scale));
    GK_CHECK_TYPE(float_dtype(c.op, "magnitude", scale) == c.compute(), c.op, "magnitude: expected ",
                  c.dtype == Dtype::f64 ? "float64" : "float32", ", got ", dtype_name(scale.scalar_type()));
    p.column_scale = {scale.data(), c.compute(), scale.stride(0), 0};
  }
  if (bias) {
    check_same_dtype(c.op, "bias", *bias, "x", x);
    GK_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == c.out, c.op, "bias: expected [", c.out, "], got shape ",
                   shape_of(*bias));
    p.bias = {bias->data(), c.dtype, bias->stride(0), 0};
  }
  p.columns = c.out / p.parts;
  Tensor y = new_empty(x, {c.rows, p.columns}, x.scalar_type());
  // as exact as the adapter's gradients are to be
  const TensorRef& like = epilogue.column_scale ? c.adapters[0].a : x;
  Tensor inner = new_empty(x, {epilogue.keep_inner ? c.rows : 0, c.out}, like.scalar_type());
  Tensor s = new_empty(x, {c.s_size}, c.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  void* s_data = s.mutable_data_ptr();
  shrink(c, s_data, [&](const Adapter& adapter) {
    Shrunk shrunk{operand(c.op, "x", x, 0, 1), operand(c.op, "lora_a", adapter.a, 0, 1), c.in};
    shrunk.rows.dropout = c.drops();
    return shrunk;
  });
  std::vector<AdapterB> second;
  for (const Adapter& adapter : c.adapters)
    second.push_back({adapter.b.data(), float_dtype(c.op, "lora_b", adapter.b), adapter.rank(), adapter.b.stride(0),
                      adapter.b.stride(1), adapter.column_begin, adapter.column_end});
  // by row, in the order of the adapters
  std::vector<int64_t> begin(c.adapters.empty() ? 1 : size_t(c.rows) + 1, 0);
  for (const Share& share : c.shares)
    for (int64_t i = 0; i < share.count; ++i) ++begin[size_t((share.all ? i : share.tokens[size_t(i)]) + 1)];
  for (size_t r = 1; r < begin.size(); ++r) begin[r] += begin[r - 1];
  std::vector<RowAdapter> of_rows(size_t(begin.back()));
  std::vector<int64_t> next(begin);
  for (size_t a = 0; a < c.adapters.size(); ++a)
    for (int64_t i = 0; i < c.shares[a].count; ++i) {
      const int64_t row = c.shares[a].all ? i : c.shares[a].tokens[size_t(i)];
      const void* part =
          static_cast<const char*>(part_of(c, a, s_data)) + i * c.adapters[a].stride() * compute_bytes(c.dtype);
      of_rows[size_t(next[size_t(row)]++)] = {part, &second[a]};
    }
  p.a = operand(c.op, "x", x, 0, 1);
  p.b = c.weight.operand(c.op);
  p.rows = c.rows;
  p.depth = c.in;
  p.adapters = of_rows.data();
  p.adapters_begin = of_rows.empty() ? nullptr : begin.data();
  p.scale = 1;
  p.out = y.mutable_data_ptr();
  p.out_dtype = c.dtype;
  p.out_row = p.columns;
  if (epilogue.keep_inner) p.inner = inner.mutable_data_ptr();
  p.inner_dtype = float_dtype(c.op, "inner", like);
  run_matmul(p);
  return {y, s, inner};
}

// dx, and one behind the other for each adapter dA [rank][in] and dB' [rank][columns], in the adapters' dtype.
using Backward = std::tuple<Tensor, Tensor>;

// With a factor for each column, `dy_base` is dy times that; lora_b has been multiplied by it.
Backward backward(const Call& c, const TensorRef& dy, const OptionalTensor& dy_base, const TensorRef& x,
                  const TensorRef& s, bool for_x, bool for_adapters) {
  check_same_dtype(c.op, "dy", dy, "x", x);
  GK_CHECK_VALUE(dy.dim() == 2 && dy.size(0) == c.rows && dy.size(1) == c.out, c.op, "dy: expected [", c.rows, ", ",
                 c.out, "], got shape ", shape_of(dy));
  GK_CHECK_VALUE(!dy_base || (dy_base->dim() == 2 && dy_base->size(0) == c.rows && dy_base->size(1) == c.out &&
                              dy_base->scalar_type() == dy.scalar_type()),
                 c.op, "dy_base: expected one like dy");
  GK_CHECK_VALUE(s.numel() == c.s_size && s.is_contiguous() && float_dtype(c.op, "s", s) == c.compute(), c.op,
                 "s: expected what forward returned, ", c.s_size, " elements, got shape ", shape_of(s));
  const ScalarType like = c.adapters.empty() ? x.scalar_type() : c.adapters[0].a.scalar_type();
  int64_t gradients = 0;
  for (const Adapter& adapter : c.adapters)
    gradients += for_adapters ? adapter.rank() * (c.in + adapter.column_end - adapter.column_begin) : 0;
  Tensor dx = new_empty(x, {for_x ? c.rows : 0, c.in}, x.scalar_type());
  Tensor found = new_empty(x, {gradients}, like);
  Tensor ds = new_empty(x, {c.s_size}, s.scalar_type());
  void* ds_data = ds.mutable_data_ptr();
  std::vector<std::vector<char>> room(c.adapters.size());
  shrink(c, ds_data, [&](const Adapter& adapter) {
    return Shrunk{columns_from(c, dy, adapter.column_begin, 0, 1),
                  along_columns(c, adapter.b, room[size_t(&adapter - c.adapters.data())]),
                  adapter.column_end - adapter.column_begin};
  });
  if (for_x) {
    std::vector<MatmulTerm> sum(1);
    sum[0].a = operand(c.op, "dy", dy_base ? *dy_base : dy, 0, 1);
    sum[0].b = c.weight.operand(c.op, true);
    sum[0].depth = c.out;
    for (size_t i = 0; i < c.adapters.size(); ++i) {
      const Adapter& adapter = c.adapters[i];
      if (c.shares[i].count == 0 || adapter.rank() == 0) continue;
      MatmulTerm term{};
      term.a = {part_of(c, i, ds_data), c.compute(), adapter.stride(), 1};
      term.b = operand(c.op, "lora_a", adapter.a, 1, 0);
      term.depth = adapter.rank();
      term.rows = c.shares[i].rows();
      term.row_count = c.shares[i].count;
      term.dropout = c.drops();
      sum.push_back(term);
    }
    run_matmul(MatmulParams{sum.data(), int64_t(sum.size()), c.rows, c.in, 1, dx.mutable_data_ptr(), c.dtype, c.in});
  }
  if (for_adapters) {
    std::vector<MatmulTerm> of(2 * c.adapters.size());
    std::vector<MatmulParams> products;
    char* to = static_cast<char*>(found.mutable_data_ptr());
    for (size_t i = 0; i < c.adapters.size(); ++i) {
      const Adapter& adapter = c.adapters[i];
      const Dtype dtype = float_dtype(c.op, "lora_a", adapter.a);
      MatmulTerm &da = of[2 * i], &db = of[2 * i + 1];
      da.a = {part_of(c, i, ds_data), c.compute(), 1, adapter.stride()};
      da.b = operand(c.op, "x", x, 1, 0);
      da.b.dropout = c.drops();
      db.a = {part_of(c, i, s.data()), c.compute(), 1, adapter.stride()};
      db.b = columns_from(c, dy, adapter.column_begin, 1, 0);
      for (MatmulTerm* term : {&da, &db}) {
        term->b.tokens = c.shares[i].rows();
        term->depth = c.shares[i].count;
        const int64_t columns = term == &da ? c.in : adapter.column_end - adapter.column_begin;
        products.push_back({term, 1, adapter.rank(), columns, 1, to, dtype, columns});
        to += adapter.rank() * columns * element_size(adapter.a.scalar_type());
      }
    }
    run_matmuls(std::span<const MatmulParams>(products));
  }
  return {dx, found};
}

// ---- a gated layer without adapters ----

constexpr const char* kGated[] = {"linear_swiglu", "linear_geglu", "linear_geglu_tanh"};  // in the order of Gate

const char* gated_name(int64_t gate) {
  GK_CHECK_VALUE(gate >= 0 && gate <= 2, "linear_swiglu", "gate: expected 0 to 2, got ", gate);
  return kGated[gate];
}

// y, and what goes into the gate, if it is to be kept.
std::tuple<Tensor, Tensor> gated_linear(const TensorRef& x, const TensorRef& weight, const OptionalTensor& bias,
                                        int64_t gate, bool gate_last, bool keep_inner,
                                        const OptionalTensor& weight_scale, const OptionalTensor& weight_zero,
                                        const OptionalTensor& weight_code_scale, int64_t group_size) {
  const WeightTensors w{weight, weight_scale, weight_zero, weight_code_scale, group_size};
  const Call c = checked(gated_name(gate), x, w, std::nullopt, 0);
  auto [y, s, inner] = forward(c, x, bias, {std::nullopt, gate, gate_last, keep_inner});
  return {y, inner};
}

// ---- one adapter for all rows ----

Call single(const char* op, const TensorRef& x, const WeightTensors& weight, const TensorRef& lora_a,
            const TensorRef& lora_b, const OptionalTensor& rng_state, double scaling, double dropout_p) {
  Call c = checked(op, x, weight, rng_state, dropout_p);
  add_adapter(c, x, lora_a, lora_b, scaling, "", 0, c.out);
  share_with_all(c);
  return c;
}

Forward lora_linear(const TensorRef& x, const TensorRef& weight, const TensorRef& lora_a, const TensorRef& lora_b,
                    const OptionalTensor& bias, const OptionalTensor& rng_state, double scaling, double dropout_p,
                    const OptionalTensor& column_scale, bool keep_inner, const OptionalTensor& weight_scale,
                    const OptionalTensor& weight_zero, const OptionalTensor& weight_code_scale, int64_t group_size) {
  const WeightTensors w{weight, weight_scale, weight_zero, weight_code_scale, group_size};
  const char* op = column_scale ? "dora_linear" : "lora_linear";
  const Call c = single(op, x, w, lora_a, lora_b, rng_state, scaling, dropout_p);
  return forward(c, x, bias, {column_scale, -1, false, keep_inner});
}

Backward lora_linear_bwd(const TensorRef& dy, const OptionalTensor& dy_base, const TensorRef& x,
                         const TensorRef& weight, const TensorRef& lora_a, const TensorRef& lora_b, const TensorRef& s,
                         const OptionalTensor& rng_state, double scaling, double dropout_p, bool for_x,
                         bool for_adapters, const OptionalTensor& weight_scale, const OptionalTensor& weight_zero,
                         const OptionalTensor& weight_code_scale, int64_t group_size) {
  const WeightTensors w{weight, weight_scale, weight_zero, weight_code_scale, group_size};
  return backward(single("lora_linear", x, w, lora_a, lora_b, rng_state, scaling, dropout_p), dy, dy_base, x, s, for_x,
                  for_adapters);
}

// ---- adapters by row ----

// `columns` int64 [adapters, 2]: which rows of weight an adapter adds to; `scalings` float64 [adapters].
Call multiple(const char* op, const TensorRef& x, const WeightTensors& weight, const std::vector<Tensor>& lora_a,
              const std::vector<Tensor>& lora_b, const TensorRef& scalings, const TensorRef& columns,
              const TensorRef& adapter_ids, const OptionalTensor& rng_state, double dropout_p) {
  Call c = checked(op, x, weight, rng_state, dropout_p);
  const int64_t count = int64_t(lora_a.size());
  GK_CHECK_VALUE(int64_t(lora_b.size()) == count && scalings.numel() == count && columns.numel() == 2 * count &&
                     scalings.scalar_type() == ScalarType::Double && columns.scalar_type() == ScalarType::Long &&
                     scalings.is_contiguous() && columns.is_contiguous(),
                 c.op, "adapters: expected as many of lora_b, scalings and columns as of lora_a, ", count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = columns.data_as<int64_t>()[2 * i], end = columns.data_as<int64_t>()[2 * i + 1];
    GK_CHECK_VALUE(0 <= begin && begin <= end && end <= c.out, c.op, "adapters[", i,
                   "].columns: expected 0 <= begin <= ", "end <= ", c.out, ", got ", begin, " and ", end);
    add_adapter(c, x, lora_a[size_t(i)], lora_b[size_t(i)], scalings.data_as<double>()[i],
                "[" + std::to_string(i) + "]", begin, end);
    check_same_dtype(c.op, ("lora_a[" + std::to_string(i) + "]").c_str(), c.adapters.back().a, "lora_a[0]",
                     c.adapters[0].a);
  }
  share(c, adapter_ids);
  return c;
}

Forward lora_linear_multi(const TensorRef& x, const TensorRef& weight, const std::vector<Tensor>& lora_a,
                          const std::vector<Tensor>& lora_b, const TensorRef& scalings, const TensorRef& columns,
                          const TensorRef& adapter_ids, const OptionalTensor& bias, const OptionalTensor& rng_state,
                          double dropout_p, int64_t gate, bool gate_last, bool keep_inner,
                          const OptionalTensor& weight_scale, const OptionalTensor& weight_zero,
                          const OptionalTensor& weight_code_scale, int64_t group_size) {
  const WeightTensors w{weight, weight_scale, weight_zero, weight_code_scale, group_size};
  const Call c = multiple(gate < 0 ? "lora_linear_multi" : gated_name(gate), x, w, lora_a, lora_b, scalings, columns,
                          adapter_ids, rng_state, dropout_p);
  return forward(c, x, bias, {std::nullopt, gate, gate_last, keep_inner});
}

Backward lora_linear_multi_bwd(const TensorRef& dy, const TensorRef& x, const TensorRef& weight,
                               const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
                               const TensorRef& scalings, const TensorRef& columns, const TensorRef& adapter_ids,
                               const TensorRef& s, const OptionalTensor& rng_state, double dropout_p, bool for_x,
                               bool for_adapters, const OptionalTensor& weight_scale, const OptionalTensor& weight_zero,
                               const OptionalTensor& weight_code_scale, int64_t group_size) {
  const WeightTensors w{weight, weight_scale, weight_zero, weight_code_scale, group_size};
  return backward(
      multiple("lora_linear_multi", x, w, lora_a, lora_b, scalings, columns, adapter_ids, rng_state, dropout_p), dy,
      std::nullopt, x, s, for_x, for_adapters);
}

}  // namespace
}  // namespace genai_kernels

// A quantized weight comes as its tensors, with weight_scale; else the four last arguments mean nothing.
GK_CPU_OP(gated_linear, genai_kernels::gated_linear,
          "(Tensor x, Tensor weight, Tensor? bias, int gate, bool gate_last, bool keep_inner, Tensor? weight_scale, "
          "Tensor? weight_zero, Tensor? weight_code_scale, int group_size) -> (Tensor, Tensor)")
GK_CPU_OP(lora_linear, genai_kernels::lora_linear,
          "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? rng_state, float scaling, "
          "float dropout_p, Tensor? column_scale, bool keep_inner, Tensor? weight_scale, Tensor? weight_zero, "
          "Tensor? weight_code_scale, int group_size) -> (Tensor, Tensor, Tensor)")
GK_CPU_OP(
    lora_linear_bwd, genai_kernels::lora_linear_bwd,
    "(Tensor dy, Tensor? dy_base, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor s, Tensor? rng_state, "
    "float scaling, float dropout_p, bool for_x, bool for_adapters, Tensor? weight_scale, Tensor? weight_zero, "
    "Tensor? weight_code_scale, int group_size) -> (Tensor, Tensor)")
GK_CPU_OP(lora_linear_multi, genai_kernels::lora_linear_multi,
          "(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor scalings, Tensor columns, "
          "Tensor adapter_ids, Tensor? bias, Tensor? rng_state, float dropout_p, int gate, bool gate_last, "
          "bool keep_inner, Tensor? weight_scale, Tensor? weight_zero, Tensor? weight_code_scale, int group_size) "
          "-> (Tensor, Tensor, Tensor)")
GK_CPU_OP(lora_linear_multi_bwd, genai_kernels::lora_linear_multi_bwd,
          "(Tensor dy, Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor scalings, Tensor columns, "
          "Tensor adapter_ids, Tensor s, Tensor? rng_state, float dropout_p, bool for_x, bool for_adapters, "
          "Tensor? weight_scale, Tensor? weight_zero, Tensor? weight_code_scale, int group_size) "
          "-> (Tensor, Tensor)")
