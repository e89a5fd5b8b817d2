// The kernels of the fits in a build without CUDA: nobody gets here with memory of a device.
#include "cuda/fit_kernels.hpp"

namespace cospadi::cuda {
namespace {
constexpr int kNotBuilt = -1;
}  // namespace

const char* error_text(int) noexcept { return "this build has no CUDA kernels"; }

int select_largest(const float*, int64_t, int64_t, int64_t, int32_t*, void*) noexcept {
  return kNotBuilt;
}

int select_largest(const double*, int64_t, int64_t, int64_t, int32_t*, void*) noexcept {
  return kNotBuilt;
}

int project_rows(const float*,
                 float*,
                 float*,
                 const int32_t*,
                 int64_t,
                 int64_t,
                 int64_t,
                 float,
                 float,
                 int32_t*,
                 int32_t*,
                 void*) noexcept {
  return kNotBuilt;
}

int gradient_step(const float*,
                  const float*,
                  const float*,
                  const float*,
                  float*,
                  float*,
                  float*,
                  float*,
                  int64_t,
                  int64_t,
                  void*) noexcept {
  return kNotBuilt;
}

int64_t omp_signal_bytes(int64_t, int64_t, int) noexcept { return 0; }

int omp_encode(const float*,
               const float*,
               const float*,
               int64_t,
               int64_t,
               int64_t,
               bool,
               void*,
               int64_t,
               int32_t*,
               float*,
               unsigned long long*,
               void*) noexcept {
  return kNotBuilt;
}

int omp_encode(const double*,
               const double*,
               const double*,
               int64_t,
               int64_t,
               int64_t,
               bool,
               void*,
               int64_t,
               int32_t*,
               double*,
               unsigned long long*,
               void*) noexcept {
  return kNotBuilt;
}

}  // namespace cospadi::cuda
