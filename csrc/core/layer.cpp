#include "core/layer.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/check.hpp"
#include "core/check_typed.hpp"
#include "core/checkpoint_config.hpp"
#include "core/layer_values.hpp"
#include "cospadi/mask.hpp"

namespace cospadi {
namespace detail {
namespace {

DType dtype_of(TensorType type) {
  return type == TensorType::kF32
             ? DType::kFloat32
             : (type == TensorType::kBF16 ? DType::kBFloat16 : DType::kFloat16);
}

/// out [cols x rows] = in [rows x cols], both contiguous.
template <class T>
void transpose(const T* in, int64_t rows, int64_t cols, T* out) {
  constexpr int64_t kBlock = 32;  // both sides of a block stay in the L1 cache
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
    for (int64_t j0 = 0; j0 < cols; j0 += kBlock) {
      for (int64_t j = j0; j < std::min(j0 + kBlock, cols); ++j) {
        for (int64_t i = i0; i < std::min(i0 + kBlock, rows); ++i) {
          out[j * rows + i] = in[i * cols + j];
        }
      }
    }
  }
}

const PlacedTensor& tensor_of(const TensorFiles& files, const std::string& name) {
  return files.tensors.find(name)->second;  // there: open() has checked it
}

}  // namespace

std::shared_ptr<const Dictionary> load_dictionary(const std::string& owner,
                                                  const LayerInfo& info,
                                                  const std::shared_ptr<const TensorFiles>& files) {
  auto result = std::make_shared<Dictionary>();
  result->files = files;
  const std::string name = owner + ".dictionary";
  const PlacedTensor& tensor = tensor_of(*files, name);
  if (info.dictionary_type == DictionaryType::kInt8) {
    const std::string scale_name = owner + ".dictionary_scale";
    const PlacedTensor& scale = tensor_of(*files, scale_name);
    check_scales(scale, scale_name);
    check_integers(tensor, scale, name);
    result->rows = tensor.data;
    result->scale = scale.data;
    return result;
  }
  check_finite(tensor, name);
  result->dtype = dtype_of(tensor.type);
  result->transposed = AlignedBuffer<char>(tensor.bytes);
  char* const out = result->transposed.data();
  if (result->dtype == DType::kFloat32) {
    transpose(reinterpret_cast<const uint32_t*>(tensor.data),
              info.d_in,
              info.n_atoms,
              reinterpret_cast<uint32_t*>(out));
  } else {
    transpose(reinterpret_cast<const uint16_t*>(tensor.data),
              info.d_in,
              info.n_atoms,
              reinterpret_cast<uint16_t*>(out));
  }
  result->rows = out;
  return result;
}

}  // namespace detail

namespace {

using detail::AlignedBuffer;
using detail::element;

/// products [rows x n_atoms] = x D.
void multiply_dictionary(const Layer::Impl& layer,
                         const ConstTypedMatrix& x,
                         const TypedMatrix& products,
                         int n_threads) {
  const detail::Dictionary& dictionary = *layer.dictionary;
  const int64_t n_atoms = layer.info.n_atoms;
  const int64_t d_in = layer.info.d_in;
  if (dictionary.scale == nullptr) {
    const SparseMatrix atoms{d_in, {}, {dictionary.rows, dictionary.dtype, n_atoms, d_in, d_in}};
    return sparse_gemm(x, atoms, {}, products, n_threads);
  }
  const PackedCoeffs rows{d_in,
                          {CodeKind::kInteger, 8},
                          {static_cast<const uint8_t*>(dictionary.rows), n_atoms, d_in},
                          {dictionary.scale, DType::kBFloat16, n_atoms, 1, 1},
                          0};
  packed_gemm(x, {d_in, {}, rows}, {}, products, n_threads);
}

/// y = z S + bias.
void multiply_code(const Layer::Impl& layer,
                   const ConstTypedMatrix& z,
                   const TypedMatrix& y,
                   int n_threads) {
  if (layer.is_packed) return packed_gemm(z, layer.packed, layer.bias, y, n_threads);
  sparse_gemm(z, layer.sparse, layer.bias, y, n_threads);
}

/// Copies x to the first columns of z, which has the same type.
void copy_inputs(const ConstTypedMatrix& x, const TypedMatrix& z) {
  const auto bytes = static_cast<size_t>(x.cols * dtype_bytes(x.dtype));
  for (int64_t i = 0; i < x.rows; ++i) std::memcpy(element(z, i, 0), element(x, i, 0), bytes);
}

}  // namespace

Layer::Impl::Impl(std::string name_,
                  LayerInfo info_,
                  std::shared_ptr<const detail::TensorFiles> files_,
                  std::shared_ptr<const detail::Dictionary> dictionary_,
                  int n_threads)
    : name(std::move(name_)),
      info(std::move(info_)),
      files(std::move(files_)),
      dictionary(std::move(dictionary_)) {
  const auto tensor = [&](const char* part) -> const detail::PlacedTensor& {
    return detail::tensor_of(*files, name + "." + part);
  };
  const detail::CoeffsForm form = detail::coeffs_form(info.coeffs_type);
  const int64_t n_atoms = info.total_atoms();
  MatrixView<const uint8_t> mask;
  if (info.has_mask) {
    const detail::PlacedTensor& bits = tensor("mask");
    detail::check_mask(bits, n_atoms, info.sparsity, name + ".mask");
    mask = {reinterpret_cast<const uint8_t*>(bits.data), info.d_out, mask_row_bytes(n_atoms)};
  }
  const detail::PlacedTensor& coeffs = tensor("coeffs");
  is_packed = form.is_packed;
  if (is_packed) {
    PackedCoeffs fields;
    fields.sparsity = info.sparsity;
    fields.format = form.format;
    fields.codes = {
        reinterpret_cast<const uint8_t*>(coeffs.data), coeffs.shape[0], coeffs.shape[1]};
    if (form.has_scale()) {
      const detail::PlacedTensor& scale = tensor("coeffs_scale");
      detail::check_scales(scale, name + ".coeffs_scale");
      fields.scale = {scale.data, DType::kBFloat16, scale.shape[0], scale.shape[1], scale.shape[1]};
      fields.group = info.coeffs_group;
    }
    detail::check_packed(fields, coeffs.file, name + ".coeffs", n_threads);
    packed = {n_atoms, mask, fields};
  } else {
    detail::check_finite(coeffs, name + ".coeffs");
    sparse = {n_atoms, mask, {coeffs.data, form.dtype, info.d_out, info.sparsity, info.sparsity}};
  }
  if (info.has_bias) {
    const detail::PlacedTensor& values = tensor("bias");
    detail::check_finite(values, name + ".bias");
    bias = {values.data, detail::dtype_of(values.type), info.d_out};
  }
}

const std::string& Layer::name() const noexcept { return impl_->name; }

const LayerInfo& Layer::info() const noexcept { return impl_->info; }

void Layer::forward(ConstTypedMatrix x, TypedMatrix y, int n_threads) const {
  const LayerInfo& info = impl_->info;
  detail::require(x.rows >= 0, "x: negative size");
  detail::require_typed(x, x.rows, info.d_in, "x");
  detail::require_typed(y, x.rows, info.d_out, "y");
  if (impl_->dictionary == nullptr) return multiply_code(*impl_, x, y, n_threads);
  if (x.rows == 0) return;
  // Pieces of equal size: how sums are ordered depends on whether there are many rows.
  constexpr int64_t kMaxRows = 1024;
  const int64_t n_pieces = (x.rows + kMaxRows - 1) / kMaxRows;
  const int64_t piece = (x.rows + n_pieces - 1) / n_pieces;
  const int64_t width = info.total_atoms();
  const AlignedBuffer<char> memory(detail::checked_product(
      detail::checked_product(piece, width, "z"), dtype_bytes(x.dtype), "z"));
  for (int64_t first = 0; first < x.rows; first += piece) {
    const int64_t rows = std::min(piece, x.rows - first);
    const ConstTypedMatrix inputs{element(x, first, 0), x.dtype, rows, x.cols, x.stride};
    const TypedMatrix z{memory.data(), x.dtype, rows, width, width};
    if (info.n_identity > 0) copy_inputs(inputs, z);
    const TypedMatrix products{
        element(z, 0, info.n_identity), z.dtype, rows, info.n_atoms, z.stride};
    multiply_dictionary(*impl_, inputs, products, n_threads);
    multiply_code(*impl_,
                  {z.data, z.dtype, z.rows, z.cols, z.stride},
                  {element(y, first, 0), y.dtype, rows, y.cols, y.stride},
                  n_threads);
  }
}

}  // namespace cospadi
