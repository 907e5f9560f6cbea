// norm_modulate, gate_residual and their fusion, forward, on CPU tensors.
#include "cpu_checks.h"

namespace maskaccel {
namespace {

void run(AdalnForward& f) {
  const int64_t row_bytes = f.D * size_of(f.dtype);
  const int outputs = (f.r != nullptr) + (f.y != nullptr) + (f.y2 != nullptr);
  f.past_cache = row_bytes % kLine == 0 && row_bytes * f.B * f.N * outputs >= kPastCacheFrom;
  const AdalnKernels& kernels = adaln_kernels();
  parallel(f.B * f.N, grain_for(f.D), [&](int64_t begin, int64_t end) { kernels.forward(f, begin, end); });
}

void norm_modulate_any(StableIValue* stack, bool pair, bool bare) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), scale = in.optional("scale"), shift = in.optional("shift");
  const Arg scale2 = pair ? in.optional("scale2") : Arg{}, shift2 = pair ? in.optional("shift2") : Arg{};
  const Arg weight = in.rare("weight"), bias = in.rare("bias");
  const Arg scale_table = in.rare("scale_table"), shift_table = in.rare("shift_table"), rows = in.rare("rows");
  const Numbers numbers = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, in.number(), in.integer()};
  AdalnForward f;
  Checked check(f, x);
  check.numbers(numbers);
  check.rows(rows);
  f.x = check.activation(x);
  f.scale = check.modulation(scale, scale_table);
  f.shift = check.modulation(shift, shift_table);
  f.scale2 = check.modulation(scale2);
  f.shift2 = check.modulation(shift2);
  f.weight = check.affine(weight);
  f.bias = check.affine(bias);
  check.row_values();
  Output y({f.B, f.N, f.D}, f.dtype), y2;
  f.y = y.data();
  if (pair) {
    y2 = Output({f.B, f.N, f.D}, f.dtype);
    f.y2 = y2.data();
  }
  if (!check.empty()) run(f);
  stack[0] = y.release();
  if (pair) stack[1] = y2.release();
}

void gate_residual_norm_modulate_any(StableIValue* stack, bool pair, bool bare) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), a = in.tensor("a"), gate = in.optional("gate"), gate_table = in.rare("gate_table");
  const Arg post_weight = in.rare("post_weight"), scale = in.optional("scale"), shift = in.optional("shift");
  const Arg scale2 = pair ? in.optional("scale2") : Arg{}, shift2 = pair ? in.optional("shift2") : Arg{};
  const Arg weight = in.rare("weight"), bias = in.rare("bias");
  const Arg scale_table = in.rare("scale_table"), shift_table = in.rare("shift_table"), rows = in.rare("rows");
  const Numbers numbers = bare ? unpacked(in.integer()) : Numbers{in.number(), in.number(), in.number(), in.integer()};
  AdalnForward f;
  Checked check(f, x);
  check.numbers(numbers);
  check.rows(rows);
  f.x = check.activation(x);
  f.a = check.activation(a);
  f.gate = check.modulation(gate, gate_table);
  f.scale = check.modulation(scale, scale_table);
  f.shift = check.modulation(shift, shift_table);
  f.scale2 = check.modulation(scale2);
  f.shift2 = check.modulation(shift2);
  f.post_weight = check.affine(post_weight);
  f.weight = check.affine(weight);
  f.bias = check.affine(bias);
  check.row_values();
  const bool keep = !(f.flags & kNoResidual);
  Output r = keep ? Output({f.B, f.N, f.D}, f.dtype) : nothing(f.dtype);
  Output y({f.B, f.N, f.D}, f.dtype), y2;
  f.r = keep ? r.data() : nullptr;
  f.y = y.data();
  if (pair) {
    y2 = Output({f.B, f.N, f.D}, f.dtype);
    f.y2 = y2.data();
  }
  if (!check.empty()) run(f);
  stack[0] = r.release();
  stack[1] = y.release();
  if (pair) stack[2] = y2.release();
}

void gate_residual_any(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), a = in.tensor("a"), gate = in.optional("gate"), gate_table = in.rare("gate_table");
  const Arg post_weight = in.rare("post_weight"), rows = in.rare("rows");
  const Numbers numbers = bare ? unpacked(in.integer()) : Numbers{0.0, in.number(), 0.0, in.integer()};
  AdalnForward f;
  Checked check(f, x);
  check.numbers(numbers);
  check.rows(rows);
  f.x = check.activation(x);
  f.a = check.activation(a);
  f.gate = check.modulation(gate, gate_table);
  f.post_weight = check.affine(post_weight);
  check.row_values();
  Output r({f.B, f.N, f.D}, f.dtype);
  f.r = r.data();
  if (!check.empty()) run(f);
  stack[0] = r.release();
}

void norm_modulate(StableIValue* stack, uint64_t, uint64_t) { norm_modulate_any(stack, false, false); }
void norm_modulate_bare(StableIValue* stack, uint64_t, uint64_t) { norm_modulate_any(stack, false, true); }
void norm_modulate_pair(StableIValue* stack, uint64_t, uint64_t) { norm_modulate_any(stack, true, false); }
void norm_modulate_pair_bare(StableIValue* stack, uint64_t, uint64_t) { norm_modulate_any(stack, true, true); }
void gate_residual_norm_modulate(StableIValue* stack, uint64_t, uint64_t) {
  gate_residual_norm_modulate_any(stack, false, false);
}
void gate_residual_norm_modulate_bare(StableIValue* stack, uint64_t, uint64_t) {
  gate_residual_norm_modulate_any(stack, false, true);
}
void gate_residual_norm_modulate_pair(StableIValue* stack, uint64_t, uint64_t) {
  gate_residual_norm_modulate_any(stack, true, false);
}
void gate_residual_norm_modulate_pair_bare(StableIValue* stack, uint64_t, uint64_t) {
  gate_residual_norm_modulate_any(stack, true, true);
}
void gate_residual(StableIValue* stack, uint64_t, uint64_t) { gate_residual_any(stack, false); }
void gate_residual_bare(StableIValue* stack, uint64_t, uint64_t) { gate_residual_any(stack, true); }

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("norm_modulate", norm_modulate);
  m.impl("norm_modulate_pair", norm_modulate_pair);
  m.impl("gate_residual_norm_modulate", gate_residual_norm_modulate);
  m.impl("gate_residual_norm_modulate_pair", gate_residual_norm_modulate_pair);
  m.impl("gate_residual", gate_residual);
}

void implement_bare(torch::stable::detail::StableLibrary& m) {
  m.impl("norm_modulate_bare", norm_modulate_bare);
  m.impl("norm_modulate_pair_bare", norm_modulate_pair_bare);
  m.impl("gate_residual_norm_modulate_bare", gate_residual_norm_modulate_bare);
  m.impl("gate_residual_norm_modulate_pair_bare", gate_residual_norm_modulate_pair_bare);
  m.impl("gate_residual_bare", gate_residual_bare);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) {
  maskaccel::implement(m);
  maskaccel::implement_bare(m);
}
