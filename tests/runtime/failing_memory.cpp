// The host's memory runs out at the k-th request of a call, for every k: the call must throw std::bad_alloc, leave the
// allocator as it was, and succeed when there is memory again, with the result that it has where nothing ever failed.
// A plain C++ program: it also shows that csrc/runtime needs nothing of Python.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <numeric>
#include <string>

#include "runtime/block_allocator.h"
#include "runtime/errors.h"

namespace {
long until_failure = -1;  // -1: never
long in_use = 0;          // blocks of memory
}  // namespace

void* operator new(size_t size) {
  if (until_failure == 0) throw std::bad_alloc();
  if (until_failure > 0) --until_failure;
  ++in_use;
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept {
  in_use -= p != nullptr;
  std::free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }

using namespace genai_kernels::runtime;

namespace {

int failures = 0, calls = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Runs `call` with memory that fails at its first, second, ... request, until it succeeds.
void with_failing_memory(BlockAllocator& a, const char* name, const std::function<void()>& call) {
  ++calls;
  for (long k = 0;; ++k) {
    const std::string before = a.snapshot();
    bool threw = false;
    until_failure = k;
    try {
      call();
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    until_failure = -1;
    a.check_invariants();
    if (!threw) break;
    ++failures;
    expect(a.snapshot() == before, std::string(name) + " changed something before it ran out of memory");
    expect(k < 1000, std::string(name) + " never succeeds");
  }
}

template <class Error>
void expect_error(BlockAllocator& a, const char* name, const std::function<void()>& call) {
  const std::string before = a.snapshot();
  bool threw = false;
  try {
    call();
  } catch (const Error&) {
    threw = true;
  }
  expect(threw, std::string(name) + " did not throw");
  expect(a.snapshot() == before, std::string(name) + " threw and changed something");
}

// One story with every operation; `run` carries each out, with failures or without. Returns the state at the end.
using Run = std::function<void(BlockAllocator&, const char*, const std::function<void()>&)>;
std::string story(const Options& options, const Run& run) {
  BlockAllocator a(options);
  std::vector<Token> prompt(11);
  std::iota(prompt.begin(), prompt.end(), 1);
  const auto scope = std::make_shared<const Scope>(Scope{7, std::string(40, 's')});
  SequenceId ids[3], children[5];
  const Request requests[3] = {{prompt, nullptr}, {prompt, scope}, {std::span(prompt).first(5), nullptr}};
  run(a, "allocate", [&] { a.allocate(requests, ids); });
  for (const SequenceId id : ids) run(a, "commit", [&] { a.commit(id, id == ids[2] ? 5 : 11); });
  run(a, "can_allocate", [&] { a.can_allocate(requests); });
  SequenceId again;
  run(a, "allocate again", [&] { a.allocate({requests, 1}, &again); });
  run(a, "fork", [&] { a.fork(ids[0], children); });
  const Growth growths[3] = {{ids[0], prompt}, {children[0], std::span(prompt).first(1)}, {children[1], prompt}};
  Copies copies;
  run(a, "append", [&] { copies = a.append(growths); });
  expect(copies.size() == (11 % options.block_size ? 3 : 0), "append: a copy for each that writes to a shared block");
  run(a, "swap_out", [&] { a.swap_out(children[1]); });
  run(a, "swap_out", [&] { a.swap_out(ids[1]); });
  run(a, "truncate", [&] { a.truncate(ids[0], 12); });
  const SequenceId listed[3] = {ids[0], children[0], again};
  run(a, "block_tables", [&] { a.block_tables(listed, {}, 0); });
  run(a, "csr", [&] { a.csr(listed, {}); });
  run(a, "stats", [&] { a.stats(); });
  run(a, "swap_in", [&] { a.swap_in(ids[1]); });
  run(a, "swap_in", [&] { a.swap_in(children[1]); });
  run(a, "free", [&] {
    if (children[4]) a.free(children[4]), children[4] = 0;
  });
  const std::string state = a.snapshot();

  // Blocks run out: the k-th block that a call wants is not there, for every k, as the pool fills up.
  std::vector<SequenceId> fillers;
  for (int k = 0; a.num_available() > 0; ++k) {
    std::vector<Token> much((a.num_available() + 1) * options.block_size, 9);
    const Request all[2] = {{std::span(prompt).first(1), nullptr}, {much, nullptr}};
    SequenceId none[2];
    expect(!a.can_allocate(all), "can_allocate promised too much");
    expect_error<OutOfBlocksError>(a, "allocate", [&] { a.allocate(all, none); });
    const Growth one_too_many[2] = {{ids[2], prompt}, {again, much}};
    expect_error<OutOfBlocksError>(a, "append", [&] { a.append(one_too_many); });
    const Token other[1] = {Token(100 + k)};
    fillers.emplace_back();
    const Request filler{other, nullptr};
    a.allocate({&filler, 1}, &fillers.back());
  }
  for (const SequenceId id : a.sequences()) a.free(id);
  a.drop_cached();
  a.check_invariants();
  const Stats end = a.stats();
  expect(end.free == options.num_blocks && end.swapped == 0 && end.sequences == 0, "blocks were lost");
  return state;
}

}  // namespace

int main() {
  const long at_start = in_use;
  for (const int64_t size : {1, 3, 4, 16}) {
    for (const int64_t window : {-1, 4}) {
      for (const bool prefix_cache : {true, false}) {
        const Options options{200, size, 64, window, prefix_cache, 256};
        // The tag in each id differs from one allocator to the next: states are compared without it.
        const auto without_ids = [](std::string s) {
          for (size_t at = 0; (at = s.find("sequence ", at)) != std::string::npos; ++at) {
            s.erase(at, s.find(" tokens", at) - at);
          }
          return s;
        };
        const std::string plain = story(options, [](auto&, auto*, const auto& call) { call(); });
        const std::string failing = story(options, with_failing_memory);
        expect(without_ids(plain) == without_ids(failing), "the story ends differently after failures");
      }
    }
  }
  for (long k = 0;; ++k) {  // the constructor
    until_failure = k;
    try {
      BlockAllocator a({64, 4, 16, -1, true, 256});
      until_failure = -1;
      break;
    } catch (const std::bad_alloc&) {
      until_failure = -1;
      ++failures;
    }
  }
  expect(in_use == at_start, "memory was lost");
  std::printf("%d failures of memory in %d calls: nothing changed, nothing lost\n", failures, calls);
}
