// The step ops with a norm: what their CPU kernels are told. Free of torch.
#pragma once

#include "../adaln/cpu_args.h"
#include "cpu_args.h"

namespace maskaccel {

struct CombineNorm {
  CombineHistory combine;  // its result is what the norm reads
  AdalnForward norm;
};

struct NormDifference : AdalnForward {
  Rows reference;
  float* sums = nullptr;  // (B, N, 2): those of one token
};

struct StepsNormKernels {
  void (*combine_norm)(const CombineNorm&, int64_t begin, int64_t end);        // rows
  void (*norm_difference)(const NormDifference&, int64_t begin, int64_t end);  // rows
};

MASKACCEL_DISPATCH(StepsNormKernels, steps_norm_kernels)

}  // namespace maskaccel
