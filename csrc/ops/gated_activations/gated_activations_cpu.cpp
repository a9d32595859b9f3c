// y = act(gate) * up on the CPU, a row of x being [gate | up]: one text for the three activations.
//
//   backward: d gate = dy * up * act'(gate),   d up = dy * act(gate)
#include "cpu/region_headers.h"
#include "ops/gated_activations/gated_activations.h"

#define GENAI_KERNELS_ISA_FILE "ops/gated_activations/gated_activations_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/activations.h"
#include "cpu/staged_row.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class Activation, class T>
void forward_rows(const GatedActivationParams& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t n = p.y.length;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = read_row<T>(p.x, r, scratch);
    T* y = begin_row<T>(p.y, r, scratch + 2 * n);
    for_each_register<Compute<T>>(n, [&](int64_t i, auto part) {
      part.store_to(y + i, gate_value<Activation>(part.load_from(x + i)) * part.load_from(x + n + i));
    });
    finish_row<T>(p.y, r, y);
  }
}

template <class Activation, class T>
void backward_rows(const GatedActivationParams& p, int64_t begin, int64_t end, T* scratch) {
  using V = Vec<Compute<T>>;
  const int64_t n = p.dy.length;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = read_row<T>(p.x, r, scratch);
    const T* dy = read_row<T>(p.dy, r, scratch + 2 * n);
    T* dx = begin_row<T>(p.dx, r, scratch + 3 * n);
    for_each_register<Compute<T>>(n, [&](int64_t i, auto part) {
      const V d = part.load_from(dy + i), up = part.load_from(x + n + i);
      V value, slope;
      gate_value_and_slope<Activation>(part.load_from(x + i), value, slope);
      part.store_to(dx + i, d * up * slope);
      part.store_to(dx + n + i, d * value);
    });
    finish_row<T>(p.dx, r, dx);
  }
}

template <class F>
GK_INLINE void switch_gate(Gate gate, F&& f) {
  switch (gate) {
    case Gate::silu:
      return f(TypeTag<Silu>{});
    case Gate::gelu:
      return f(TypeTag<GeluErf>{});
    case Gate::gelu_tanh:
      return f(TypeTag<GeluTanh>{});
  }
}

}  // namespace

void gated_activation_fwd_kernel(const GatedActivationParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch_gate(p.gate, [&](auto gate) {
      forward_rows<typename decltype(gate)::type, T>(p, begin, end, static_cast<T*>(scratch));
    });
  });
}

void gated_activation_bwd_kernel(const GatedActivationParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch_gate(p.gate, [&](auto gate) {
      backward_rows<typename decltype(gate)::type, T>(p, begin, end, static_cast<T*>(scratch));
    });
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, gated_activation_fwd_kernel,
                           (const GatedActivationParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, gated_activation_bwd_kernel,
                           (const GatedActivationParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))

#endif
