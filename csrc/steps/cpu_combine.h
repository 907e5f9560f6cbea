// Arguments of a weighted sum of remembered features, as read and checked for CPU tensors.
#pragma once

#include "../common/stable.h"
#include "cpu_args.h"

namespace maskaccel {

// All but the output; the contract is in maskaccel/ops/steps/schema.py.
inline CombineHistory read_combine(const Arg& history, const Arg& weights, const Arg& x, const Arg& gate) {
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
  return s;
}

}  // namespace maskaccel
