// Two partial attention results as one: what the CPU kernels are told. Free of torch.
#pragma once

#include "cpu_problem.h"

namespace maskaccel {

struct MergeAttention {
  int64_t B = 0, S = 0, H = 0, D = 0;
  Dtype dtype = Dtype::f32;
  HeadRows part[2];                          // out1, out2
  const float* part_lse[2] = {nullptr, nullptr};  // (B, H, S)
  void* out = nullptr;                       // (B, S, H, D)
  float* lse = nullptr;                      // (B, H, S)
  bool past_cache = false;                   // results are written past the cache
};

struct MergeAttentionBackward : MergeAttention {
  HeadRows dout;
  const float* dlse = nullptr;  // (B, H, S), null: zero
  void* dpart[2] = {nullptr, nullptr};
  float* dpart_lse[2] = {nullptr, nullptr};
};

struct MergeKernels {
  void (*merge)(const MergeAttention&, int64_t begin, int64_t end);  // tokens of all samples
  void (*backward)(const MergeAttentionBackward&, int64_t begin, int64_t end);
};

MASKACCEL_DISPATCH(MergeKernels, merge_kernels)

}  // namespace maskaccel
