// Random words and metrics by which tokens are ranked: what the CPU kernels are told. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "philox.h"

namespace maskaccel {

struct KeepKernels {
  // The words of items first, first + 1, ...
  void (*words)(const Stream&, uint32_t first, int64_t count, uint32_t* out);
  // score * decay[clamp(age, 0, ages - 1)] + 0.0, -inf for NaN
  void (*aged)(const float* score, const int32_t* age, const float* decay, int64_t ages, int64_t count, float* out);
  // v + temperature * noise; without noise that of the items 0, 1, ...
  void (*noisy)(const float* v, const float* noise, const Stream&, float temperature, int64_t count, float* out);
};

MASKACCEL_DISPATCH(KeepKernels, keep_kernels)

}  // namespace maskaccel
