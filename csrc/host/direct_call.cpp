// What a direct call needs of Python and torch: DLPack's C exchange to look into a tensor, and torch's own functions that
// say what is going on in this thread.
#include "host/direct_call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

namespace genai_kernels::direct {
namespace {

// The part of DLPack 1's binary interface that is used here (dmlc.github.io/dlpack), as torch publishes it in the capsule
// torch.Tensor.__dlpack_c_exchange_api__: how to look into a tensor that stays Python's.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;  // 1: CPU
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void* unused[3];  // allocation, and exchange with ownership
  int (*view)(void* python_object, DlTensor* out);
  void* stream;
};

// Filled once, when the module is made, and never given back.
struct Torch {
  const DlExchange* exchange = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr;  // the types
  // Called without arguments; 0, False or None where nothing is going on.
  PyObject* states[4] = {};
  PyObject *forward_ad = nullptr, *level = nullptr, *requires_grad = nullptr, *is_neg = nullptr, *steal = nullptr;
} torch_;

// The attribute at the end of a path of names, or null with an exception set.
PyObject* find(PyObject* from, std::initializer_list<const char*> names) {
  Py_XINCREF(from);
  for (const char* name : names) {
    PyObject* next = from ? PyObject_GetAttrString(from, name) : nullptr;
    Py_XDECREF(from);
    from = next;
  }
  return from;
}

bool prepare() {
  PyObject *torch = PyImport_ImportModule("torch"), *forward_ad = PyImport_ImportModule("torch.autograd.forward_ad");
  if (!torch || !forward_ad) return false;
  PyObject* capsule = find(torch, {"Tensor", "__dlpack_c_exchange_api__"});
  if (!capsule) return false;
  torch_.exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!torch_.exchange || torch_.exchange->major != 1) return false;
  torch_.tensor = find(torch, {"Tensor"});
  torch_.parameter = find(torch, {"nn", "Parameter"});
  torch_.states[0] = find(torch, {"_C", "_len_torch_dispatch_stack"});
  torch_.states[1] = find(torch, {"_C", "_len_torch_function_stack"});
  torch_.states[2] = find(torch, {"_C", "_autograd", "_profiler_enabled"});
  torch_.states[3] = find(torch, {"_C", "_get_tracing_state"});
  torch_.forward_ad = forward_ad;
  torch_.level = PyUnicode_InternFromString("_current_level");
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_.is_neg = PyUnicode_InternFromString("is_neg");
  torch_.steal = find(torch, {"_C", "_aoti", "alloc_tensors_by_stealing_from_void_ptrs"});
  for (PyObject* state : torch_.states)
    if (!state) return false;
  return torch_.tensor && torch_.parameter && torch_.steal && PyObject_HasAttr(forward_ad, torch_.level);
}

// True if `object`, a new reference or null, is false to Python. Takes the reference.
bool is_false(PyObject* object) {
  const bool found = object && PyObject_IsTrue(object) == 0;
  Py_XDECREF(object);
  return found;
}

std::optional<ScalarType> scalar_type(const DlTensor& t) {
  constexpr int kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kBool = 6;
  if (t.type_lanes != 1) return std::nullopt;
  switch (t.type_code * 256 + t.type_bits) {
    case kFloat * 256 + 32:
      return ScalarType::Float;
    case kFloat * 256 + 64:
      return ScalarType::Double;
    case kFloat * 256 + 16:
      return ScalarType::Half;
    case kBfloat * 256 + 16:
      return ScalarType::BFloat16;
    case kInt * 256 + 32:
      return ScalarType::Int;
    case kInt * 256 + 8:
      return ScalarType::Char;
    case kUint * 256 + 8:
      return ScalarType::Byte;
    case kInt * 256 + 64:
      return ScalarType::Long;
    case kBool * 256 + 8:
      return ScalarType::Bool;
    default:
      return std::nullopt;
  }
}

// A lazy negation (the imaginary part of a conjugated tensor) has the strides of a view of complex numbers.
bool may_be_negated(const DlTensor& t) {
  for (int32_t d = 0; d < t.ndim; ++d)
    if (t.shape[d] > 1 && t.strides[d] == 1) return false;
  return true;
}

PyObject* thread_is_plain_to_python(PyObject*, PyObject* const*, Py_ssize_t) {
  return PyBool_FromLong(thread_is_plain());
}
Function thread_is_plain_function("thread_is_plain", thread_is_plain_to_python);

}  // namespace

constinit Function* Function::first = nullptr;

bool thread_is_plain() {
  for (PyObject* state : torch_.states)
    if (!is_false(PyObject_CallNoArgs(state))) return false;
  PyObject* level = PyObject_GetAttr(torch_.forward_ad, torch_.level);
  const bool plain = level && PyLong_AsLong(level) < 0;
  Py_XDECREF(level);
  return plain;
}

bool view_tensor(PyObject* object, OptionalTensor& to) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch_.tensor && type != torch_.parameter) return false;
  if (aoti_torch_grad_mode_is_enabled() && !is_false(PyObject_GetAttr(object, torch_.requires_grad))) return false;
  DlTensor t;
  if (torch_.exchange->view(object, &t) != 0) return false;
  const auto dtype = scalar_type(t);
  if (!dtype || t.device_type != 1) return false;
  if (may_be_negated(t) && !is_false(PyObject_CallMethodObjArgs(object, torch_.is_neg, nullptr))) return false;
  to.emplace(static_cast<char*>(t.data) + t.byte_offset, int64_t(t.ndim), t.shape, t.strides, *dtype);
  return t.data || to->numel() == 0;  // without data: a lazy zero, or a transform's
}

bool read_number(PyObject* object, double& to) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
  to = PyFloat_AsDouble(object);
  return !PyErr_Occurred();
}
bool read_number(PyObject* object, int64_t& to) {
  if (!PyLong_Check(object)) return false;
  to = PyLong_AsLongLong(object);
  return !PyErr_Occurred();
}
bool read_number(PyObject* object, bool& to) {
  to = object == Py_True;
  return object == Py_True || object == Py_False;
}

// torch's function for one tensor, without the plural, leaks a reference to it (2.13).
PyObject* to_python(const Tensor* const* tensors, Py_ssize_t count) {
  PyObject* capsules = PyList_New(count);
  for (Py_ssize_t i = 0; capsules && i < count; ++i) {
    AtenTensorHandle handle = nullptr;
    PyObject* capsule = nullptr;
    if (aoti_torch_new_tensor_handle(tensors[i]->get(), &handle) == AOTI_TORCH_SUCCESS)
      capsule = PyCapsule_New(handle, nullptr, nullptr);
    else
      PyErr_SetString(PyExc_RuntimeError, "genai_kernels: torch did not hand out a tensor");
    if (!capsule) {
      Py_CLEAR(capsules);
      break;
    }
    PyList_SetItem(capsules, i, capsule);
  }
  PyObject* list = capsules ? PyObject_CallFunctionObjArgs(torch_.steal, capsules, nullptr) : nullptr;
  Py_XDECREF(capsules);
  return list;
}

PyObject* to_python(const Tensor& t) {
  const Tensor* pointer = &t;
  PyObject* list = to_python(&pointer, 1);
  PyObject* tensor = list ? PyList_GetItem(list, 0) : nullptr;  // borrowed
  Py_XINCREF(tensor);
  Py_XDECREF(list);
  return tensor;
}

PyObject* raise_current() {
  const auto set = [](PyObject* kind, const char* text) { PyErr_SetString(kind, text); };
  try {
    throw;
  } catch (const std::invalid_argument& error) {
    set(PyExc_ValueError, error.what());
  } catch (const std::out_of_range& error) {
    set(PyExc_IndexError, error.what());
  } catch (const std::exception& error) {  // registry.py knows the kinds that std has no exception for
    set(PyExc_RuntimeError, error.what());
  } catch (...) {
    set(PyExc_RuntimeError, "genai_kernels: an unknown error");
  }
  return nullptr;
}

void add_functions(PyObject* module) {
  if (!prepare()) {
    PyErr_Clear();
    return;
  }
  for (Function* f = Function::first; f; f = f->next) {
    PyObject* function = PyCFunction_New(&f->definition, nullptr);
    if (!function || PyModule_AddObject(module, f->definition.ml_name, function) != 0) PyErr_Clear();
  }
}

}  // namespace genai_kernels::direct
