// A forecast at a step that computed a few rows: what the CPU kernels are told. Free of torch.
#pragma once

#include "cpu_args.h"

namespace maskaccel {

// Means of groups of fresh rows.
struct GroupMeans {
  const void* fresh = nullptr;     // (rows, D), of all samples
  const int32_t* order = nullptr;  // rows of fresh, group after group
  const int32_t* begin = nullptr;  // (groups + 1) places in `order`
  int64_t D = 0;
  Dtype dtype = Dtype::f32;
  float* mean = nullptr;  // (groups, D)
};

// `history` is the whole of it; its newest entry, at `newest`, is written before it is read.
struct ScatterCombine : CombineHistory {
  void* newest = nullptr;
  const void* fresh = nullptr;     // (rows, D), of all samples
  const int32_t* row = nullptr;    // (B * N) row of fresh that a token takes, -1: none
  const int32_t* group = nullptr;  // (B * N) group whose mean a token moves to, -1: none; null: nowhere
  const float* mean = nullptr;     // (groups, D)
  float gamma = 0.0f;
};

struct ScatterKernels {
  void (*group_means)(const GroupMeans&, int64_t begin, int64_t end);          // groups
  void (*scatter_combine)(const ScatterCombine&, int64_t begin, int64_t end);  // rows
};

MASKACCEL_DISPATCH(ScatterKernels, scatter_kernels)

}  // namespace maskaccel
