// gram on CPU tensors; the contract is in maskaccel/ops/steps/schema.py.
#include "cpu_gram.h"

#include "../common/stable.h"

namespace maskaccel {
namespace {

Output doubles(std::initializer_list<int64_t> sizes) {
  return Output(sizes.begin(), static_cast<int>(sizes.size()), codes().f64, int64_t{sizeof(double)});
}

void gram(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history");
  const bool per_sample = in.boolean();
  STD_TORCH_CHECK(history.dim == 4, "history must be (K, B, N, D), got ", history.dim, " dimensions");
  Gram s;
  s.dtype = dtype_of_arg(history);
  s.K = history.size(0);
  STD_TORCH_CHECK(s.K >= 1 && s.K <= Gram::kMost, "history must hold 1 to 16 entries, got ", s.K);
  const int64_t B = history.size(1), N = history.size(2), D = history.size(3);
  STD_TORCH_CHECK(D > 0, "history must have a last dim of at least 1");
  STD_TORCH_CHECK(history.numel() == 0 || (history.dense_last() && (N <= 1 || history.stride(2) == D)),
                  "history must be dense in N and D");
  s.history = history.data;
  s.stride_k = history.stride(0);
  s.stride_b = history.stride(1);
  s.size = N * D;
  s.chunk = 16384;
  s.chunks = (s.size + s.chunk - 1) / s.chunk;
  const int64_t K = s.K, matrices = per_sample ? B : 1;
  Output out = per_sample ? doubles({B, K, K}) : doubles({K, K});
  const Output partial = doubles({B, s.chunks, K, K});
  s.partial = static_cast<double*>(partial.data());
  const GramKernels& kernels = gram_kernels();
  parallel(B * s.chunks, 1, [&](int64_t begin, int64_t end) { kernels.gram(s, begin, end); });
  const int64_t chunks = per_sample ? s.chunks : B * s.chunks;
  double* const result = static_cast<double*>(out.data());
  for (int64_t m = 0; m < matrices; ++m)
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = i; j < K; ++j) {
        long double sum = 0.0L;  // thousands of chunks: one more rounding each would show
        for (int64_t c = 0; c < chunks; ++c) sum += s.partial[((m * chunks + c) * K + i) * K + j];
        result[(m * K + i) * K + j] = result[(m * K + j) * K + i] = static_cast<double>(sum);
      }
  stack[0] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("gram", gram); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
