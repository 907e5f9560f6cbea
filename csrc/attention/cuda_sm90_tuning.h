// What may be tuned in the forward on sm_90a. The library has the values below. tools/build_variants.py compiles the
// kernel with others, in a library of its own, for benchmarks/gpu/variants.py to compare.
#pragma once

#include "cuda_grid.h"

namespace maskaccel::cuda::sm90 {

struct Tuning {
  int dim = 0;        // the only head dim (of 64, 80, 96, 128, 256) that is compiled, in bf16 without keep bits; 0: all
  int keys = 0;       // of a block; 0: by head dim
  int stages = 0;     // blocks of keys, and of values, in shared memory; 0: by head dim
  int consumers = 2;  // warp groups that own 64 rows each
  int turns = -1;     // whether consumers start their products in turns; -1: with blocks of 128 keys or more
  int window = kWindow;
  int polynomial = 0;  // every so many-th exponential is a polynomial; 0: none
};

constexpr Tuning tuning() {
  Tuning t;
#ifdef MASKACCEL_TUNING
  MASKACCEL_TUNING;  // such as t.keys=64;t.stages=6
#endif
  return t;
}

constexpr Tuning kTuning = tuning();
static_assert(kTuning.consumers == 2 || kTuning.consumers == 3);

/// Keys of a block for heads of up to `dim` elements.
constexpr int block_keys(int dim) { return kTuning.keys != 0 ? kTuning.keys : dim > 128 ? 64 : 128; }

}  // namespace maskaccel::cuda::sm90
