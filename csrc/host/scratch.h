// Memory for one thread's work, aligned to a cache line pair so that two threads never share one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace genai_kernels {

// A thread keeps the last small piece that it gave back: a short call would spend more on malloc and on the pages that
// free returned to the system than on its work.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_((bytes + kAlign - 1) / kAlign * kAlign) {
    if (!bytes) return;
    if (kept().bytes_ >= bytes_) {
      std::swap(data_, kept().data_);
      bytes_ = std::exchange(kept().bytes_, 0);
      return;
    }
    data_.reset(std::aligned_alloc(kAlign, bytes_));
    if (!data_) throw std::bad_alloc();
  }
  Scratch(Scratch&&) = default;
  ~Scratch() {
    if (!data_ || this == &kept() || bytes_ > kMostKept || bytes_ <= kept().bytes_) return;
    std::swap(data_, kept().data_);
    std::swap(bytes_, kept().bytes_);
  }
  void* get() const { return data_.get(); }

 private:
  static constexpr int64_t kAlign = 128, kMostKept = 1 << 20;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static Scratch& kept() {
    static thread_local Scratch piece(0);
    return piece;
  }
  int64_t bytes_;
  std::unique_ptr<void, Free> data_;
};

}  // namespace genai_kernels
