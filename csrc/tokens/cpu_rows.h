// Rows of tokens gathered and merged: what the CPU kernels are told. Free of torch.
#pragma once

#include "../adaln/cpu_args.h"
#include "flags.h"

namespace maskaccel {

// An index tensor of int32; its stride is 0 if one serves all samples.
struct Index {
  const int32_t* data = nullptr;
  int64_t stride = 0, count = 0;
  const int32_t* of(int64_t b) const { return data + b * stride; }
};

struct GatherRows {
  Rows x;
  Index ids;
  int64_t N = 0, D = 0;
  Dtype dtype = Dtype::f32;
  void* out = nullptr;  // (B, ids.count, D)
  bool past_cache = false;
};

struct SegmentRows {
  Rows x;
  Index order, offsets;
  int64_t S = 0, D = 0;
  Dtype dtype = Dtype::f32;
  bool mean = false;
  void* out = nullptr;  // (B, S, D)
};

// `full` and `rows` as (B, N, D) and (B, K, D). The backward op reads dout from `full`.
struct MergeRows {
  Rows full, rows, gate, pos;  // stride_n of a gate that all slots share is 0
  Index ids, inverse;
  int64_t N = 0, K = 0, D = 0;
  Merge mode = Merge::replace;
  Dtype dtype = Dtype::f32, gate_dtype = Dtype::f32, pos_dtype = Dtype::f32, mask_dtype = Dtype::f32;
  const void* mask_token = nullptr;
  float lam = 0.0f, rest = 1.0f;  // rest: 1 - lam
  void* out = nullptr;
  bool past_cache = false;
  // Sums of a gradient: partial rows of fp32, (B, chunks, D).
  int64_t chunk = 0, chunks = 0;
  float* partial = nullptr;
};

struct GatherModulate {
  AdalnForward norm;  // N: tokens of x; y: (B, ids.count, D), or null where r alone is wanted
  Index ids;
};

struct RowsKernels {
  // Ranges are rows of the result, of all samples, or chunks.
  void (*gather)(const GatherRows&, int64_t begin, int64_t end);
  void (*segment)(const SegmentRows&, int64_t begin, int64_t end);
  void (*merge)(const MergeRows&, int64_t begin, int64_t end);
  void (*merge_dfull)(const MergeRows&, int64_t begin, int64_t end);
  void (*merge_drows)(const MergeRows&, int64_t begin, int64_t end);
  void (*merge_dgate)(const MergeRows&, int64_t begin, int64_t end);      // a row for each slot, fp32
  void (*merge_dgate_sum)(const MergeRows&, int64_t begin, int64_t end);  // chunks of slots
  void (*merge_dmask_sum)(const MergeRows&, int64_t begin, int64_t end);  // chunks of tokens
  void (*gather_modulate)(const GatherModulate&, int64_t begin, int64_t end);
};

MASKACCEL_DISPATCH(RowsKernels, rows_kernels)

}  // namespace maskaccel
