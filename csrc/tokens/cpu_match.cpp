// match_tokens on CPU tensors; the contract is in maskaccel/ops/tokens/schema.py.
#include "cpu_match.h"

#include "cpu_checks.h"

namespace maskaccel {
namespace {

void match_tokens(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg metric = in.tensor("metric"), src = in.tensor("src"), dst = in.tensor("dst");
  STD_TORCH_CHECK(metric.dim == 3 && metric.dense_last(), "metric must be (B, N, C) with a contiguous last dim");
  MatchTokens s;
  s.dtype = dtype_of_arg(metric);
  s.metric = {metric.data, metric.stride(0), metric.stride(1)};
  const int64_t B = metric.size(0);
  s.N = metric.size(1);
  s.C = metric.size(2);
  s.width = (s.C + 1) / 2 * 2;
  const Samples<int32_t> from = samples<int32_t>(src, B, -1, "Ns"), to = samples<int32_t>(dst, B, -1, "Nd");
  s.src = from.data;
  s.src_stride = from.stride;
  s.Ns = from.count;
  s.dst = to.data;
  s.dst_stride = to.stride;
  s.Nd = to.count;
  STD_TORCH_CHECK(s.Nd >= 1 && s.Nd < int64_t{1} << 31, "dst has ", s.Nd, " ids a sample; allowed are 1 to 2^31 - 1");
  s.row_blocks = (s.Ns + kMatchRows - 1) / kMatchRows;
  s.column_blocks = (s.Nd + kMatchColumns - 1) / kMatchColumns;
  Output best = integers({B, s.Ns}), similarity({B, s.Ns}, Dtype::f32);
  s.best = ints(best);
  s.similarity = similarity.floats();
  const bool any = B * s.Ns > 0;
  const Output packed({any ? B : 0, s.column_blocks, s.width, kMatchColumns}, Dtype::f32),
      inverse({any ? B : 0, s.column_blocks, kMatchColumns}, Dtype::f32);
  s.packed = packed.floats();
  s.inverse = inverse.floats();
  const MatchKernels& kernels = match_kernels();
  if (any) {
    parallel(B * s.column_blocks, 1, [&](int64_t begin, int64_t end) { kernels.pack(s, begin, end); });
    parallel(B * s.row_blocks, 1, [&](int64_t begin, int64_t end) { kernels.match(s, begin, end); });
  }
  stack[0] = best.release();
  stack[1] = similarity.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("match_tokens", match_tokens); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
