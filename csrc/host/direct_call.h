// Two doors to one host function. Written once, as
//
//     Tensor host(const TensorRef& x, const OptionalTensor& weight, double eps)
//
// and registered by GK_OP(name, host, "schema"), it is the op `genai_kernels::<name>` of the dispatcher, and the Python
// function `genai_kernels._C.<name>`, which takes the same arguments and costs a third: no schema, no boxing, no keys. A
// direct call returns NotImplemented, and has done nothing, wherever the dispatcher has something to add: gradients,
// tensor subclasses, modes, transforms, tracing, profiling, other devices. The caller then goes through torch.ops.
#pragma once
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "host/tensor_ref.h"

namespace genai_kernels {

// How a parameter of a host function arrives from the dispatcher.
template <class Parameter>
struct Boxed {
  using Type = Parameter;
};
template <>
struct Boxed<const TensorRef&> {
  using Type = Tensor;
};
template <>
struct Boxed<const Output&> {
  using Type = Tensor;
};
template <>
struct Boxed<const OptionalTensor&> {
  using Type = std::optional<Tensor>;
};
template <>
struct Boxed<const std::vector<Tensor>&> {
  using Type = std::vector<Tensor>;
};

template <auto host>
struct Dispatched;
template <class Result, class... Parameters, Result (*host)(Parameters...)>
struct Dispatched<host> {
  static Result call(typename Boxed<Parameters>::Type... given) {
    return host(static_cast<const std::remove_cvref_t<Parameters>&>(view(given))...);
  }
  template <class T>
  static const T& view(const T& given) {
    return given;
  }
  // An optional holds a view, not the tensor.
  static OptionalTensor view(const std::optional<Tensor>& given) {
    return given ? OptionalTensor(TensorRef(*given)) : std::nullopt;
  }
};
#define GK_DISPATCHED(host) TORCH_BOX(&(::genai_kernels::Dispatched<&host>::call))

namespace direct {

// True if a call may go past the dispatcher as far as the state of this thread is concerned.
bool thread_is_plain();
// `object` as a CPU tensor without anything that only the dispatcher knows; false if it is not one.
bool view_tensor(PyObject* object, OptionalTensor& to);
bool read_number(PyObject* object, double& to);
bool read_number(PyObject* object, int64_t& to);
bool read_number(PyObject* object, bool& to);
PyObject* to_python(const Tensor& t);
PyObject* to_python(const Tensor* const* tensors, Py_ssize_t count);  // as a list
// Sets the Python exception for the C++ exception in flight. Returns null.
PyObject* raise_current();

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

template <class Parameter>
struct Argument {
  Parameter value{};
  bool read(PyObject* object) { return read_number(object, value); }
  Parameter get() const { return value; }
};
template <class Number>
struct Argument<std::optional<Number>> {
  std::optional<Number> value;
  bool read(PyObject* object) { return object == Py_None || read_number(object, value.emplace()); }
  std::optional<Number> get() const { return value; }
};
template <>
struct Argument<const OptionalTensor&> {
  OptionalTensor value;
  bool read(PyObject* object) { return object == Py_None || view_tensor(object, value); }
  const OptionalTensor& get() const { return value; }
};
template <>
struct Argument<const TensorRef&> {
  OptionalTensor value;
  bool read(PyObject* object) { return view_tensor(object, value); }
  const TensorRef& get() const { return *value; }
};
template <>
struct Argument<const std::vector<Tensor>&> {
  std::vector<Tensor> value;
  bool read(PyObject*) { return false; }  // a list goes through the dispatcher
  const std::vector<Tensor>& get() const { return value; }
};
template <>
struct Argument<const Output&> : Argument<const TensorRef&> {
  Output get() const { return Output(*value); }
};

// As a tuple.
template <class... Tensors>
PyObject* to_python(const std::tuple<Tensors...>& results) {
  const auto list = std::apply(
      [](const auto&... t) {
        const Tensor* pointers[] = {&t...};
        return to_python(pointers, sizeof...(t));
      },
      results);
  PyObject* tuple = list ? PyList_AsTuple(list) : nullptr;
  Py_XDECREF(list);
  return tuple;
}

template <auto host>
struct Call;
template <class Result, class... Parameters, Result (*host)(Parameters...)>
struct Call<host> {
  static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return with_arguments(given, count, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... I>
  static PyObject* with_arguments(PyObject* const* given, Py_ssize_t count, std::index_sequence<I...>) {
    std::tuple<Argument<Parameters>...> arguments;
    if (count != sizeof...(Parameters) || !thread_is_plain() || !(std::get<I>(arguments).read(given[I]) && ...)) {
      PyErr_Clear();
      Py_INCREF(Py_NotImplemented);
      return Py_NotImplemented;
    }
    try {
      const auto run = [&] {
        const WithoutGil released;
        return host(std::get<I>(arguments).get()...);
      };
      if constexpr (std::is_void_v<Result>) {
        run();
        Py_INCREF(Py_None);
        return Py_None;
      } else {
        return to_python(run());
      }
    } catch (...) {
      return raise_current();
    }
  }
};

// A function of the module _C. Definitions are chained before `main`, and added when the module is made.
struct Function {
  using Pointer = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
  PyMethodDef definition;
  Function* next;
  static Function* first;

  Function(const char* name, Pointer call)
      : definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr},
        next(first) {
    first = this;
  }
};
#define GK_DIRECT(name, host) \
  static ::genai_kernels::direct::Function direct_##name(#name, ::genai_kernels::direct::Call<&host>::call);

// `schema` without the name. With CUDA in the build the same host function serves the CUDA tensors of
// `genai_kernels_cuda::<name>`, which genai_kernels/backends.py chooses, or does not, for a call of the first.
#define GK_OP(name, host, schema) \
  GK_CPU_OP(name, host, schema)   \
  GK_CUDA_OP(name, host, schema)
// The same for an op without CUDA C++ kernels.
#define GK_CPU_OP(name, host, schema)                                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels, m) { m.def(#name schema); }                 \
  STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CPU, m) { m.impl(#name, GK_DISPATCHED(host)); } \
  GK_DIRECT(name, host)
#ifdef GENAI_KERNELS_CUDA
#define GK_CUDA_OP(name, host, schema)                                          \
  STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels_cuda, m) { m.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(genai_kernels_cuda, CUDA, m) { m.impl(#name, GK_DISPATCHED(host)); }
#else
#define GK_CUDA_OP(name, host, schema)
#endif

// Adds the functions to _C, unless this torch lacks what they need.
void add_functions(PyObject* module);

}  // namespace direct
}  // namespace genai_kernels
