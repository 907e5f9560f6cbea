// relative_difference and combine_history on CPU tensors; the contract is in maskaccel/ops/steps/schema.py.
#include "../common/stable.h"
#include "cpu_args.h"

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
  STD_TORCH_CHECK(x.dim >= 1, "x must have a batch dim");
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
  STD_TORCH_CHECK(history.dim == 4, "history must be (K, B, N, D), got ", history.dim, " dimensions");
  CombineHistory s;
  s.K = history.size(0);
  s.B = history.size(1);
  s.N = history.size(2);
  s.D = history.size(3);
  s.history_dtype = dtype_of_arg(history);
  STD_TORCH_CHECK(s.K >= 1 && s.K <= CombineHistory::kMost, "history must hold 1 to 16 entries, got ", s.K);
  STD_TORCH_CHECK(history.dense_last() && (s.N <= 1 || history.stride(2) == s.D), "history must be dense in N and D");
  s.history = history.data;
  s.stride_k = history.stride(0);
  s.stride_b = history.stride(1);
  s.stride_n = history.stride(2);
  STD_TORCH_CHECK(weights.code == codes().f32 && weights.contiguous(), "weights must be contiguous float32");
  STD_TORCH_CHECK((weights.dim == 1 || (weights.dim == 2 && weights.size(1) == s.D)) && weights.size(0) == s.K,
                  "weights must have shape (K,) or (K, D)");
  s.weights = static_cast<const float*>(weights.data);
  s.weight_stride = weights.dim == 2 ? s.D : 0;
  s.dtype = s.history_dtype;
  if (x) {
    s.dtype = dtype_of_arg(x);
    STD_TORCH_CHECK(x.dim == 3 && x.size(0) == s.B && x.size(1) == s.N && x.size(2) == s.D && x.dense_last(),
                    "x must be (B, N, D) of history, contiguous in its last dim");
    s.x = x.data;
    s.x_b = x.stride(0);
    s.x_n = x.stride(1);
  }
  if (gate) {
    s.gate_dtype = dtype_of_arg(gate);
    STD_TORCH_CHECK(s.gate_dtype == s.dtype || s.gate_dtype == Dtype::f32,
                    "gate must be float32 or of the dtype of the result");
    STD_TORCH_CHECK((gate.dim == 2 || gate.dim == 3) && gate.size(-1) == s.D && gate.dense_last() &&
                        (gate.size(0) == s.B || gate.size(0) == 1),
                    "gate must be (B, D) or (B, F, D) with a contiguous last dim");
    const int64_t groups = gate.dim == 3 ? gate.size(1) : 1;
    STD_TORCH_CHECK(groups > 0 ? s.N % groups == 0 : s.N == 0, "gate has ", groups,
                    " rows a sample, which must divide the ", s.N, " tokens");
    s.gate = gate.data;
    s.gate_b = gate.size(0) == 1 ? 0 : gate.stride(0);
    s.gate_row = gate.dim == 3 ? gate.stride(1) : 0;
    s.group = groups > 0 && s.N > 0 ? s.N / groups : 1;
  }
  Output out({s.B, s.N, s.D}, s.dtype);
  s.out = out.data();
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
