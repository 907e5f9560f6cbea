// relative_difference and combine_history on CPU tensors; the contract is in maskaccel/ops/steps/schema.py.
#include "cpu_combine.h"

namespace maskaccel {
namespace {

void check_same(const Arg& a, const Arg& x) {
  bool same = a.dim == x.dim && a.code == x.code;
  for (int64_t i = 0; same && i < x.dim; ++i) same = a.size(i) == x.size(i);
  STD_TORCH_CHECK(same, a.name, " must have the shape and dtype of x");
  STD_TORCH_CHECK(a.contiguous(), a.name, " must be contiguous");
}

void relative_difference(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), reference = in.tensor("reference"), base = in.optional("base");
  RelativeDifference s;
  s.dtype = dtype_of_arg(x);
  STD_TORCH_CHECK(x.dim >= 2, "x must be (B, ...) of two dims or more");
  check_same(x, x);
  check_same(reference, x);
  if (base) check_same(base, x);
  s.x = x.data;
  s.reference = reference.data;
  s.base = base ? base.data : nullptr;
  const int64_t B = x.size(0);
  s.size = B > 0 ? x.numel() / B : 0;
  s.chunk = 16384;
  s.chunks = (s.size + s.chunk - 1) / s.chunk;
  Output out({B, 2}, Dtype::f32), partial({B, s.chunks, 2}, Dtype::f32);
  s.partial = partial.floats();
  const StepsKernels& kernels = steps_kernels();
  parallel(B * s.chunks, 2, [&](int64_t begin, int64_t end) { kernels.relative_difference(s, begin, end); });
  for (int64_t b = 0; b < B; ++b) {
    double change = 0.0, size = 0.0;
    for (int64_t c = 0; c < s.chunks; ++c) {
      change += partial.floats()[2 * (b * s.chunks + c)];
      size += partial.floats()[2 * (b * s.chunks + c) + 1];
    }
    out.floats()[2 * b] = static_cast<float>(change);
    out.floats()[2 * b + 1] = static_cast<float>(size);
  }
  stack[0] = out.release();
}

void combine_history(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history"), weights = in.tensor("weights"), x = in.optional("x"),
            gate = in.optional("gate");
  CombineHistory s = read_combine(history, weights, x, gate);
  Output out({s.B, s.N, s.D}, s.dtype);
  s.out = out.data();
  s.past_cache = past_cache(out, s.D * size_of(s.dtype));
  const StepsKernels& kernels = steps_kernels();
  if (s.D > 0)
    parallel(s.B * s.N, grain_for(s.D * (s.K + 1) / 2),
             [&](int64_t begin, int64_t end) { kernels.combine_history(s, begin, end); });
  stack[0] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("relative_difference", relative_difference);
  m.impl("combine_history", combine_history);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
