// What the allocator throws; after any of these its state is as before the call. Arguments that make no sense are
// std::invalid_argument, exhausted memory is std::bad_alloc.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace genai_kernels::runtime {

struct BlockError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OutOfBlocksError : BlockError {
  using BlockError::BlockError;
};
struct UnknownSequenceError : BlockError {
  using BlockError::BlockError;
};
struct DoubleFreeError : BlockError {
  using BlockError::BlockError;
};
struct SwappedOutError : BlockError {
  using BlockError::BlockError;
};

// genai_kernels.BlockAllocator.<op>: <argument>: expected ..., got ...
template <class Error, class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "genai_kernels.BlockAllocator" << (*op ? "." : "") << op << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace genai_kernels::runtime
