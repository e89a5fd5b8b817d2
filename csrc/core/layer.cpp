#include "core/layer.hpp"

#include <utility>

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
    result->atoms =
        PackedCoeffs{info.d_in,
                     {CodeKind::kInteger, 8},
                     {reinterpret_cast<const uint8_t*>(tensor.data), info.n_atoms, info.d_in},
                     {scale.data, DType::kBFloat16, info.n_atoms, 1, 1},
                     0};
    return result;
  }
  check_finite(tensor, name);
  result->atoms =
      ConstTypedMatrix{tensor.data, dtype_of(tensor.type), info.d_in, info.n_atoms, info.n_atoms};
  return result;
}

}  // namespace detail

Layer::Impl::Impl(std::string name_,
                  LayerInfo info_,
                  std::shared_ptr<const detail::TensorFiles> files_,
                  std::shared_ptr<const detail::Dictionary> dictionary_,
                  int n_threads)
    : name(std::move(name_)),
      info(std::move(info_)),
      files(std::move(files_)),
      dictionary(std::move(dictionary_)) {
  matrix.d_in = info.d_in;
  matrix.has_identity = info.n_identity > 0;
  if (dictionary != nullptr) matrix.dictionary = dictionary->atoms;
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
  if (form.is_packed) {
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
    matrix.code = PackedSparseMatrix{n_atoms, mask, fields};
  } else {
    detail::check_finite(coeffs, name + ".coeffs");
    matrix.code = SparseMatrix{
        n_atoms, mask, {coeffs.data, form.dtype, info.d_out, info.sparsity, info.sparsity}};
  }
  if (info.has_bias) {
    const detail::PlacedTensor& values = tensor("bias");
    detail::check_finite(values, name + ".bias");
    matrix.bias = {values.data, detail::dtype_of(values.type), info.d_out};
  }
}

const std::string& Layer::name() const noexcept { return impl_->name; }

const LayerInfo& Layer::info() const noexcept { return impl_->info; }

void Layer::forward(ConstTypedMatrix x, TypedMatrix y, int n_threads) const {
  linear(x, impl_->matrix, y, n_threads);
}

}  // namespace cospadi
