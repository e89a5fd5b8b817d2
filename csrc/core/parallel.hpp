// The one way work is spread over threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace cospadi::detail {

/// Threads for a call: the caller's count, or OpenMP's default when it passes 0.
inline int resolve_threads(int requested, int64_t n_tasks) {
  const int wanted = requested > 0 ? requested : omp_get_max_threads();
  return static_cast<int>(std::clamp<int64_t>(n_tasks, 1, wanted));
}

/// At most one thread per `unit` of `work`: waking one up costs some microseconds, and a time slice
/// (milliseconds) on a machine that is busy with something else.
inline int worthwhile_threads(int n_threads, double work, double unit) {
  return static_cast<int>(std::clamp(work / unit, 1.0, static_cast<double>(n_threads)));
}

/// Calls `body(task, thread)` for task = 0 .. n_tasks - 1. Tasks are handed out one at a time, so
/// results must not depend on which thread runs a task. `body` must not throw.
template <class Body>
void parallel_for(int64_t n_tasks, int n_threads, const Body& body) {
  if (n_threads <= 1 || n_tasks <= 1) {
    for (int64_t task = 0; task < n_tasks; ++task) body(task, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
  for (int64_t task = 0; task < n_tasks; ++task) body(task, omp_get_thread_num());
}

}  // namespace cospadi::detail
