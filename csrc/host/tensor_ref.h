// A tensor as the hosts see it: where its elements lie, and nothing of who owns it. Made from what the dispatcher hands
// over or, in a direct call (direct_call.h), from the Python object itself.
#pragma once
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <span>

namespace genai_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class TensorRef {
 public:
  TensorRef(const Tensor& t) : TensorRef(t, const_cast<void*>(t.const_data_ptr())) {}
  // On the CPU.
  TensorRef(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType type)
      : data_(data), sizes_(sizes, size_t(dim)), strides_(strides, size_t(dim)), type_(type) {}

  int64_t dim() const { return int64_t(sizes_.size()); }
  std::span<const int64_t> sizes() const { return sizes_; }
  std::span<const int64_t> strides() const { return strides_; }
  int64_t size(int64_t d) const { return sizes_[size_t(d)]; }
  int64_t stride(int64_t d) const { return strides_[size_t(d)]; }
  torch::stable::Device device() const { return device_; }
  ScalarType scalar_type() const { return type_; }
  void* data() const { return data_; }
  template <class T>
  const T* data_as() const {
    return static_cast<const T*>(data_);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes_) n *= size;
    return n;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (size(d) != 1 && stride(d) != step) return numel() == 0;
      step *= size(d);
    }
    return true;
  }

 protected:
  TensorRef(const Tensor& t, void* data)
      : data_(data),
        sizes_(t.sizes().data(), t.sizes().size()),
        strides_(t.strides().data(), t.strides().size()),
        type_(t.scalar_type()),
        device_(t.device()) {}

 private:
  void* data_;
  std::span<const int64_t> sizes_, strides_;
  ScalarType type_;
  torch::stable::Device device_{torch::headeronly::DeviceType::CPU};
};

using OptionalTensor = std::optional<TensorRef>;

// A tensor of the caller's that is written: a lazy copy is made real first.
class Output : public TensorRef {
 public:
  Output(const Tensor& t) : TensorRef(t, t.mutable_data_ptr()) {}
  explicit Output(const TensorRef& t) : TensorRef(t) {}
};

}  // namespace genai_kernels
