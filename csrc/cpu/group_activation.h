// The activations that follow a norm over groups of channels. Included inside an instruction-set region after
// activations.h; include core/group_activation.h before the region.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

struct NoActivation {
  template <class V>
  GK_INLINE static V value(V z) {
    return z;
  }
  template <class V>
  GK_INLINE static V slope(V z) {
    return V{} + 1;
  }
};
struct Relu {
  template <class V>
  GK_INLINE static V value(V z) {
    return z < V{} ? V{} : z;  // NaN stays NaN
  }
  template <class V>
  GK_INLINE static V slope(V z) {
    return z <= V{} ? V{} : V{} + 1;
  }
};
template <class Gate>
struct Gated {
  template <class V>
  GK_INLINE static V value(V z) {
    return gate_value<Gate>(z);
  }
  template <class V>
  GK_INLINE static V slope(V z) {
    V value, slope;
    gate_value_and_slope<Gate>(z, value, slope);
    return slope;
  }
};

template <class F>
GK_INLINE void switch_activation(GroupActivation activation, F&& f) {
  switch (activation) {
    case GroupActivation::none:
      return f(TypeTag<NoActivation>{});
    case GroupActivation::silu:
      return f(TypeTag<Gated<Silu>>{});
    case GroupActivation::gelu:
      return f(TypeTag<Gated<GeluErf>>{});
    case GroupActivation::gelu_tanh:
      return f(TypeTag<Gated<GeluTanh>>{});
    case GroupActivation::relu:
      return f(TypeTag<Relu>{});
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
