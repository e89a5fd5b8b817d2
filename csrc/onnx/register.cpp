// The entry point of the library: ONNX Runtime calls RegisterCustomOps for each session that asks
// for it, and gets domain `cospadi` with operator CospadiLinear.

#include <charconv>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>

#include "cospadi/status.hpp"
#include "onnx/linear_kernel.hpp"
#include "onnx/ort_abi.hpp"

namespace cospadi::onnx {
namespace {

constexpr const char* kDomain = "cospadi";
constexpr const char* kThreadsKey = "cospadi.threads";
constexpr int kMaxThreads = 4096;

/// Runs `body` and turns whatever it throws into a status: no exception may reach ONNX Runtime.
template <class Body>
OrtStatus* guarded(const Api& api, const Body& body) noexcept {
  const auto failed = [&](OrtCode code, const char* message) {
    return api.create_status.call(static_cast<int32_t>(code), message);
  };
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return failed(OrtCode::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return failed(OrtCode::kRuntimeException, "cospadi: out of memory");
  } catch (const std::exception& error) {
    return failed(OrtCode::kFail, error.what());
  } catch (...) {
    return failed(OrtCode::kFail, "cospadi: unknown exception");
  }
}

/// The operator for sessions that compute with `n_threads` threads.
struct LinearOp : OrtCustomOp {
  int n_threads;

  explicit LinearOp(int n_threads_) : OrtCustomOp{}, n_threads(n_threads_) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp*) { return "CospadiLinear"; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(kInputs); };
    GetInputType = [](const OrtCustomOp*, size_t index) {
      // stored tensors are of several types, which the kernel checks
      return static_cast<int32_t>(index == 0 ? OrtType::kFloat32 : OrtType::kAny);
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int32_t {
      return kInputs[index].is_required ? kOrtRequired : kOrtOptional;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
    GetOutputType = [](const OrtCustomOp*, size_t) {
      return static_cast<int32_t>(OrtType::kFloat32);
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int32_t { return kOrtRequired; };
    CreateKernelV2 =
        [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
          return guarded(Api(api), [&] {
            *kernel = new LinearKernel(api, info, static_cast<const LinearOp*>(op)->n_threads);
          });
        };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto* const linear = static_cast<const LinearKernel*>(kernel);
      return guarded(linear->api(), [&] { linear->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<LinearKernel*>(kernel); };
  }
};

int thread_count(const Api& api, const OrtSessionOptions* options) {
  int has_entry = 0;
  api.check(api.has_config.call(options, kThreadsKey, &has_entry));
  if (has_entry == 0) return 0;
  size_t size = 0;
  api.check(api.get_config.call(options, kThreadsKey, nullptr, &size));
  std::string text(size, '\0');
  api.check(api.get_config.call(options, kThreadsKey, text.data(), &size));
  text.resize(text.find('\0') == std::string::npos ? size : text.find('\0'));
  int n_threads = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, n_threads);
  if (error != std::errc() || stop != end || n_threads < 0 || n_threads > kMaxThreads) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(kThreadsKey) + ": expected a number of threads from 0 (OpenMP's " +
                    "default) to " + std::to_string(kMaxThreads) + ", got '" + text + "'");
  }
  return n_threads;
}

/// A domain and its operator. Sessions refer to them, and the moment when the last one ends is not
/// told, so they stay: one per number of threads and ONNX Runtime in the process.
struct Registered {
  LinearOp op;
  OrtCustomOpDomain* domain = nullptr;
};

void add_domain(const OrtApi* table, const Api& api, OrtSessionOptions* options) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<const OrtApi*, int>, std::unique_ptr<Registered>>();
  const int n_threads = thread_count(api, options);
  const std::lock_guard lock(mutex);
  std::unique_ptr<Registered>& place = known[{table, n_threads}];
  if (place == nullptr) {
    auto made = std::make_unique<Registered>(Registered{LinearOp(n_threads)});
    api.check(api.create_domain.call(kDomain, &made->domain));
    api.check(api.add_op.call(made->domain, &made->op));
    place = std::move(made);
  }
  api.check(api.add_domain.call(options, place->domain));
}

}  // namespace
}  // namespace cospadi::onnx

// NOLINTBEGIN(readability-identifier-naming): the name that ONNX Runtime looks for
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace cospadi::onnx;
  const OrtApi* const table = base->GetApi(kOrtApiVersion);
  if (table == nullptr) {
    // Entry 0, which makes a status, has its place since the first version.
    const OrtApi* const oldest = base->GetApi(1);
    if (oldest == nullptr) return nullptr;
    const std::string message = std::string("cospadi: needs ONNX Runtime 1.") +
                                std::to_string(kOrtApiVersion) + " or newer, this one is " +
                                base->GetVersionString() + "; upgrade onnxruntime";
    return Entry<OrtStatus*(int32_t, const char*), 0>(oldest).call(
        static_cast<int32_t>(OrtCode::kFail), message.c_str());
  }
  const Api api(table);
  return guarded(api, [&] { add_domain(table, api, options); });
}
// NOLINTEND(readability-identifier-naming)
