// Launches the forward of the sm_80 path.
#include "cuda_forward.cuh"

namespace maskaccel::cuda {
namespace {

template <typename Plan>
void launch_forward(const AttentionArgs& a, Stream stream) {
  const int64_t lines = int64_t{a.batch} * a.heads * a.tile_rows, pieces = ceil_div(a.bm, Plan::kRows);
  launch("tile_attention", attention_forward_kernel<Plan>, dim3(static_cast<unsigned>(lines * pieces)), Plan::kThreads,
         Plan::kShared, stream, a);
}

template <typename T, int kWidth, int kValues = kWidth>
void launch_plan(const AttentionArgs& a, Stream stream) {
  if (a.flags != 0 || adds_to_scores(a) || !(a.q.vec && a.k.vec && a.v.vec)) return launch_forward<ForwardPlan<T, kWidth, kValues, true>>(a, stream);
  launch_forward<ForwardPlan<T, kWidth, kValues, false>>(a, stream);
}

/// The narrowest instance that holds the head.
template <typename T>
void launch_dim(const AttentionArgs& a, Stream stream) {
  if (a.dim <= 64) return launch_plan<T, 64>(a, stream);
  if (a.dim == 72) return launch_plan<T, 80, 72>(a, stream);
  if (a.dim <= 96) return launch_plan<T, 96>(a, stream);
  if (a.dim <= 128) return launch_plan<T, 128>(a, stream);
  return launch_plan<T, 256>(a, stream);
}

}  // namespace

void launch_sm80(const AttentionArgs& a, Stream stream) {
  if (a.dtype == Dtype::bf16) return launch_dim<bf16>(a, stream);
  return launch_dim<fp16>(a, stream);
}

}  // namespace maskaccel::cuda
