// Launches the backward of the sm_80 path.
#include "cuda_backward.cuh"

namespace maskaccel::cuda {
namespace {

constexpr const char* kOp = "tile_attention_backward";

/// Rows of tiles, and the pieces that the last one's end may reach past them.
int64_t padded_queries(const AttentionArgs& a) { return int64_t{a.tile_rows} * a.bm + 64; }

template <typename Plan>
void launch_gradient(const GradientParams& params, Stream stream) {
  const AttentionArgs& a = params.a;
  const int64_t lines =
      int64_t{a.batch} * (Plan::kKeyRows ? int64_t{a.key_heads} * a.tile_columns : int64_t{a.heads} * a.tile_rows);
  const int64_t blocks = ceil_div(Plan::kKeyRows ? a.bn : a.bm, Plan::kRows);
  launch(kOp, attention_backward_kernel<Plan>, dim3(static_cast<unsigned>(lines * blocks), Plan::kSplit),
         Plan::kThreads, Plan::kShared, stream, params);
}

template <typename I>
void launch_instance(const GradientParams& params, Stream stream) {
  const AttentionArgs& a = params.a;
  if (a.needs & (kNeedQ | kNeedS)) launch_gradient<BackwardPlan<I, false>>(params, stream);
  if (a.needs & (kNeedK | kNeedV)) launch_gradient<BackwardPlan<I, true>>(params, stream);
}

template <typename T>
void launch_delta(const GradientParams& params, Stream stream) {
  const AttentionArgs& a = params.a;
  int64_t lanes = 2;
  while (lanes * kVec < a.dim) lanes *= 2;
  const int64_t threads = int64_t{a.batch} * a.heads * params.terms.padded * lanes;
  launch(kOp, attention_delta_kernel<T>, dim3(static_cast<unsigned>(ceil_div(threads, 128))), 128, 0, stream, params);
}

}  // namespace

void launch_row_terms(const AttentionArgs& a, const RowTerms& terms, Stream stream) {
  const GradientParams params{a, terms};
  if (a.dtype == Dtype::bf16) return launch_delta<bf16>(params, stream);
  launch_delta<fp16>(params, stream);
}

int64_t backward_workspace(const AttentionArgs& a) { return 2 * int64_t{a.batch} * a.heads * padded_queries(a); }

void launch_sm80_backward(const AttentionArgs& a, float* workspace, Stream stream) {
  GradientParams params;
  params.a = a;
  params.terms.padded = static_cast<int>(padded_queries(a));
  params.terms.lse = workspace;
  params.terms.delta = workspace + int64_t{a.batch} * a.heads * padded_queries(a);
  launch_row_terms(a, params.terms, stream);
  by_instance(a, [&](auto instance) { launch_instance<decltype(instance)>(params, stream); });
}

}  // namespace maskaccel::cuda
