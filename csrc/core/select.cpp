#include "cospadi/select.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "core/check.hpp"
#include "core/parallel.hpp"
#include "cpu/kernel_table.hpp"

namespace cospadi {
namespace {

using detail::require;
using detail::require_shape;

constexpr int64_t kTaskElements = 32768;  // some 20 us per task
constexpr double kElementsPerThread = 65536;

template <class T>
const cpu::SelectEntry<T>& entry() {
  if constexpr (sizeof(T) == 4) {
    return cpu::kernels().select_f32;
  } else {
    return cpu::kernels().select_f64;
  }
}

/// Calls `body(row)` for every row, several rows per task.
template <class Body>
void for_each_row(int64_t n_rows, int64_t n_cols, int num_threads, const Body& body) {
  const int64_t rows_per_task = std::max<int64_t>(1, kTaskElements / n_cols);
  const int64_t n_tasks = (n_rows + rows_per_task - 1) / rows_per_task;
  const double work = static_cast<double>(n_rows) * static_cast<double>(n_cols);
  const int team = detail::worthwhile_threads(
      detail::resolve_threads(num_threads, n_tasks), work, kElementsPerThread);
  detail::parallel_for(n_tasks, team, [&](int64_t task, int) {
    const int64_t last = std::min(n_rows, (task + 1) * rows_per_task);
    for (int64_t i = task * rows_per_task; i < last; ++i) body(i);
  });
}

/// Throws an Error for the first score that is negative or NaN.
template <class T>
void require_scores(MatrixView<const T> scores, int num_threads) {
  int64_t bad_row = scores.rows;
  for_each_row(scores.rows, scores.cols, num_threads, [&](int64_t i) {
    if (entry<T>().first_invalid(scores.row(i), scores.cols) == scores.cols) return;
#pragma omp critical(cospadi_select)
    bad_row = std::min(bad_row, i);
  });
  if (bad_row == scores.rows) return;
  const int64_t column = entry<T>().first_invalid(scores.row(bad_row), scores.cols);
  throw Error(ErrorCode::kInvalidArgument,
              "scores: element " + detail::shape_text(bad_row, column) +
                  " is negative or NaN: " + std::to_string(scores(bad_row, column)));
}

}  // namespace

template <class T>
void select_largest(MatrixView<const T> scores,
                    int64_t count,
                    int num_threads,
                    MatrixView<int32_t> indices) {
  require_shape(scores, scores.rows, scores.cols, "scores");
  require(scores.cols <= std::numeric_limits<int32_t>::max(),
          "scores: expected at most 2^31 - 1 columns, got " + std::to_string(scores.cols));
  require(count >= 1 && count <= scores.cols,
          "count: expected 1 to " + std::to_string(scores.cols) + ", got " + std::to_string(count));
  require_shape(indices, scores.rows, count, "indices");
  require_scores(scores, num_threads);
  for_each_row(scores.rows, scores.cols, num_threads, [&](int64_t i) {
    entry<T>().select(scores.row(i), scores.cols, count, indices.row(i));
  });
}

template void select_largest<float>(MatrixView<const float>, int64_t, int, MatrixView<int32_t>);
template void select_largest<double>(MatrixView<const double>, int64_t, int, MatrixView<int32_t>);

}  // namespace cospadi
