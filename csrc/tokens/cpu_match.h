// Each token's most similar one among others: what the CPU kernels are told. Free of torch.
#pragma once

#include "../adaln/cpu_args.h"

namespace maskaccel {

// Rows that are matched at a time, and columns of a block: a block is read once for all of the rows.
constexpr int64_t kMatchRows = 96, kMatchColumns = 64;

struct MatchTokens {
  Rows metric;
  const int32_t *src = nullptr, *dst = nullptr;  // (B|1, Ns), (B|1, Nd)
  int64_t src_stride = 0, dst_stride = 0;
  int64_t N = 0, C = 0, Ns = 0, Nd = 0;
  int64_t row_blocks = 0, column_blocks = 0;  // of a sample
  int64_t width = 0;                          // C, filled up to an even number
  Dtype dtype = Dtype::f32;
  float* packed = nullptr;   // (B, column_blocks, width, kMatchColumns)
  float* inverse = nullptr;  // (B, column_blocks, kMatchColumns): one over the length, 0 for none
  int32_t* best = nullptr;
  float* similarity = nullptr;
};

struct MatchKernels {
  void (*pack)(const MatchTokens&, int64_t begin, int64_t end);   // blocks of columns, of all samples
  void (*match)(const MatchTokens&, int64_t begin, int64_t end);  // blocks of rows, of all samples
};

MASKACCEL_DISPATCH(MatchKernels, match_kernels)

}  // namespace maskaccel
