#include "bindings/bindings.hpp"
#include "cospadi/mask.hpp"
#include "cospadi/sparse_gemm.hpp"

namespace cospadi::bindings {
namespace {

void bound_sparse_gemm(uintptr_t z,
                       int z_dtype,
                       int64_t rows,
                       int64_t z_stride,
                       int64_t n_atoms,
                       uintptr_t mask,
                       int64_t mask_cols,
                       uintptr_t coeffs,
                       int coeffs_dtype,
                       int64_t d_out,
                       int64_t sparsity,
                       uintptr_t bias,
                       int bias_dtype,
                       uintptr_t y,
                       int n_threads) {
  const DType out_dtype = static_cast<DType>(z_dtype);
  const SparseMatrix s{n_atoms,
                       MatrixView<const uint8_t>(address<const uint8_t>(mask), d_out, mask_cols),
                       ConstTypedMatrix{address<const void>(coeffs),
                                        static_cast<DType>(coeffs_dtype),
                                        d_out,
                                        sparsity,
                                        sparsity}};
  const py::gil_scoped_release released;
  sparse_gemm({address<const void>(z), out_dtype, rows, n_atoms, z_stride},
              s,
              {address<const void>(bias), static_cast<DType>(bias_dtype), d_out},
              {address<void>(y), out_dtype, rows, d_out, d_out},
              n_threads);
}

void bound_pack_mask(
    uintptr_t indices, int64_t rows, int64_t sparsity, int64_t n_atoms, uintptr_t mask) {
  const py::gil_scoped_release released;
  pack_mask(MatrixView<const int32_t>(address<const int32_t>(indices), rows, sparsity),
            n_atoms,
            MatrixView<uint8_t>(address<uint8_t>(mask), rows, mask_row_bytes(n_atoms)));
}

void bound_unpack_mask(
    uintptr_t mask, int64_t rows, int64_t n_atoms, int64_t sparsity, uintptr_t indices) {
  const py::gil_scoped_release released;
  unpack_mask(
      MatrixView<const uint8_t>(address<const uint8_t>(mask), rows, mask_row_bytes(n_atoms)),
      n_atoms,
      MatrixView<int32_t>(address<int32_t>(indices), rows, sparsity));
}

void bound_validate_mask(uintptr_t mask, int64_t rows, int64_t n_atoms, int64_t sparsity) {
  const py::gil_scoped_release released;
  validate_mask(
      MatrixView<const uint8_t>(address<const uint8_t>(mask), rows, mask_row_bytes(n_atoms)),
      n_atoms,
      sparsity);
}

}  // namespace

void bind_sparse_gemm(py::module_& m) {
  m.def("sparse_gemm", &bound_sparse_gemm);
  m.def("pack_mask", &bound_pack_mask);
  m.def("unpack_mask", &bound_unpack_mask);
  m.def("validate_mask", &bound_validate_mask);
}

}  // namespace cospadi::bindings
