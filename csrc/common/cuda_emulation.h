// Runs CUDA kernels on the host, one CTA at a time, each thread a fiber. Only built with MASKACCEL_EMULATE.
//
// It lets the kernels, their launch plans and their argument checks be tested where there is no GPU. It keeps the
// semantics the kernels rely on (barriers, shuffles, shared memory, launch geometry), not the timing or the memory
// model: a missing barrier may go unseen, a wrong index does not.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace maskaccel::emulation {

struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  jmp_buf state;
};

// An asynchronous copy of 16 bytes: done when it is waited for, so that a wait too few shows. From null: zeros.
struct Copy {
  void* to;
  const void* from;
};

struct Machine {
  uint3 thread{0, 0, 0}, block{0, 0, 0};
  dim3 block_dim, grid_dim;
  std::vector<float> dynamic_shared;
  long launches = 0, memsets = 0, attributes = 0, allocations = 0;  // what a call would ask of CUDA and of torch
  size_t shared_limit = 0;  // what the next launch asked for beyond `kUnasked`
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<char> done;
  std::vector<Barrier> warps;
  std::vector<std::vector<double>> slots;  // two slots per thread: consecutive shuffles need one barrier each
  std::vector<int> parity;
  std::vector<std::array<std::array<char, 32>, 2>> mail;  // as slots, of any type
  std::vector<std::vector<std::vector<Copy>>> copies;     // of each thread: groups, the last one open
  bool any = false;                                       // of a barrier with a vote
  Barrier cta;
  jmp_buf scheduler;
  ucontext_t main_context, entry;
  std::function<void()> body;
  long progress = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline int current() { return static_cast<int>(machine().thread.x); }

inline void yield() {
  Machine& m = machine();
  if (_setjmp(m.fibers[current()].state) == 0) _longjmp(m.scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine().progress;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void sync_threads() { wait(machine().cta); }

template <typename T>  // float or double
inline T shuffle(T value, int source_lane) {
  Machine& m = machine();
  const int tid = current(), base = tid & ~31;
  const int at = m.parity[tid] ^= 1;
  m.slots[tid][at] = value;
  wait(m.warps[tid / 32]);
  return static_cast<T>(m.slots[base + source_lane][at]);
}

/// A value of every lane of the warp, for every lane to read.
template <typename T>
class Mail {
 public:
  explicit Mail(const T& mine) {
    static_assert(sizeof(T) <= 32 && std::is_trivially_copyable_v<T>);
    Machine& m = machine();
    const int tid = current();
    first_ = tid & ~31;
    at_ = m.parity[tid] ^= 1;
    std::memcpy(m.mail[tid][at_].data(), &mine, sizeof(T));
    wait(m.warps[tid / 32]);
  }
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, machine().mail[first_ + lane][at_].data(), sizeof(T));
    return value;
  }

 private:
  int first_, at_;
};

inline bool sync_threads_or(bool value) {
  Machine& m = machine();
  m.any = m.any || value;
  wait(m.cta);
  const bool result = m.any;
  wait(m.cta);
  m.any = false;  // by every thread, before any of them can vote again
  wait(m.cta);
  return result;
}

/// A device faults where a word of 16 bytes does not lie on them, also where the copy is switched off.
inline const void* aligned(const void* word) {
  if (reinterpret_cast<uintptr_t>(word) % 16 != 0) {
    std::fprintf(stderr, "emulation: a word of 16 bytes at %p\n", word);
    std::abort();
  }
  return word;
}

inline void start_copy(void* to, const void* from, bool valid) {
  aligned(to), aligned(from);
  machine().copies[current()].back().push_back(Copy{to, valid ? from : nullptr});
}
inline void close_copies() { machine().copies[current()].emplace_back(); }
inline void wait_copies(size_t open) {
  auto& groups = machine().copies[current()];
  while (groups.size() > open + 1) {
    for (const Copy& c : groups.front()) {
      if (c.from != nullptr) std::memcpy(c.to, c.from, 16);
      if (c.from == nullptr) std::memset(c.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

inline void fiber_main() {
  Machine& m = machine();
  m.body();
  m.done[current()] = 1;
  ++m.progress;
  yield();
}

/// Runs a thread up to the next barrier or shuffle at which it must wait for others. Not inlined: the scheduler's locals
/// must not live in a frame that is jumped into.
__attribute__((noinline)) inline void resume(int t, bool first_time) {
  Machine& m = machine();
  constexpr size_t kStack = 64 * 1024;
  m.thread.x = t;
  if (_setjmp(m.scheduler) != 0) return;
  if (!first_time) _longjmp(m.fibers[t].state, 1);
  while (m.stacks.size() <= static_cast<size_t>(t)) m.stacks.push_back(std::make_unique<char[]>(kStack));
  getcontext(&m.entry);  // only to get onto a new stack; later switches save no signal mask and so need no system call
  m.entry.uc_stack.ss_sp = m.stacks[t].get();
  m.entry.uc_stack.ss_size = kStack;
  m.entry.uc_link = nullptr;
  makecontext(&m.entry, fiber_main, 0);
  swapcontext(&m.main_context, &m.entry);
}

/// The next number of a sequence that MASKACCEL_EMULATE_SEED chooses.
inline unsigned random() {
  static const char* const seed = std::getenv("MASKACCEL_EMULATE_SEED");
  static unsigned state = seed != nullptr ? static_cast<unsigned>(std::atoi(seed)) : 0;
  state = state * 1664525u + 1013904223u;
  return state >> 16;
}

/// Threads run in turns, or as MASKACCEL_EMULATE_ORDER says. "first", "last": each warp from that end on as far as it
/// gets without the others; where a barrier is missing, it then reads what is not there yet, or writes over what is
/// still read. "random": warps are left out at random, or get far ahead.
inline void run_cta(int threads) {
  Machine& m = machine();
  const char* const order = std::getenv("MASKACCEL_EMULATE_ORDER");
  const bool any = order != nullptr && std::strcmp(order, "random") == 0, alone = order != nullptr && !any;
  const bool from_last = alone && std::strcmp(order, "last") == 0;
  const int warps = (threads + 31) / 32;
  m.fibers.resize(threads);
  m.done.assign(threads, 0);
  m.parity.assign(threads, 0);
  m.slots.assign(threads, std::vector<double>(2, 0.0));
  m.mail.resize(threads);
  m.copies.assign(threads, std::vector<std::vector<Copy>>(1));
  m.warps.assign(warps, Barrier{});
  for (int w = 0; w < warps; ++w) m.warps[w].size = std::min(32, threads - w * 32);
  m.cta = Barrier{threads, 0, 0};
  std::vector<char> started(threads, 0);
  bool stuck = false;  // the last round brought no progress
  for (int left = threads; left > 0;) {
    const long before = m.progress;
    bool all = true;  // whether no warp was left out in this round
    for (int i = 0; i < warps; ++i) {
      const int first = (from_last ? warps - 1 - i : i) * 32;
      const unsigned dice = any && !stuck ? random() % 8 : 3;
      if (dice < 3) {
        all = false;
        continue;
      }
      long at;
      do {
        at = m.progress;
        for (int t = first; t < std::min(first + 32, threads); ++t) {
          if (m.done[t]) continue;
          resume(t, !started[t]);
          started[t] = 1;
          left -= m.done[t];
        }
      } while ((alone || dice == 7) && m.progress != at);
    }
    stuck = m.progress == before;
    if (all && stuck) {
      std::fprintf(stderr, "emulation: CTA deadlocked: a barrier or shuffle not reached by all its threads\n");
      std::abort();
    }
  }
}

/// Dynamic shared memory that a device gives unasked to a kernel with 2 KB of static shared memory.
constexpr size_t kUnasked = 46 * 1024;

inline void run_grid(dim3 grid, int threads, size_t shared_bytes, std::function<void()> body) {
  Machine& m = machine();
  if (shared_bytes > std::max(kUnasked, m.shared_limit)) {
    std::fprintf(stderr, "emulation: launch with %zu bytes of shared memory that were not asked for\n", shared_bytes);
    std::abort();
  }
  m.shared_limit = 0;
  ++m.launches;
  m.grid_dim = grid;
  m.block_dim = dim3(threads);
  m.body = std::move(body);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = uint3{x, y, z};
        // As on a device, shared memory starts undefined: NaN makes a read before a write visible.
        m.dynamic_shared.assign(shared_bytes / sizeof(float) + 1, std::nanf(""));
        run_cta(threads);
      }
}

/// Appends a launch to the file that MASKACCEL_EMULATE_RECORD names, instead of running it; false where that is not set.
/// A line: kernel (as the linker calls it), grid, threads, bytes of dynamic shared memory, the bytes of the argument.
inline bool record_launch(void* kernel, dim3 grid, int threads, size_t shared_bytes, const void* argument, size_t bytes) {
  const char* const path = std::getenv("MASKACCEL_EMULATE_RECORD");
  if (path == nullptr) return false;
  std::FILE* file = std::fopen(path, "a");
  if (file == nullptr) {
    std::fprintf(stderr, "emulation: cannot write to %s\n", path);
    std::abort();
  }
  Dl_info symbol{};
  const bool named = dladdr(kernel, &symbol) != 0 && symbol.dli_saddr == kernel;  // a static kernel has no name here
  std::fprintf(file, "%s %u %u %u %d %zu ", named ? symbol.dli_sname : "?", grid.x, grid.y, grid.z, threads, shared_bytes);
  for (size_t i = 0; i < bytes; ++i) std::fprintf(file, "%02x", static_cast<const unsigned char*>(argument)[i]);
  std::fputc('\n', file);
  std::fclose(file);
  return true;
}

}  // namespace maskaccel::emulation

#include <cutlass/array.h>
#include <cutlass/numeric_types.h>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::maskaccel::emulation::machine().thread)
#define blockIdx (::maskaccel::emulation::machine().block)
#define blockDim (::maskaccel::emulation::machine().block_dim)
#define gridDim (::maskaccel::emulation::machine().grid_dim)
