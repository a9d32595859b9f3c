// The Python face of the block allocator: genai_kernels._runtime. genai_kernels/kv_cache documents it.
//
// The GIL is held throughout, except while many tokens are hashed. No thread waits for the GIL inside the allocator's
// mutex, so a thread that holds the GIL may wait for the mutex.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "runtime/block_allocator.h"
#include "runtime/errors.h"
#include "runtime/python_values.h"

namespace genai_kernels::runtime {
namespace {

using Allocator = BlockAllocator;

// Hashing so many tokens takes some 20 us; a turn of the GIL costs about one.
constexpr int64_t kManyTokens = 512;

template <class Function>
auto maybe_without_gil(int64_t tokens, Function run) {
  if (tokens < kManyTokens) return run();
  const py::gil_scoped_release released;
  return run();
}

std::shared_ptr<const Scope> make_scope(int64_t adapter_id, const py::bytes& salt) {
  const std::string_view text = salt;
  if (adapter_id == 0 && text.empty()) return nullptr;
  return std::make_shared<const Scope>(Scope{adapter_id, std::string(text)});
}

// Requests with what they point to.
struct Batch {
  std::vector<std::vector<Token>> tokens;
  std::vector<Request> requests;
  int64_t total = 0;

  Batch(const py::sequence& from, const char* op) {
    const size_t count = py::len(from);
    tokens.reserve(count);
    requests.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const py::object request = from[i];
      const std::string name = "requests[" + std::to_string(i) + "]";
      if (!py::hasattr(request, "tokens")) {
        raise(PyExc_TypeError, op, ": ", name, ": expected a Request, got ", Py_TYPE(request.ptr())->tp_name);
      }
      tokens.push_back(read_tokens(request.attr("tokens"), op, (name + ".tokens").c_str()));
      const py::object salt = request.attr("salt");
      if (!py::isinstance<py::bytes>(salt)) {
        raise(PyExc_TypeError, op, ": ", name, ".salt: expected bytes, got ", Py_TYPE(salt.ptr())->tp_name);
      }
      const auto adapter_id = read_ids(py::make_tuple(request.attr("adapter_id")), op, (name + ".adapter_id").c_str());
      requests.push_back({tokens.back(), make_scope(adapter_id[0], salt)});
      total += int64_t(tokens.back().size());
    }
  }
};

SequenceId allocate(Allocator& a, const py::object& tokens, int64_t adapter_id, const py::bytes& salt) {
  const auto read = read_tokens(tokens, "allocate", "tokens");
  const Request request{read, make_scope(adapter_id, salt)};
  SequenceId id = 0;
  maybe_without_gil(int64_t(read.size()), [&] { a.allocate({&request, 1}, &id); });
  return id;
}

std::vector<SequenceId> allocate_batch(Allocator& a, const py::sequence& requests) {
  const Batch batch(requests, "allocate_batch");
  std::vector<SequenceId> ids(batch.requests.size());
  maybe_without_gil(batch.total, [&] { a.allocate(batch.requests, ids.data()); });
  return ids;
}

bool can_allocate(Allocator& a, const py::object& tokens, int64_t adapter_id, const py::bytes& salt) {
  const auto read = read_tokens(tokens, "can_allocate", "tokens");
  const Request request{read, make_scope(adapter_id, salt)};
  return maybe_without_gil(int64_t(read.size()), [&] { return a.can_allocate({&request, 1}); });
}

bool can_allocate_batch(Allocator& a, const py::sequence& requests) {
  const Batch batch(requests, "can_allocate_batch");
  return maybe_without_gil(batch.total, [&] { return a.can_allocate(batch.requests); });
}

Copies append(Allocator& a, SequenceId id, const py::object& tokens) {
  const auto read = read_tokens(tokens, "append", "tokens");
  const Growth growth{id, read};
  return a.append({&growth, 1});
}

template <class A, class B>
void expect_as_many(const A& a, const B& b, const char* op, const char* name) {
  if (a.size() == b.size()) return;
  raise(PyExc_ValueError, op, ": ", name, ": expected one for each of ", std::to_string(a.size()), " seqs, got ",
        std::to_string(b.size()));
}

Copies append_batch(Allocator& a, const py::object& seqs, const py::sequence& tokens) {
  constexpr char kOp[] = "append_batch";
  const auto ids = read_ids(seqs, kOp, "seqs");
  expect_as_many(ids, tokens, kOp, "tokens");
  std::vector<std::vector<Token>> read(ids.size());
  std::vector<Growth> growths(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    read[i] = read_tokens(tokens[i], kOp, ("tokens[" + std::to_string(i) + "]").c_str());
    growths[i] = {ids[i], read[i]};
  }
  return a.append(growths);
}

bool can_append(Allocator& a, SequenceId id, int64_t num_tokens) { return a.can_append({&id, 1}, {&num_tokens, 1}); }

bool can_append_batch(Allocator& a, const py::object& seqs, const py::object& counts) {
  const auto ids = read_ids(seqs, "can_append_batch", "seqs");
  const auto read = read_ids(counts, "can_append_batch", "num_tokens");
  expect_as_many(ids, read, "can_append_batch", "num_tokens");
  return a.can_append(ids, read);
}

void commit(Allocator& a, SequenceId id, std::optional<int64_t> num_computed) {
  const auto c = a.counts(id, "commit");
  const int64_t upto = num_computed.value_or(c.num_tokens);
  maybe_without_gil(a.options().prefix_cache ? upto - c.num_computed : 0, [&] { a.commit(id, upto); });
}

std::vector<SequenceId> fork(Allocator& a, SequenceId id, int64_t n) {
  if (n < 1 || n > INT32_MAX) raise(PyExc_ValueError, "fork: n: expected n >= 1, got ", std::to_string(n));
  std::vector<SequenceId> children(n);
  a.fork(id, children);
  return children;
}

py::object slot_mapping(Allocator& a, SequenceId id, int64_t start, std::optional<int64_t> end) {
  const int64_t stop = end ? *end : a.counts(id, "slot_mapping").num_tokens;
  return to_buffer(a.slot_mapping({&id, 1}, {&start, 1}, {&stop, 1}));
}

py::object slot_mapping_batch(Allocator& a, const py::object& seqs, const py::object& starts, const py::object& ends) {
  constexpr char kOp[] = "slot_mapping_batch";
  const auto ids = read_ids(seqs, kOp, "seqs"), from = read_ids(starts, kOp, "starts"),
             to = read_ids(ends, kOp, "ends");
  expect_as_many(ids, from, kOp, "starts");
  expect_as_many(ids, to, kOp, "ends");
  return to_buffer(a.slot_mapping(ids, from, to));
}

std::vector<int64_t> read_lengths(const std::vector<SequenceId>& ids, const py::object& lengths, const char* op) {
  if (lengths.is_none()) return {};
  auto read = read_ids(lengths, op, "lengths");
  expect_as_many(ids, read, op, "lengths");
  return read;
}

py::tuple block_tables(Allocator& a, const py::object& seqs, const py::object& lengths, int64_t width) {
  const auto ids = read_ids(seqs, "block_tables", "seqs");
  if (width < 0 || width > INT32_MAX) {
    raise(PyExc_ValueError, "block_tables: width: expected width >= 0, got ", std::to_string(width));
  }
  const auto padded = a.block_tables(ids, read_lengths(ids, lengths, "block_tables"), width);
  return py::make_tuple(to_buffer(padded.tables, int64_t(ids.size()), padded.width), to_buffer(padded.seq_lens));
}

py::tuple csr(Allocator& a, const py::object& seqs, const py::object& lengths) {
  const auto ids = read_ids(seqs, "csr", "seqs");
  const auto csr = a.csr(ids, read_lengths(ids, lengths, "csr"));
  return py::make_tuple(to_buffer(csr.indptr), to_buffer(csr.indices), to_buffer(csr.last_page_len));
}

py::dict stats(Allocator& a) {
  const Stats s = a.stats();
  py::dict d;
  d["used"] = s.used, d["shared"] = s.shared, d["cached"] = s.cached, d["free"] = s.free, d["swapped"] = s.swapped;
  d["sequences"] = s.sequences, d["tokens"] = s.tokens, d["waste"] = s.waste;
  d["prefix_queries"] = s.prefix_queries, d["prefix_hits"] = s.prefix_hits;
  d["hash_collisions"] = s.hash_collisions, d["evictions"] = s.evictions, d["merged"] = s.merged;
  return d;
}

py::bytes to_bytes(const Digest& digest) { return {reinterpret_cast<const char*>(digest.data()), digest.size()}; }

py::bytes sha256(const py::bytes& data, size_t step) {
  const std::string_view text = data;
  Sha256 hash;
  for (size_t at = 0; at < text.size(); at += step) hash.update(text.data() + at, std::min(step, text.size() - at));
  return to_bytes(hash.finish());
}

py::bytes digest_of_block(const py::bytes& parent, const py::object& tokens, int64_t adapter_id,
                          const py::bytes& salt) {
  const std::string_view text = parent;
  Digest before;
  if (text.size() != before.size()) {
    raise(PyExc_ValueError, "block_digest: parent: expected 32 bytes, got ", std::to_string(text.size()));
  }
  std::memcpy(before.data(), text.data(), before.size());
  return to_bytes(block_digest(before, read_tokens(tokens, "block_digest", "tokens"),
                               Scope{adapter_id, std::string(std::string_view(salt))}));
}

void add_errors(py::module_& m) {
  // The base first: of several that fit, the one registered last is asked first.
  const auto& base = py::register_exception<BlockError>(m, "BlockError", PyExc_RuntimeError);
  py::register_exception<OutOfBlocksError>(m, "OutOfBlocksError", base);
  py::register_exception<UnknownSequenceError>(m, "UnknownSequenceError", base);
  py::register_exception<DoubleFreeError>(m, "DoubleFreeError", base);
  py::register_exception<SwappedOutError>(m, "SwappedOutError", base);
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "The block allocator of csrc/runtime; use genai_kernels.kv_cache.";
  add_errors(m);
  m.def("sha256", &sha256, py::arg("data"), py::arg("step") = size_t(1) << 20, "For tests: the own SHA-256.");
  m.def("block_digest", &digest_of_block, py::arg("parent"), py::arg("tokens"), py::arg("adapter_id") = 0,
        py::arg("salt") = py::bytes(), "For tests: the key of a block.");

  const auto adapter = py::arg("adapter_id") = 0;
  const auto salt = py::arg("salt") = py::bytes();
  const auto seq = py::arg("seq"), seqs = py::arg("seqs"), tokens = py::arg("tokens");
  const auto lengths = py::arg("lengths") = py::none();
  py::class_<Allocator>(m, "BlockAllocator")
      .def(py::init([](int64_t num_blocks, int64_t block_size, int64_t num_swap_blocks, std::optional<int64_t> window,
                       bool prefix_cache, int64_t hash_bits) {
             if (window && *window < 0)
               raise(PyExc_ValueError, "__init__: window: expected None or window >= 0, got ", std::to_string(*window));
             return std::make_unique<Allocator>(
                 Options{num_blocks, block_size, num_swap_blocks, window.value_or(-1), prefix_cache, hash_bits});
           }),
           py::arg("num_blocks"), py::arg("block_size"), py::kw_only(), py::arg("num_swap_blocks") = 0,
           py::arg("window") = py::none(), py::arg("prefix_cache") = true, py::arg("_hash_bits") = 256)
      .def("allocate", &allocate, tokens, py::kw_only(), adapter, salt, "A new sequence of these tokens: its id.")
      .def("allocate_batch", &allocate_batch, py::arg("requests"),
           "Sequences for all requests, or for none: their ids.")
      .def("can_allocate", &can_allocate, tokens, py::kw_only(), adapter, salt, "Whether allocate would succeed now.")
      .def("can_allocate_batch", &can_allocate_batch, py::arg("requests"), "Whether allocate_batch would succeed now.")
      .def("append", &append, seq, tokens, "Adds tokens; the (source, destination) blocks to copy before writing.")
      .def("append_batch", &append_batch, seqs, tokens, "append for several sequences, or for none.")
      .def("can_append", &can_append, seq, py::arg("num_tokens") = 1, "Whether append would succeed now.")
      .def("can_append_batch", &can_append_batch, seqs, py::arg("num_tokens"),
           "Whether append_batch would succeed now.")
      .def("commit", &commit, seq, py::arg("num_computed") = py::none(),
           "The first num_computed tokens (all by default) have their keys and values in the cache.")
      .def("truncate", &Allocator::truncate, seq, py::arg("num_tokens"), "Forgets the tokens from num_tokens on.")
      .def("fork", &fork, seq, py::arg("n") = 1, "The ids of n more sequences that share all blocks of this one.")
      .def("free", &Allocator::free, seq, "Ends a sequence; its published blocks stay cached.")
      .def("swap_out", &Allocator::swap_out, seq, "To the second pool; the (source, destination) blocks to copy.")
      .def("can_swap_out", &Allocator::can_swap_out, seq, "Whether swap_out would succeed now.")
      .def("swap_in", &Allocator::swap_in, seq, "Back to the first pool; the (source, destination) blocks to copy.")
      .def("can_swap_in", &Allocator::can_swap_in, seq, "Whether swap_in would succeed now.")
      .def(
          "num_tokens", [](Allocator& a, SequenceId s) { return a.counts(s, "num_tokens").num_tokens; }, seq,
          "Tokens of a sequence.")
      .def(
          "num_computed_tokens",
          [](Allocator& a, SequenceId s) { return a.counts(s, "num_computed_tokens").num_computed; }, seq,
          "How many of them have their keys and values in the cache.")
      .def(
          "num_cached_tokens", [](Allocator& a, SequenceId s) { return a.counts(s, "num_cached_tokens").num_cached; },
          seq, "How many of those it found there when it was made.")
      .def(
          "is_swapped_out", [](Allocator& a, SequenceId s) { return a.counts(s, "is_swapped_out").swapped; }, seq,
          "Whether it is in the second pool.")
      .def("slot_mapping", &slot_mapping, seq, py::arg("start") = 0, py::arg("end") = py::none(),
           "int64: block * block_size + offset of tokens [start, end).")
      .def("slot_mapping_batch", &slot_mapping_batch, seqs, py::arg("starts"), py::arg("ends"),
           "int64: the slot mappings of several sequences, one after the other.")
      .def(
          "block_table", [](Allocator& a, SequenceId s) { return to_buffer(a.block_table(s)); }, seq,
          "int32: the blocks of a sequence, -1 where they fell out of the window.")
      .def("block_tables", &block_tables, seqs, lengths, py::kw_only(), py::arg("width") = 0,
           "int32 [n, width] padded with -1, and int32 [n]: the tables of several sequences, and their lengths.")
      .def("csr", &csr, seqs, lengths, "int32 indptr [n + 1], indices, last_page_len [n] of several sequences.")
      .def("stats", &stats, "Counts of blocks, tokens and events.")
      .def("sequences", &Allocator::sequences, "The ids of all live sequences.")
      .def("drop_cached", &Allocator::drop_cached, "Forgets all blocks without a holder: how many there were.")
      .def_property_readonly("num_available_blocks", &Allocator::num_available, "Free and cached blocks.")
      .def_property_readonly("num_blocks", [](Allocator& a) { return a.options().num_blocks; })
      .def_property_readonly("block_size", [](Allocator& a) { return a.options().block_size; })
      .def_property_readonly("num_swap_blocks", [](Allocator& a) { return a.options().num_swap_blocks; })
      .def_property_readonly("prefix_cache", [](Allocator& a) { return a.options().prefix_cache; })
      .def_property_readonly("window",
                             [](Allocator& a) {
                               return a.options().window < 0 ? std::nullopt
                                                             : std::optional<int64_t>(a.options().window);
                             })
      .def("_check_invariants", &Allocator::check_invariants, "For tests: RuntimeError if anything is broken.")
      .def("_snapshot", [](Allocator& a) { return py::bytes(a.snapshot()); }, "For tests: the whole state.");
}

}  // namespace genai_kernels::runtime
