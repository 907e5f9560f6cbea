// One token and its confidence from a row of logits: what the CPU kernels are told. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"
#include "flags.h"
#include "philox.h"

namespace maskaccel {

// What is known of a chunk of a row; x = (logit - most) * scale.
struct Drawn {
  float best = 0.0f;  // logit + temperature * noise of the token `id`; -1: none that is above an earlier chunk's
  int32_t id = -1;
  float logit = 0.0f;                // of that token
  float most = 0.0f, second = 0.0f;  // the two largest logits; `second` for the margin alone
  double sum = 0.0, weighted = 0.0;  // of e^x, and of x e^x; that one for the entropy alone
  bool bad = false;                  // a NaN or +inf was found
};

struct Sample {
  const void* logits = nullptr;
  int64_t stride_b = 0, stride_n = 0, N = 0, V = 0;
  Dtype dtype = Dtype::f32;
  const float* noise = nullptr;  // (B, N, V), or null: that of the counters
  int64_t seed = 0, offset = 0, step = 0;
  float temperature = 0.0f;
  double scale = 1.0;
  Confidence kind = Confidence::probability;
  const int64_t* rows = nullptr;  // b * N + n of the rows that are sampled
  int64_t chunk = 0, chunks = 0;  // logits of a chunk, chunks of a row
  Drawn* out = nullptr;           // (rows, chunks)
};

struct SampleKernels {
  void (*sample)(const Sample&, int64_t begin, int64_t end);  // chunks of all rows
};

MASKACCEL_DISPATCH(SampleKernels, sample_kernels)

}  // namespace maskaccel
