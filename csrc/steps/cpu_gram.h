// Inner products of remembered features: what the CPU kernels are told. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace maskaccel {

struct Gram {
  static constexpr int kMost = 16;
  const void* history = nullptr;
  int64_t K = 0, stride_k = 0, stride_b = 0;
  int64_t size = 0, chunk = 0, chunks = 0;  // elements of a sample and of a chunk, chunks of a sample
  Dtype dtype = Dtype::f32;
  double* partial = nullptr;  // (B, chunks, K, K), of which the upper triangle is written
};

struct GramKernels {
  void (*gram)(const Gram&, int64_t begin, int64_t end);  // chunks of all samples
};

MASKACCEL_DISPATCH(GramKernels, gram_kernels)

}  // namespace maskaccel
