#include "cospadi/runtime.hpp"

#include <omp.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cospadi/status.hpp"
#include "cpu/kernel_table.hpp"
#include "cuda/device.hpp"

namespace cospadi {
namespace {

struct Target {
  const char* name;
  bool (*is_supported)();
  const cpu::KernelTable& (*table)();
};

#ifdef COSPADI_X86
bool has_f16c() {
#if defined(__clang__) && __clang_major__ < 16
  return true;  // a name that it does not know; every processor with AVX2 has these instructions
#else
  return __builtin_cpu_supports("f16c");
#endif
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vpopcntdq");
}
#endif

// Narrowest first.
constexpr Target kTargets[] = {
    {"generic", [] { return true; }, cpu::generic_table},
#ifdef COSPADI_X86
    {"avx2", has_avx2, cpu::avx2_table},
    {"avx512", has_avx512, cpu::avx512_table},
#endif
};

const cpu::KernelTable& select_table() {
  const char* wanted = std::getenv("COSPADI_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    const cpu::KernelTable* best = nullptr;
    for (const Target& target : kTargets) {
      if (target.is_supported()) best = &target.table();
    }
    return *best;
  }
  std::string names;
  for (const Target& target : kTargets) {
    if (!target.is_supported()) continue;
    if (std::string(wanted) == target.name) return target.table();
    names += names.empty() ? target.name : std::string(", ") + target.name;
  }
  throw Error(ErrorCode::kInvalidArgument,
              "COSPADI_ISA=" + std::string(wanted) +
                  " is unknown or not available on this processor; available: " + names);
}

}  // namespace

const cpu::KernelTable& cpu::kernels() {
  static const KernelTable& table = select_table();
  return table;
}

const char* version() noexcept { return COSPADI_VERSION; }

const char* isa_name() { return cpu::kernels().name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Target& target : kTargets) {
    if (target.is_supported()) names.emplace_back(target.name);
  }
  return names;
}

bool cuda_built() noexcept { return cuda::is_built(); }

int cuda_device_count() noexcept { return cuda::device_count(); }

std::string cuda_unavailable_reason() { return cuda::unavailable_reason(); }

int default_thread_count() noexcept { return omp_get_max_threads(); }

}  // namespace cospadi
