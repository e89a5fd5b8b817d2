#include "bindings/bindings.hpp"
#include "cospadi/linear.hpp"

namespace cospadi::bindings {
namespace {

/// Everything contiguous but the rows of x. `dictionary` is 0 without learned atoms; it is int8
/// [n_atoms x d_in] where `dictionary_scale` [n_atoms] is given, else floats [d_in x n_atoms].
/// `bits` is 0 for coefficients of `coeffs_dtype` [d_out x sparsity], else that of packed fields
/// [d_out x row_bytes].
void bound_linear(uintptr_t x,
                  int x_dtype,
                  int64_t rows,
                  int64_t x_stride,
                  int64_t d_in,
                  bool has_identity,
                  uintptr_t dictionary,
                  int dictionary_dtype,
                  int64_t n_atoms,
                  uintptr_t dictionary_scale,
                  int dictionary_scale_dtype,
                  uintptr_t mask,
                  int64_t mask_cols,
                  uintptr_t coeffs,
                  int coeffs_dtype,
                  int64_t d_out,
                  int64_t row_bytes,
                  int64_t sparsity,
                  int kind,
                  int bits,
                  uintptr_t coeffs_scale,
                  int coeffs_scale_dtype,
                  int64_t n_groups,
                  int64_t group,
                  uintptr_t bias,
                  int bias_dtype,
                  uintptr_t y,
                  int n_threads) {
  const DType out_dtype = static_cast<DType>(x_dtype);
  LinearMatrix matrix;
  matrix.d_in = d_in;
  matrix.has_identity = has_identity;
  if (dictionary_scale != 0) {
    matrix.dictionary = PackedCoeffs{d_in,
                                     {CodeKind::kInteger, 8},
                                     {address<const uint8_t>(dictionary), n_atoms, d_in},
                                     {address<const void>(dictionary_scale),
                                      static_cast<DType>(dictionary_scale_dtype),
                                      n_atoms,
                                      1,
                                      1},
                                     0};
  } else if (dictionary != 0) {
    matrix.dictionary = ConstTypedMatrix{address<const void>(dictionary),
                                         static_cast<DType>(dictionary_dtype),
                                         d_in,
                                         n_atoms,
                                         n_atoms};
  }
  const int64_t total_atoms = n_atoms + (has_identity ? d_in : 0);
  const MatrixView<const uint8_t> bit_mask(address<const uint8_t>(mask), d_out, mask_cols);
  if (bits == 0) {
    matrix.code = SparseMatrix{
        total_atoms,
        bit_mask,
        {address<const void>(coeffs), static_cast<DType>(coeffs_dtype), d_out, sparsity, sparsity}};
  } else {
    matrix.code = PackedSparseMatrix{total_atoms,
                                     bit_mask,
                                     {sparsity,
                                      {static_cast<CodeKind>(kind), bits},
                                      {address<const uint8_t>(coeffs), d_out, row_bytes},
                                      {address<const void>(coeffs_scale),
                                       static_cast<DType>(coeffs_scale_dtype),
                                       d_out,
                                       n_groups,
                                       n_groups},
                                      group}};
  }
  matrix.bias = {address<const void>(bias), static_cast<DType>(bias_dtype), d_out};
  const py::gil_scoped_release released;
  linear({address<const void>(x), out_dtype, rows, d_in, x_stride},
         matrix,
         {address<void>(y), out_dtype, rows, d_out, d_out},
         n_threads);
}

}  // namespace

void bind_linear(py::module_& m) { m.def("linear", &bound_linear); }

}  // namespace cospadi::bindings
