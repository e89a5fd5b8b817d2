// Fibers, barriers and warp operations of the emulator (see cuda_on_cpu.hpp).
#include "cuda_on_cpu.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;

#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, takes up those of the other side. swapcontext
// would do it with two system calls, and a product of a few rows switches a million times.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t size, void (*entry)()) {
    // As if `entry` had been called: rsp + 8 divisible by 16 at its first instruction.
    void** top = reinterpret_cast<void**>(stack + size - 16);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) {
    cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context{};

  void prepare(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

/// Memory of `bytes` bytes that ends at a page without access.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr,
                                    mapped_,
                                    PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                    -1,
                                    0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data_ = base_ + mapped_ - page - bytes;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, mapped_); }
  char* data() const { return data_; }

 private:
  size_t mapped_ = 0;
  char* base_ = nullptr;
  char* data_ = nullptr;
};

enum class State { kReady, kAtBarrier, kInWarpOperation, kDone };

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  size_t size;
};

struct Fiber {
  Context context;
  std::unique_ptr<GuardedMemory> stack;
  void* fake_stack = nullptr;
  uint3 thread{};
  int index = 0;
  State state = State::kReady;
  Where where;
  // of the barrier or warp operation that it waits in
  int barrier = 0;
  int barrier_threads = 0;
  const char* operation = "";
  uint32_t mask = 0;
  void* operand = nullptr;
  // cp.async
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
};

struct Machine {
  Schedule schedule = Schedule::kForward;
  int multiprocessors = 4;
  int64_t launches = 0;
  std::mt19937 generator{7};

  std::vector<std::unique_ptr<Fiber>> fibers;
  int n_threads = 0;
  Fiber* current = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
  std::unique_ptr<GuardedMemory> shared;
  size_t shared_bytes = 0;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

void begin_switch([[maybe_unused]] void** fake_stack,
                  [[maybe_unused]] const void* stack,
                  [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#endif
}

void end_switch([[maybe_unused]] void* fake_stack,
                [[maybe_unused]] const void** stack,
                [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, size);
#endif
}

/// From the running thread back to the scheduler; returns when the thread is chosen again.
void yield_to_scheduler() {
  Machine& m = machine();
  Fiber& fiber = *m.current;
  const bool is_last = fiber.state == State::kDone;
  begin_switch(is_last ? nullptr : &fiber.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
  Context::swap(fiber.context, m.scheduler);
  end_switch(fiber.fake_stack, nullptr, nullptr);
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  threadIdx = fiber.thread;
  begin_switch(&m.scheduler_fake_stack, fiber.stack->data(), kStackBytes);
  Context::swap(m.scheduler, fiber.context);
  end_switch(m.scheduler_fake_stack, nullptr, nullptr);
  m.current = nullptr;
}

void fiber_main() {
  Machine& m = machine();
  end_switch(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
  try {
    (*m.body)();
  } catch (const std::exception& error) {
    m.error = error.what();
  }
  m.current->state = State::kDone;
  yield_to_scheduler();
}

std::string text(const Where& where) {
  const char* name = std::strrchr(where.file_name(), '/');
  return std::string(name ? name + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

bool is_same(const Where& a, const Where& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string describe(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kDone:
      return "has returned";
    case State::kAtBarrier:
      return "waits at barrier " + std::to_string(fiber.barrier) + ", " + text(fiber.where);
    case State::kInWarpOperation:
      return std::string("waits in ") + fiber.operation + ", " + text(fiber.where);
    default:
      return "runs";
  }
}

/// The threads that cannot go on, in runs of the same description.
std::string describe_stuck() {
  const Machine& m = machine();
  std::string result;
  std::string last;
  int first = 0;
  for (int i = 0; i <= m.n_threads; ++i) {
    const std::string now = i < m.n_threads ? describe(*m.fibers[static_cast<size_t>(i)]) : "";
    if (i > 0 && now != last) {
      result +=
          "\n  threads " + std::to_string(first) + " to " + std::to_string(i - 1) + ": " + last;
      first = i;
    }
    last = now;
  }
  return result;
}

std::vector<int> turn_order(int n) {
  Machine& m = machine();
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  if (m.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (m.schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), m.generator);
  return order;
}

uint3 unravel(unsigned index, const dim3& dims) {
  return {index % dims.x, index / dims.x % dims.y, index / (dims.x * dims.y)};
}

void start_fiber(Fiber& fiber, int index) {
  if (!fiber.stack) fiber.stack = std::make_unique<GuardedMemory>(kStackBytes);
#if defined(__SANITIZE_ADDRESS__)
  // a thread that an error ended leaves the marks of its frames
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack->data(), kStackBytes);
#endif
  fiber.fake_stack = nullptr;
  fiber.thread = unravel(static_cast<unsigned>(index), blockDim);
  fiber.index = index;
  fiber.state = State::kReady;
  fiber.open_copies.clear();
  fiber.groups.clear();
  fiber.context.prepare(fiber.stack->data(), kStackBytes, &fiber_main);
}

void run_block(uint3 block) {
  Machine& m = machine();
  blockIdx = block;
  std::memset(m.shared->data(), 0xff, m.shared_bytes);  // NaN in every floating-point type
  for (int i = 0; i < m.n_threads; ++i) {
    start_fiber(*m.fibers[static_cast<size_t>(i)], i);
  }
  int n_done = 0;
  while (n_done < m.n_threads) {
    bool has_moved = false;
    for (const int i : turn_order(m.n_threads)) {
      Fiber& fiber = *m.fibers[static_cast<size_t>(i)];
      if (fiber.state != State::kReady) continue;
      has_moved = true;
      resume(fiber);
      if (!m.error.empty()) throw std::runtime_error(m.error);
      if (fiber.state == State::kDone) ++n_done;
    }
    if (!has_moved) {
      throw std::runtime_error("block " + text(block) +
                               ": threads wait for ever:" + describe_stuck());
    }
  }
}

}  // namespace

void set_schedule(Schedule schedule) { machine().schedule = schedule; }
void set_multiprocessors(int count) { machine().multiprocessors = count; }
int multiprocessors() { return machine().multiprocessors; }
int64_t launch_count() { return machine().launches; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  ++m.launches;
  m.n_threads = static_cast<int>(block.x * block.y * block.z);
  while (m.fibers.size() < static_cast<size_t>(m.n_threads)) {
    m.fibers.push_back(std::make_unique<Fiber>());
  }
  m.shared_bytes = (shared_bytes + 15) / 16 * 16;  // the base stays aligned
  m.shared = std::make_unique<GuardedMemory>(m.shared_bytes);
  m.body = &body;
  m.error.clear();
  blockDim = block;
  gridDim = grid;
  for (const int i : turn_order(static_cast<int>(grid.x * grid.y * grid.z))) {
    run_block(unravel(static_cast<unsigned>(i), grid));
  }
}

void* shared_base() { return machine().shared->data(); }
size_t shared_size() { return machine().shared_bytes; }

void fail(const std::string& message, const Where& where) {
  throw std::runtime_error(text(where) + ", block " + text(blockIdx) + ", thread " +
                           text(threadIdx) + ": " + message);  // to fiber_main
}

void block_barrier(int id, int n_threads, const Where& where) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const int expected = n_threads == 0 ? m.n_threads : n_threads;
  self.barrier = id;
  self.barrier_threads = expected;
  self.where = where;
  self.state = State::kAtBarrier;
  int n_waiting = 0;
  for (int i = 0; i < m.n_threads; ++i) {
    const Fiber& other = *m.fibers[static_cast<size_t>(i)];
    if (other.state == State::kDone && n_threads == 0) {
      fail("waits at a barrier that thread " + text(other.thread) + " has left for good", where);
    }
    if (other.state != State::kAtBarrier || other.barrier != id) continue;
    if (other.barrier_threads != expected || !is_same(other.where, where)) {
      fail("is at a barrier for " + std::to_string(expected) + " threads, but thread " +
               text(other.thread) + " is at " + text(other.where) + " for " +
               std::to_string(other.barrier_threads),
           where);
    }
    ++n_waiting;
  }
  if (n_waiting < expected) {
    yield_to_scheduler();
    return;
  }
  for (int i = 0; i < m.n_threads; ++i) {
    Fiber& other = *m.fibers[static_cast<size_t>(i)];
    if (other.state == State::kAtBarrier && other.barrier == id) other.state = State::kReady;
  }
  yield_to_scheduler();  // so that the schedule, not the last arrival, decides who goes first
}

void warp_collective(const char* operation,
                     uint32_t mask,
                     void* operand,
                     void (*complete)(void* const operands[32], const void* context),
                     const void* context,
                     const Where& where) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const int first = self.index / kWarp * kWarp;
  if ((mask >> (self.index - first) & 1) == 0) {
    fail(std::string(operation) + ": its mask leaves out the thread itself", where);
  }
  self.state = State::kInWarpOperation;
  self.operation = operation;
  self.mask = mask;
  self.operand = operand;
  self.where = where;
  void* operands[kWarp] = {};
  bool is_complete = true;
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= m.n_threads) {
      fail(std::string(operation) + ": its mask names lane " + std::to_string(i) +
               ", but the block ends before",
           where);
    }
    const Fiber& other = *m.fibers[static_cast<size_t>(first + i)];
    if (other.state == State::kDone) {
      fail(std::string(operation) + ": lane " + std::to_string(i) + " has returned", where);
    }
    operands[i] = other.operand;
    if (other.state != State::kInWarpOperation) {
      is_complete = false;
      continue;
    }
    if (std::strcmp(other.operation, operation) != 0 || other.mask != mask ||
        !is_same(other.where, where)) {
      fail(std::string(operation) + ": lane " + std::to_string(i) + " " + describe(other), where);
    }
  }
  if (!is_complete) {
    yield_to_scheduler();
    return;
  }
  complete(operands, context);
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) m.fibers[static_cast<size_t>(first + i)]->state = State::kReady;
  }
  yield_to_scheduler();
}

void copy_later(void* shared, const void* source, size_t bytes, size_t size, const Where& where) {
  const auto* begin = static_cast<const char*>(shared_base());
  const auto* target = static_cast<const char*>(shared);
  if (target < begin || target + size > begin + shared_size()) {
    fail("cp.async: the target is outside of the dynamic shared memory", where);
  }
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 ||
      (bytes > 0 && reinterpret_cast<uintptr_t>(source) % size != 0)) {
    fail("cp.async: both addresses must be divisible by " + std::to_string(size), where);
  }
  machine().current->open_copies.push_back({shared, source, bytes, size});
}

void commit_copies() {
  Fiber& fiber = *machine().current;
  fiber.groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

void wait_for_copies(int groups_left) {
  Fiber& fiber = *machine().current;
  while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : fiber.groups.front()) {
      std::memcpy(copy.target, copy.source, copy.bytes);
      std::memset(static_cast<char*>(copy.target) + copy.bytes, 0, copy.size - copy.bytes);
    }
    fiber.groups.pop_front();
  }
}

}  // namespace cuda_on_cpu
