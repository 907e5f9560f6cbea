// Rows of a K/V cache: what the CPU kernels are told. Free of torch.
#pragma once

#include "../adaln/cpu_args.h"
#include "flags.h"

namespace maskaccel {

// A (B, S, H, Dh) tensor with a dense last dim.
struct Heads {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;
};

struct KvCache {
  void* data = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;
  float* scale = nullptr;  // (B, S, H); null unless the cache is fp8
};

struct WriteKv {
  QkNormRope qk;  // side 1 is k; without tables if k is stored before RoPE
  Heads v;
  KvCache k_cache, v_cache;
  int64_t M = 0, S = 0, H = 0;
  const int32_t* to = nullptr;  // the cache row of each row of k and v, -1: nowhere
  int64_t to_stride = 0;        // 0 if samples share it
};

struct ReadKv {
  Heads cache;
  const float* scale = nullptr;  // (B, S, H)
  int64_t S = 0, H = 0, Dh = 0;
  Dtype dtype = Dtype::f32;
  void* out = nullptr;  // (B, S, H, Dh)
  bool past_cache = false;
};

struct KvKernels {
  void (*write)(const WriteKv&, int64_t begin, int64_t end);  // rows of k and v
  void (*read)(const ReadKv&, int64_t begin, int64_t end);    // rows of the cache
};

MASKACCEL_DISPATCH(KvKernels, kv_kernels)

}  // namespace maskaccel
