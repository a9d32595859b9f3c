// What the binding takes from Python and gives back: token lists in, buffers out.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "runtime/block_key.h"

namespace genai_kernels::runtime {

namespace py = pybind11;

template <class... Parts>
[[noreturn]] void raise(PyObject* type, const Parts&... parts) {
  PyErr_SetString(type, ("genai_kernels.BlockAllocator." + ... + std::string(parts)).c_str());
  throw py::error_already_set();
}

// The integers of a list, a tuple, an int32 or int64 buffer, or any other sequence, from `least` to `most`.
template <class Integer>
std::vector<Integer> read_integers(py::handle from, const char* op, const char* name, int64_t least, int64_t most) {
  const auto where = [&](size_t i) { return std::string(op) + ": " + name + "[" + std::to_string(i) + "]: "; };
  std::vector<Integer> to;
  const auto add = [&](int64_t value) {
    if (value < least || value > most) {
      raise(PyExc_ValueError, where(to.size()), "expected ", std::to_string(least),
            " <= value <= ", std::to_string(most), ", got ", std::to_string(value));
    }
    to.push_back(Integer(value));
  };
  if (PyUnicode_Check(from.ptr()) || PyBytes_Check(from.ptr())) {
    raise(PyExc_TypeError, op, ": ", name, ": expected integers, got ", Py_TYPE(from.ptr())->tp_name);
  }
  if (PyObject_CheckBuffer(from.ptr())) {
    Py_buffer view;
    if (PyObject_GetBuffer(from.ptr(), &view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)) throw py::error_already_set();
    const struct Release {
      Py_buffer* view;
      ~Release() { PyBuffer_Release(view); }
    } release{&view};
    const char format = view.format && view.format[0] && !view.format[1] ? view.format[0] : 0;
    const bool integers = format && std::strchr("ilq", format) && (view.itemsize == 4 || view.itemsize == 8);
    if (!integers || view.ndim != 1) {
      raise(PyExc_TypeError, op, ": ", name, ": expected a list or a 1-d buffer of int32 or int64, got ",
            std::to_string(view.ndim), "-d of format ", view.format ? view.format : "none");
    }
    to.reserve(view.shape[0]);
    for (Py_ssize_t i = 0; i < view.shape[0]; ++i) {
      const char* at = static_cast<const char*>(view.buf) + i * view.itemsize;
      int32_t narrow;
      int64_t wide;
      view.itemsize == 4 ? std::memcpy(&narrow, at, 4) : std::memcpy(&wide, at, 8);
      add(view.itemsize == 4 ? narrow : wide);
    }
    return to;
  }
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(from.ptr(), "not a sequence"));
  if (!items) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    raise(PyExc_TypeError, op, ": ", name, ": expected a sequence of integers, got ", Py_TYPE(from.ptr())->tp_name);
  }
  // An item's __index__ may change the list: its size is asked for again each time, and the item is held.
  to.reserve(PySequence_Fast_GET_SIZE(items.ptr()));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i));
    const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
    if (!index) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
      PyErr_Clear();
      raise(PyExc_TypeError, where(i), "expected an integer, got ", Py_TYPE(item.ptr())->tp_name);
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow) {
      raise(PyExc_ValueError, where(i), "expected ", std::to_string(least), " <= value <= ", std::to_string(most),
            ", got a number beyond 64 bits");
    }
    add(value);
  }
  return to;
}

constexpr int64_t kAny = INT64_MAX;

inline std::vector<Token> read_tokens(py::handle from, const char* op, const char* name) {
  return read_integers<Token>(from, op, name, 0, INT32_MAX);
}
inline std::vector<int64_t> read_ids(py::handle from, const char* op, const char* name) {
  return read_integers<int64_t>(from, op, name, -kAny - 1, kAny);
}

// A writable memoryview of the right format, and of two dimensions where `width` is given.
template <class Integer>
py::object to_buffer(const std::vector<Integer>& values, int64_t rows = -1, int64_t width = -1) {
  const auto bytes = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(
      reinterpret_cast<const char*>(values.data()), Py_ssize_t(values.size() * sizeof(Integer))));
  if (!bytes) throw py::error_already_set();
  const auto plain = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(bytes.ptr()));
  if (!plain) throw py::error_already_set();
  const char* format = sizeof(Integer) == 4 ? "i" : "q";
  // memoryview has no shape with a zero in it
  return rows > 0 && width > 0 ? plain.attr("cast")(format, py::make_tuple(rows, width)) : plain.attr("cast")(format);
}

}  // namespace genai_kernels::runtime
