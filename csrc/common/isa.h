// Run-time choice of the instruction set, and per-thread scratch memory.
//
// Kernel sources are compiled once per instruction set, each time into a namespace of its own named by
// MASKACCEL_ISA. Everything they define must live there, or be internal to the file: an inline function shared
// between two builds would be merged by the linker, and the baseline could end up running AVX-512 code.
#pragma once

#include <cstddef>

namespace maskaccel {

enum class Isa : int { portable, avx2, avx512, avx512bf16 };

// The best instruction set of this machine, lowered by MASKACCEL_CPU_ISA if that is set.
Isa isa();
const char* isa_name(Isa which);

// Memory of the calling thread, 64-byte aligned, valid until its next call. Never returns null.
void* scratch(size_t bytes);

// Asks for huge pages behind a fresh output: a 4 KiB fault costs more than filling the page.
void prefer_huge_pages(void* data, size_t bytes);

// Table of the chosen build, from the builds that exist: `pick(portable, avx2, avx512, avx512bf16)`.
template <class Table>
const Table& pick(const Table& portable, const Table& avx2, const Table& avx512, const Table& avx512bf16) {
  switch (isa()) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512bf16:
      return avx512bf16;
    default:
      return portable;
  }
}

}  // namespace maskaccel

// Declares `name` in the namespace of every build and defines `maskaccel::name()` as the chosen one.
#if defined(__x86_64__)
#define MASKACCEL_DISPATCH(Table, name)                                                            \
  namespace portable {                                                                             \
  extern const Table name;                                                                         \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  extern const Table name;                                                                         \
  }                                                                                                \
  namespace avx512 {                                                                               \
  extern const Table name;                                                                         \
  }                                                                                                \
  namespace avx512bf16 {                                                                           \
  extern const Table name;                                                                         \
  }                                                                                                \
  inline const Table& name() {                                                                     \
    static const Table& chosen = pick(portable::name, avx2::name, avx512::name, avx512bf16::name); \
    return chosen;                                                                                 \
  }
#else
#define MASKACCEL_DISPATCH(Table, name) \
  namespace portable {                  \
  extern const Table name;              \
  }                                     \
  inline const Table& name() { return portable::name; }
#endif
