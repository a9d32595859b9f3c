// Runtime values to compile-time ones. Each calls `f` with a tag object whose type carries the value.
#pragma once
#include "core/dtype.h"

namespace genai_kernels {

template <class T>
struct TypeTag {
  using type = T;
};
template <class A, class B>
inline constexpr bool is_same = false;
template <class A>
inline constexpr bool is_same<A, A> = true;
template <bool B>
struct BoolTag {
  static constexpr bool value = B;
};
template <int N>
struct IntTag {
  static constexpr int value = N;
};

template <class F>
[[gnu::always_inline]] inline void switch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(TypeTag<float>{});
    case Dtype::f64:
      return f(TypeTag<double>{});
    case Dtype::bf16:
      return f(TypeTag<bf16>{});
    case Dtype::f16:
      return f(TypeTag<fp16>{});
  }
}

template <class F>
[[gnu::always_inline]] inline void switch_bool(bool value, F&& f) {
  if (value)
    f(BoolTag<true>{});
  else
    f(BoolTag<false>{});
}

}  // namespace genai_kernels
