/// Reading a compressed checkpoint (FORMAT.md) and computing with its layers.
///
/// A checkpoint is a folder with config.json and one or more safetensors files, and is taken for
/// hostile: every size, offset, type, shape, name, path and value is checked before it is used, and
/// a violation ends in an Error of code kCheckpoint, kNewerFormat or kNotCompressed that names file
/// and tensor. The files are mapped, not copied: they must not be changed or cut while a
/// Checkpoint, or a Layer of one, lives.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cospadi/dtype.hpp"
#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// Element types of safetensors.
enum class TensorType : int {
  kBool = 0,
  kU8 = 1,
  kI8 = 2,
  kI16 = 3,
  kU16 = 4,
  kI32 = 5,
  kU32 = 6,
  kI64 = 7,
  kU64 = 8,
  kF16 = 9,
  kBF16 = 10,
  kF32 = 11,
  kF64 = 12,
  kF8E4M3 = 13,
  kF8E5M2 = 14,
};

/// One stored tensor, row-major. Memory is borrowed from the Checkpoint, and aligned for its type.
struct TensorView {
  const void* data = nullptr;  ///< not null, also where the tensor is empty
  TensorType type = TensorType::kU8;
  std::span<const int64_t> shape;
  int64_t bytes = 0;
};

/// Storage of a compressed layer's dictionary.
enum class DictionaryType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

/// Storage of a compressed layer's coefficients.
enum class CoeffsType : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kBFloat14 = 3,
  kInt8 = 4,
  kInt6 = 5,
  kInt5 = 6,
  kInt4 = 7,
  kInt3 = 8,
};

/// Sizes and storage of one compressed layer, as in FORMAT.md section 4. Every size is below 2^31.
struct LayerInfo {
  int64_t d_in = 0;
  int64_t d_out = 0;
  int64_t n_atoms = 0;     ///< learned atoms; 0 without a dictionary
  int64_t n_identity = 0;  ///< 0 or d_in: the inputs are atoms, too
  int64_t sparsity = 0;    ///< coefficients per output
  bool has_mask = false;   ///< false: every output uses every atom
  bool has_bias = false;
  bool is_conv1d =
      false;  ///< the dense layer kept its weight as [d_in, d_out]; forward is the same
  DictionaryType dictionary_type = DictionaryType::kBFloat16;
  CoeffsType coeffs_type = CoeffsType::kBFloat16;
  int64_t coeffs_group = 0;  ///< coefficients per scale, 0: one scale per output
  std::string leader;        ///< whose dictionary it uses; empty: its own, or none

  /// Identity and learned atoms together.
  [[nodiscard]] int64_t total_atoms() const noexcept { return n_identity + n_atoms; }
};

/// A layer y = z S + bias with z = x D, or z = [x ; x D], that is ready to run.
///
/// A cheap handle: copies share the data, which lives until the last copy is gone (the Checkpoint
/// may go before). All members are const and may be called from several threads at once.
class COSPADI_API Layer {
 public:
  [[nodiscard]] const std::string& name() const noexcept;
  [[nodiscard]] const LayerInfo& info() const noexcept;

  /// y = layer(x).
  ///
  /// x [n_tokens x d_in] and y [n_tokens x d_out] with any row strides; each float, bfloat16 or
  /// binary16. y must not overlap x. As in the Python package x D is rounded to the type of x, sums
  /// are in float, and y is rounded once. Results are the same bits for any `n_threads`; 0 means
  /// OpenMP's default.
  ///
  /// Workspace, allocated and freed inside: that of `linear` (cospadi/linear.hpp). Throws Error for
  /// shapes, strides and null pointers before y is written, and if there is no memory.
  void forward(ConstTypedMatrix x, TypedMatrix y, int n_threads = 0) const;

  struct Impl;
  explicit Layer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

/// An open checkpoint folder. A cheap handle, as Layer is; const members may be called from several
/// threads at once.
class COSPADI_API Checkpoint {
 public:
  /// Reads config.json, the index and the headers of all files, and checks everything but the
  /// values of tensors. Throws Error(kNotCompressed), Error(kNewerFormat), Error(kCheckpoint).
  static Checkpoint open(const std::string& folder);

  /// Names of the compressed modules, in the order of the file.
  [[nodiscard]] const std::vector<std::string>& modules() const noexcept;

  /// Sizes of a compressed module. Throws Error(kInvalidArgument) if there is no such module.
  [[nodiscard]] const LayerInfo& info(std::string_view module) const;

  /// Checks the values of a module's tensors (population of the mask, padding, range, finiteness,
  /// signs of scales) and makes a layer of it, which uses them where they are mapped. Reads all of
  /// its bytes, those of a shared dictionary once. Throws Error(kInvalidArgument) if there is no
  /// such module, Error(kCheckpoint) for a wrong value. `n_threads` as in Layer::forward.
  [[nodiscard]] Layer layer(std::string_view module, int n_threads = 0) const;

  /// Names of all stored tensors, ascending; those of compressed modules are among them.
  [[nodiscard]] const std::vector<std::string>& tensor_names() const noexcept;

  /// One stored tensor; valid as long as this checkpoint or a copy of it. Its values are not
  /// checked. Throws Error(kInvalidArgument) if there is no such tensor.
  [[nodiscard]] TensorView tensor(std::string_view name) const;

  /// A number of config.json, by its keys joined by dots ("rope_parameters.rope_theta"); nothing if
  /// it is not there or is no number.
  [[nodiscard]] std::optional<double> config_number(std::string_view path) const;

  /// A text of config.json, as config_number. Borrowed from the checkpoint.
  [[nodiscard]] std::optional<std::string_view> config_text(std::string_view path) const;

  struct Impl;
  explicit Checkpoint(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

 private:
  std::shared_ptr<const Impl> impl_;
};

/// Writes `tensor` to `out` [n] as floats. Throws Error(kInvalidArgument) unless it has n elements
/// of kF32, kBF16 or kF16.
COSPADI_API void copy_floats(const TensorView& tensor, std::span<float> out);

}  // namespace cospadi
