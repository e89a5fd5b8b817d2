#include <tuple>

#include "bindings/bindings.hpp"
#include "core/cuda_gemm.hpp"

namespace cospadi::bindings {
namespace {

/// S as cospadi.native.cuda passes it: rows of mask, values and scales are dense.
cuda::CodeOperand code_operand(int n_atoms,
                               int d_out,
                               int sparsity,
                               uintptr_t mask,
                               int64_t mask_row_bytes,
                               uintptr_t values,
                               int64_t value_row_bytes,
                               int type,
                               int bits,
                               uintptr_t scale,
                               int scale_dtype,
                               int64_t n_groups,
                               int group) {
  cuda::CodeOperand s;
  s.n_atoms = n_atoms;
  s.d_out = d_out;
  s.sparsity = sparsity;
  s.mask = address<const uint8_t>(mask);
  s.mask_stride = mask_row_bytes;
  s.values = address<const uint8_t>(values);
  s.value_stride = value_row_bytes;
  s.type = static_cast<cuda::ValueType>(type);
  s.bits = bits;
  s.scale = address<const void>(scale);
  s.scale_dtype = static_cast<DType>(scale_dtype);
  s.scale_stride = n_groups;
  s.group = group;
  return s;
}

/// The arguments of code_operand, as one Python tuple.
using Code = std::tuple<int,
                        int,
                        int,
                        uintptr_t,
                        int64_t,
                        uintptr_t,
                        int64_t,
                        int,
                        int,
                        uintptr_t,
                        int,
                        int64_t,
                        int>;

CudaTarget target(int device, uintptr_t stream) {
  return {device, reinterpret_cast<cuda::Stream>(stream)};
}

void bound_code_gemm(int device,
                     uintptr_t stream,
                     int way,
                     int z_dtype,
                     int rows,
                     uintptr_t first,
                     int64_t first_stride,
                     int n_first,
                     uintptr_t second,
                     int64_t second_stride,
                     int n_second,
                     uintptr_t bias,
                     int bias_dtype,
                     uintptr_t y,
                     int y_dtype,
                     const Code& code) {
  const cuda::CodeOperand s = std::apply(&code_operand, code);
  const cuda::RowsOperand z{static_cast<DType>(z_dtype),
                            rows,
                            address<const void>(first),
                            first_stride,
                            n_first,
                            address<const void>(second),
                            second_stride,
                            n_second};
  const cuda::OutputOperand out{static_cast<DType>(y_dtype),
                                address<void>(y),
                                s.d_out,
                                address<const void>(bias),
                                static_cast<DType>(bias_dtype)};
  const py::gil_scoped_release released;
  cuda_code_gemm(z, s, out, static_cast<CudaWay>(way), target(device, stream));
}

void bound_dense_gemm(int device,
                      uintptr_t stream,
                      int dtype,
                      int rows,
                      uintptr_t x,
                      int64_t x_stride,
                      int d_in,
                      uintptr_t dictionary,
                      int64_t dictionary_stride,
                      int64_t n_atoms,
                      uintptr_t y) {
  cuda::RowsOperand operand;
  operand.dtype = static_cast<DType>(dtype);
  operand.rows = rows;
  operand.first = address<const void>(x);
  operand.first_stride = x_stride;
  operand.n_first = d_in;
  const cuda::OutputOperand out{operand.dtype, address<void>(y), n_atoms, nullptr, DType::kFloat32};
  const py::gil_scoped_release released;
  cuda_dense_gemm(operand,
                  address<const void>(dictionary),
                  dictionary_stride,
                  n_atoms,
                  out,
                  target(device, stream));
}

void bound_expand(int device, uintptr_t stream, int dtype, uintptr_t out, const Code& code) {
  const cuda::CodeOperand s = std::apply(&code_operand, code);
  const py::gil_scoped_release released;
  cuda_expand(s, static_cast<DType>(dtype), address<void>(out), s.n_atoms, target(device, stream));
}

void bound_decode(int device, uintptr_t stream, uintptr_t out, const Code& code) {
  const cuda::CodeOperand s = std::apply(&code_operand, code);
  const py::gil_scoped_release released;
  cuda_decode(s, address<float>(out), target(device, stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_code_gemm", &bound_code_gemm);
  m.def("cuda_dense_gemm", &bound_dense_gemm);
  m.def("cuda_expand", &bound_expand);
  m.def("cuda_decode", &bound_decode);
}

}  // namespace cospadi::bindings
