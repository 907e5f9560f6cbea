// Launches the forward of the sm_80 path.
#include "cuda_forward.cuh"

namespace maskaccel::cuda {
namespace {

template <typename Plan>
void launch_plan(const AttentionArgs& a, Stream stream) {
  const int64_t lines = int64_t{a.batch} * a.heads * a.tile_rows, pieces = ceil_div(a.bm, Plan::kRows);
  launch("tile_attention", attention_forward_kernel<Plan>, dim3(static_cast<unsigned>(lines * pieces)), Plan::kThreads,
         Plan::kShared, stream, a);
}

}  // namespace

void launch_sm80(const AttentionArgs& a, Stream stream) {
  const bool general = a.flags != 0 || adds_to_scores(a) || !(a.q.vec && a.k.vec && a.v.vec);
  by_instance(a, [&](auto instance) {
    using I = decltype(instance);
    if (general) return launch_plan<ForwardPlan<I, true>>(a, stream);
    launch_plan<ForwardPlan<I, false>>(a, stream);
  });
}

}  // namespace maskaccel::cuda
