// Launches the column sums of the sm_80 path.
#include "cuda_sums.cuh"

namespace maskaccel::cuda {

void launch_sm80_sums(const AttentionArgs& a, float* sums, Stream stream) {
  SumParams params;
  params.a = a;
  params.sums = sums;
  by_instance(a, [&](auto instance) {
    using I = decltype(instance);
    using Plan = SumPlan<Instance<typename I::T, I::kWidth>>;  // values play no part
    const int64_t lines = int64_t{a.batch} * a.heads * a.tile_columns, blocks = ceil_div(a.bn, Plan::kRows);
    launch("attention_column_sums", attention_sums_kernel<Plan>, dim3(static_cast<unsigned>(lines * blocks)),
           Plan::kThreads, Plan::kShared, stream, params);
  });
}

}  // namespace maskaccel::cuda
