#include "bindings/bindings.hpp"
#include "cospadi/mask.hpp"
#include "cospadi/packed.hpp"

namespace cospadi::bindings {
namespace {

/// `scale` [d_out x groups] and `codes` are contiguous; `scale` may be 0.
PackedCoeffs packed_coeffs(uintptr_t codes,
                           int64_t d_out,
                           int64_t row_bytes,
                           int64_t sparsity,
                           int kind,
                           int bits,
                           uintptr_t scale,
                           int scale_dtype,
                           int64_t n_groups,
                           int64_t group) {
  return {sparsity,
          {static_cast<CodeKind>(kind), bits},
          MatrixView<const uint8_t>(address<const uint8_t>(codes), d_out, row_bytes),
          {address<const void>(scale), static_cast<DType>(scale_dtype), d_out, n_groups, n_groups},
          group};
}

void bound_packed_gemm(uintptr_t z,
                       int z_dtype,
                       int64_t rows,
                       int64_t z_stride,
                       int64_t n_atoms,
                       uintptr_t mask,
                       int64_t mask_cols,
                       uintptr_t codes,
                       int64_t d_out,
                       int64_t row_bytes,
                       int64_t sparsity,
                       int kind,
                       int bits,
                       uintptr_t scale,
                       int scale_dtype,
                       int64_t n_groups,
                       int64_t group,
                       uintptr_t bias,
                       int bias_dtype,
                       uintptr_t y,
                       int n_threads) {
  const DType out_dtype = static_cast<DType>(z_dtype);
  const PackedSparseMatrix s{
      n_atoms,
      MatrixView<const uint8_t>(address<const uint8_t>(mask), d_out, mask_cols),
      packed_coeffs(
          codes, d_out, row_bytes, sparsity, kind, bits, scale, scale_dtype, n_groups, group)};
  const py::gil_scoped_release released;
  packed_gemm({address<const void>(z), out_dtype, rows, n_atoms, z_stride},
              s,
              {address<const void>(bias), static_cast<DType>(bias_dtype), d_out},
              {address<void>(y), out_dtype, rows, d_out, d_out},
              n_threads);
}

void bound_decode_coeffs(uintptr_t codes,
                         int64_t d_out,
                         int64_t row_bytes,
                         int64_t sparsity,
                         int kind,
                         int bits,
                         uintptr_t scale,
                         int scale_dtype,
                         int64_t n_groups,
                         int64_t group,
                         uintptr_t out,
                         int n_threads) {
  const PackedCoeffs coeffs = packed_coeffs(
      codes, d_out, row_bytes, sparsity, kind, bits, scale, scale_dtype, n_groups, group);
  const py::gil_scoped_release released;
  decode_coeffs(coeffs, MatrixView<float>(address<float>(out), d_out, sparsity), n_threads);
}

void bound_pack_fields(
    uintptr_t values, int64_t rows, int64_t n, int bits, uintptr_t packed, int n_threads) {
  const py::gil_scoped_release released;
  pack_fields(MatrixView<const int32_t>(address<const int32_t>(values), rows, n),
              bits,
              MatrixView<uint8_t>(address<uint8_t>(packed), rows, packed_row_bytes(n, bits)),
              n_threads);
}

void bound_unpack_fields(uintptr_t packed,
                         int64_t rows,
                         int64_t n,
                         int bits,
                         bool is_signed,
                         uintptr_t values,
                         int n_threads) {
  const py::gil_scoped_release released;
  unpack_fields(
      MatrixView<const uint8_t>(address<const uint8_t>(packed), rows, packed_row_bytes(n, bits)),
      bits,
      is_signed,
      MatrixView<int32_t>(address<int32_t>(values), rows, n),
      n_threads);
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("packed_gemm", &bound_packed_gemm);
  m.def("decode_coeffs", &bound_decode_coeffs);
  m.def("pack_fields", &bound_pack_fields);
  m.def("unpack_fields", &bound_unpack_fields);
}

}  // namespace cospadi::bindings
