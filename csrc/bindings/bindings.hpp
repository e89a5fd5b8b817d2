// Shared by the binding files: they unpack addresses, release the GIL, call the C++ API.
//
// Tensors cross as raw addresses with sizes and strides in elements; cospadi.native has checked
// dtype, device and layout before.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cospadi/matrix.hpp"

namespace cospadi::bindings {

namespace py = pybind11;

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

void bind_cuda(py::module_& m);
void bind_cuda_fit(py::module_& m);
void bind_dictionary(py::module_& m);
void bind_gemm(py::module_& m);
void bind_linear(py::module_& m);
void bind_omp(py::module_& m);
void bind_packed(py::module_& m);
void bind_round_code(py::module_& m);
void bind_select(py::module_& m);
void bind_sparse_gemm(py::module_& m);

}  // namespace cospadi::bindings
