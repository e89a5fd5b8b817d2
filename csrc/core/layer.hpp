// A layer of a checkpoint: where its tensors lie and in which layout the kernels take them.
#pragma once

#include <memory>
#include <string>

#include "core/buffer.hpp"
#include "core/checkpoint_files.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/packed.hpp"
#include "cospadi/sparse_gemm.hpp"

namespace cospadi::detail {

/// A dictionary as the product x D takes it: one row of d_in values per atom, each of which is an
/// output that uses every input.
struct Dictionary {
  std::shared_ptr<const TensorFiles> files;  // keeps what is mapped
  AlignedBuffer<char> transposed;            // of floating-point numbers
  DType dtype = DType::kFloat32;
  const void* rows = nullptr;   // [n_atoms x d_in] of `dtype`, or int8
  const void* scale = nullptr;  // bfloat16 [n_atoms]; null unless int8
};

/// Checks the dictionary of `owner` and lays it out. Throws Error(kCheckpoint).
std::shared_ptr<const Dictionary> load_dictionary(const std::string& owner,
                                                  const LayerInfo& info,
                                                  const std::shared_ptr<const TensorFiles>& files);

}  // namespace cospadi::detail

namespace cospadi {

struct COSPADI_LOCAL Layer::Impl {
  std::string name;
  LayerInfo info;
  std::shared_ptr<const detail::TensorFiles> files;
  std::shared_ptr<const detail::Dictionary> dictionary;  // null without learned atoms
  bool is_packed = false;
  SparseMatrix sparse;        // S, if it is not packed
  PackedSparseMatrix packed;  // S, if it is
  ConstTypedVector bias;

  /// Checks the tensors of module `name_`, whose shapes have been checked. Throws
  /// Error(kCheckpoint).
  Impl(std::string name_,
       LayerInfo info_,
       std::shared_ptr<const detail::TensorFiles> files_,
       std::shared_ptr<const detail::Dictionary> dictionary_,
       int n_threads);
};

}  // namespace cospadi
