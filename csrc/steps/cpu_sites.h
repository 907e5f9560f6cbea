// The forecast of a whole stack: what the CPU kernels are told. Free of torch.
#pragma once

#include "cpu_args.h"

namespace maskaccel {

// The call of site 0; the operands of the other sites follow at these strides (elements).
struct CombineSites : CombineHistory {
  int64_t S = 0, history_site = 0, weight_site = 0, gate_site = 0;
};

struct SitesKernels {
  void (*combine_sites)(const CombineSites&, int64_t begin, int64_t end);  // rows
};

MASKACCEL_DISPATCH(SitesKernels, sites_kernels)

}  // namespace maskaccel
