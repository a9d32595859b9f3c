// `import genai_kernels._C` loads this library, and loading it runs the static registrations of csrc/ops. The module holds
// the direct calls (host/direct_call.h). The limited API keeps the binary independent of the Python version.
#include <Python.h>

#include "host/direct_call.h"

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) genai_kernels::direct::add_functions(module);
  return module;
}
