// combine_history_norm_modulate and norm_modulate_difference on CPU tensors; the contract is in
// maskaccel/ops/steps/schema.py.
#include "cpu_norm.h"

#include "../adaln/cpu_checks.h"
#include "cpu_combine.h"

namespace maskaccel {
namespace {

// The operands of norm_modulate from `scale` on. `x` tells shape and dtype of what is normalised.
struct NormInputs {
  Arg scale, shift, weight, bias, scale_table, shift_table, rows;
  Numbers numbers;

  explicit NormInputs(Inputs& in)
      : scale(in.optional("scale")),
        shift(in.optional("shift")),
        weight(in.optional("weight")),
        bias(in.optional("bias")),
        scale_table(in.optional("scale_table")),
        shift_table(in.optional("shift_table")),
        rows(in.optional("rows")) {
    numbers.eps = in.number();
    numbers.offset = in.number();
    numbers.flags = in.integer();
  }

  void read(AdalnForward& f, Checked& check) const {
    check.numbers(numbers);
    check.rows(rows);
    f.scale = check.modulation(scale, scale_table);
    f.shift = check.modulation(shift, shift_table);
    f.weight = check.affine(weight);
    f.bias = check.affine(bias);
    check.row_values();
  }
};

void combine_history_norm_modulate(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history"), weights = in.tensor("weights"), x = in.optional("x"),
            gate = in.optional("gate");
  const NormInputs operands(in);
  CombineNorm s;
  s.combine = read_combine(history, weights, x, gate);
  Checked check(s.norm, x ? x : history.first());
  operands.read(s.norm, check);
  const int64_t B = s.combine.B, N = s.combine.N, D = s.combine.D;
  Output h({B, N, D}, s.combine.dtype), y({B, N, D}, s.combine.dtype);
  s.combine.out = h.data();
  s.norm.y = y.data();
  s.combine.past_cache = s.norm.past_cache = past_cache(h, D * size_of(s.combine.dtype));
  const StepsNormKernels& kernels = steps_norm_kernels();
  parallel(B * N, grain_for(D * (s.combine.K + 3) / 2),
           [&](int64_t begin, int64_t end) { kernels.combine_norm(s, begin, end); });
  stack[0] = h.release();
  stack[1] = y.release();
}

void norm_modulate_difference(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), reference = in.tensor("reference");
  const NormInputs operands(in);
  NormDifference s;
  Checked check(s, x);
  s.x = check.activation(x);
  s.reference = check.activation(reference);
  operands.read(s, check);
  Output y({s.B, s.N, s.D}, s.dtype), out({s.B, 2}, Dtype::f32), sums({s.B, s.N, 2}, Dtype::f32);
  s.y = y.data();
  s.sums = sums.floats();
  s.past_cache = past_cache(y, s.D * size_of(s.dtype));
  const StepsNormKernels& kernels = steps_norm_kernels();
  parallel(s.B * s.N, grain_for(s.D),
           [&](int64_t begin, int64_t end) { kernels.norm_difference(s, begin, end); });
  for (int64_t b = 0; b < s.B; ++b) {
    double change = 0.0, size = 0.0;
    for (int64_t n = 0; n < s.N; ++n) {
      change += s.sums[2 * (b * s.N + n)];
      size += s.sums[2 * (b * s.N + n) + 1];
    }
    out.floats()[2 * b] = static_cast<float>(change);
    out.floats()[2 * b + 1] = static_cast<float>(size);
  }
  stack[0] = y.release();
  stack[1] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("combine_history_norm_modulate", combine_history_norm_modulate);
  m.impl("norm_modulate_difference", norm_modulate_difference);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
