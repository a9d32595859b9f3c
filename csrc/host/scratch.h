// Memory for one thread's work, aligned to a cache line pair so that two threads never share one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace genai_kernels {

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(bytes ? std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign) : nullptr) {
    if (bytes && !data_) throw std::bad_alloc();
  }
  void* get() const { return data_.get(); }

 private:
  static constexpr int64_t kAlign = 128;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

}  // namespace genai_kernels
