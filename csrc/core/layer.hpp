// A layer of a checkpoint: where its tensors lie.
#pragma once

#include <memory>
#include <string>

#include "core/checkpoint_files.hpp"
#include "cospadi/checkpoint.hpp"
#include "cospadi/linear.hpp"

namespace cospadi::detail {

/// A dictionary whose values have been checked.
struct Dictionary {
  std::shared_ptr<const TensorFiles> files;  // keeps what is mapped
  decltype(LinearMatrix::dictionary) atoms;
};

/// Checks the dictionary of `owner`. Throws Error(kCheckpoint).
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
  LinearMatrix matrix;

  /// Checks the tensors of module `name_`, whose shapes have been checked. Throws
  /// Error(kCheckpoint).
  Impl(std::string name_,
       LayerInfo info_,
       std::shared_ptr<const detail::TensorFiles> files_,
       std::shared_ptr<const detail::Dictionary> dictionary_,
       int n_threads);
};

}  // namespace cospadi
