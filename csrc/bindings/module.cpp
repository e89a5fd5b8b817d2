#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "bindings/bindings.hpp"
#include "cospadi/runtime.hpp"
#include "cospadi/status.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of cospadi; use them through cospadi.native.";

  // Python-side types: ValueError for the caller's arguments, MemoryError, RuntimeError for the
  // rest.
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const cospadi::Error& error) {
      switch (error.code()) {
        case cospadi::ErrorCode::kInvalidArgument:
          py::set_error(PyExc_ValueError, error.what());
          return;
        case cospadi::ErrorCode::kOutOfMemory:
          py::set_error(PyExc_MemoryError, error.what());
          return;
        default:
          py::set_error(PyExc_RuntimeError, error.what());
      }
    }
  });

  m.def("version", &cospadi::version);
  m.def("isa_name", &cospadi::isa_name);
  m.def("available_isas", &cospadi::available_isas);
  m.def("cuda_built", &cospadi::cuda_built);
  m.def("cuda_device_count", &cospadi::cuda_device_count);
  m.def("cuda_unavailable_reason", &cospadi::cuda_unavailable_reason);
  m.def("default_thread_count", &cospadi::default_thread_count);

  cospadi::bindings::bind_cuda(m);
  cospadi::bindings::bind_cuda_fit(m);
  cospadi::bindings::bind_dictionary(m);
  cospadi::bindings::bind_gemm(m);
  cospadi::bindings::bind_linear(m);
  cospadi::bindings::bind_omp(m);
  cospadi::bindings::bind_packed(m);
  cospadi::bindings::bind_round_code(m);
  cospadi::bindings::bind_select(m);
  cospadi::bindings::bind_sparse_gemm(m);
}
