/// The largest scores of every row: the support of a thresholded code.
#pragma once

#include <cstdint>

#include "cospadi/export.h"
#include "cospadi/matrix.hpp"

namespace cospadi {

/// Writes the indices of the `count` largest scores of every row, ascending.
///
/// Equal scores are broken by the lowest index, so the result is unique; -0.0 counts as 0 and +inf
/// is a score like any other. A row is read about ten times from the cache: the threshold is found
/// by halving a range of scores. T is float or double.
///
/// @param scores  [n x A] non-negative, not NaN. Borrowed for the call.
/// @param count   1 <= count <= A
/// @param indices [n x count] out, strictly ascending per row; must not overlap `scores`
///
/// No workspace. `num_threads` = 0 means OpenMP's default; the result is the same for every thread
/// count. Throws Error(kInvalidArgument) for shapes and `count`, and naming row and column of the
/// first score that is negative or NaN; nothing has been written then.
template <class T>
COSPADI_API void select_largest(MatrixView<const T> scores,
                                int64_t count,
                                int num_threads,
                                MatrixView<int32_t> indices);

}  // namespace cospadi
