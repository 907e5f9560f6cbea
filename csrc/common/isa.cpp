#include "isa.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace maskaccel {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose() {
  const Isa have = best();
  const char* asked = std::getenv("MASKACCEL_CPU_ISA");
  if (asked != nullptr) {
    for (int i = 0; i < static_cast<int>(have); ++i)
      if (std::strcmp(asked, kNames[i]) == 0) return static_cast<Isa>(i);
  }
  return have;
}

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa which) { return kNames[static_cast<int>(which)]; }

void* scratch(size_t bytes) {
  thread_local Scratch mine;
  if (bytes > mine.size) {
    std::free(mine.data);
    mine.size = (bytes + 4095) & ~size_t{4095};
    mine.data = std::aligned_alloc(64, mine.size);
    if (mine.data == nullptr) {
      mine.size = 0;
      throw std::bad_alloc();
    }
  }
  return mine.data;
}

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace maskaccel
