// An empty Python module: `import genai_kernels._C` loads this library, and loading it runs the static registrations of
// csrc/ops. The limited API keeps the binary independent of the Python version.
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
