// What the CPU kernels of the cached-feature ops are told. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace maskaccel {

struct RelativeDifference {
  const void *x = nullptr, *reference = nullptr, *base = nullptr;
  int64_t size = 0, chunk = 0, chunks = 0;  // elements of a sample and of a chunk, chunks of a sample
  Dtype dtype = Dtype::f32;
  float* partial = nullptr;  // (B, chunks, 2)
};

struct CombineHistory {
  static constexpr int kMost = 16;
  const void* history = nullptr;
  int64_t K = 0, B = 0, N = 0, D = 0, stride_k = 0, stride_b = 0, stride_n = 0;
  const float* weights = nullptr;
  int64_t weight_stride = 0;  // D for (K, D), 0 for (K,)
  const void* x = nullptr;
  int64_t x_b = 0, x_n = 0;
  const void* gate = nullptr;
  int64_t gate_b = 0, gate_row = 0, group = 1;
  Dtype history_dtype = Dtype::f32, dtype = Dtype::f32, gate_dtype = Dtype::f32;  // dtype: of x and of the result
  void* out = nullptr;
  bool past_cache = false;  // the result is written past the cache
};

struct StepsKernels {
  void (*relative_difference)(const RelativeDifference&, int64_t begin, int64_t end);  // chunks of all samples
  void (*combine_history)(const CombineHistory&, int64_t begin, int64_t end);          // rows
};

MASKACCEL_DISPATCH(StepsKernels, steps_kernels)

}  // namespace maskaccel
