// The forward on sm_90a with other constants, as an op of its own. tools/build_variants.py compiles this file once for
// each variant, with MASKACCEL_VARIANT (the op's name), MASKACCEL_TUNING (cuda_sm90_tuning.h) and a name of the variant
// in place of the namespace `maskaccel`, so that all variants fit one library.
#include <cstdlib>

#include "../common/cuda_binding.h"
#include "../common/cuda_device.cu"
#undef MASKACCEL_CUDA_RAW_LIBRARY
#define MASKACCEL_CUDA_RAW_LIBRARY(function)  // what cuda.cu would register
#include "cuda.cu"
#include "cuda_sm90.cu"

namespace maskaccel::cuda {

[[noreturn]] inline void refuse() {
  STD_TORCH_CHECK(false, "tile_attention: this variant does not serve the call");
  std::abort();
}

void launch_sm80(const AttentionArgs&, Stream) { refuse(); }

// What the other ops of cuda.cu would call, which are compiled and not registered.
int64_t backward_workspace(const AttentionArgs&) { refuse(); }
void launch_sm80_backward(const AttentionArgs&, float*, Stream) { refuse(); }
void launch_sm80_sums(const AttentionArgs&, float*, Stream) { refuse(); }
bool sm90_backward_serves(const AttentionArgs&) { return false; }
int64_t sm90_backward_workspace(const AttentionArgs&) { refuse(); }
int64_t sm90_backward_sums(const AttentionArgs&) { refuse(); }
void launch_sm90_backward(const AttentionArgs&, float*, float*, Stream) { refuse(); }

}  // namespace maskaccel::cuda

#ifdef MASKACCEL_EMULATE
STABLE_TORCH_LIBRARY_IMPL(maskaccel_variants, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(maskaccel_variants, CUDA, m) {
#endif
  m.impl(MASKACCEL_VARIANT, &maskaccel::cuda::tile_attention);
}
