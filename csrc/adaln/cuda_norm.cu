// Bindings of the adaLN forward ops to CUDA.
#include "cuda_args.h"

namespace maskaccel::cuda {
namespace {

template <int kMode>
void forward(const Operands& o, ForwardParams& p) {
  p.c = o.c;
  p.out_vec = o.c.width % kVec == 0;
  by_dtype(o.dtype, [&](auto tag) {
    run_forward<typename decltype(tag)::type, kMode>(o.call.op(), p, o.call.info(), o.call.stream());
  });
}

void norm(const char* op, bool pair, bool bare, StableIValue* stack) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), scale = in.optional("scale"), shift = in.optional("shift");
  const Arg scale2 = pair ? in.optional("scale2") : Arg{}, shift2 = pair ? in.optional("shift2") : Arg{};
  const Arg weight = in.rare("weight"), bias = in.rare("bias");
  const Arg scale_table = in.rare("scale_table"), shift_table = in.rare("shift_table"), rows = in.rare("rows");
  const Numbers n = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, in.number(), in.integer()};

  const Call call(op, x);
  Operands o(call, x, n.flags);
  o.c.eps = static_cast<float>(n.eps);
  o.c.offset = static_cast<float>(n.offset);
  o.rows(rows);
  o.c.modulation_wide = call.one_dtype(o.dtype, {&scale, &shift, &scale2, &shift2, &scale_table, &shift_table});
  o.c.weight_wide = call.one_dtype(o.dtype, {&weight, &bias});
  ForwardParams p;
  p.x = o.activation(x);
  p.scale = o.modulation(scale, scale_table);
  p.shift = o.modulation(shift, shift_table);
  p.scale2 = o.modulation(scale2, Arg{});
  p.shift2 = o.modulation(shift2, Arg{});
  p.weight = o.vector(weight);
  p.bias = o.vector(bias);
  Result y = o.like_x(true), y2;
  p.y = y.data();
  if (pair) {
    y2 = o.like_x(true);
    p.y2 = y2.data();
  }
  forward<kNormalise>(o, p);
  stack[0] = y.release();
  if (pair) stack[1] = y2.release();
}

void gated(const char* op, bool normalised, bool pair, bool bare, StableIValue* stack) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), a = in.tensor("a"), gate = in.optional("gate"), gate_table = in.rare("gate_table");
  const Arg post_weight = in.rare("post_weight");
  Arg scale, shift, scale2, shift2, weight, bias, scale_table, shift_table;
  if (normalised) {
    scale = in.optional("scale");
    shift = in.optional("shift");
    if (pair) {
      scale2 = in.optional("scale2");
      shift2 = in.optional("shift2");
    }
    weight = in.rare("weight");
    bias = in.rare("bias");
    scale_table = in.rare("scale_table");
    shift_table = in.rare("shift_table");
  }
  const Arg rows = in.rare("rows");
  const Numbers n = bare         ? unpacked(in.integer())
                    : normalised ? Numbers{in.number(), in.number(), in.number(), in.integer()}
                                 : Numbers{0.0, in.number(), 0.0, in.integer()};

  const Call call(op, x);
  Operands o(call, x, n.flags);
  o.c.eps = static_cast<float>(n.eps);
  o.c.post_eps = static_cast<float>(n.post_eps);
  o.c.offset = static_cast<float>(n.offset);
  o.rows(rows);
  o.c.modulation_wide =
      call.one_dtype(o.dtype, {&gate, &gate_table, &scale, &shift, &scale2, &shift2, &scale_table, &shift_table});
  o.c.weight_wide = call.one_dtype(o.dtype, {&weight, &bias, &post_weight});
  ForwardParams p;
  p.x = o.activation(x);
  p.a = o.activation(a);
  p.gate = o.modulation(gate, gate_table);
  p.scale = o.modulation(scale, scale_table);
  p.shift = o.modulation(shift, shift_table);
  p.scale2 = o.modulation(scale2, Arg{});
  p.shift2 = o.modulation(shift2, Arg{});
  p.weight = o.vector(weight);
  p.bias = o.vector(bias);
  p.post_weight = o.vector(post_weight);

  const bool store = !normalised || !(n.flags & kNoResidual);
  Result r = o.like_x(store), y, y2;
  p.r = store ? r.data() : nullptr;
  if (normalised) {
    y = o.like_x(true);
    p.y = y.data();
    if (pair) {
      y2 = o.like_x(true);
      p.y2 = y2.data();
    }
    forward<kBoth>(o, p);
  } else {
    forward<kResidual>(o, p);
  }
  stack[0] = r.release();
  if (normalised) stack[1] = y.release();
  if (pair) stack[2] = y2.release();
}

void norm_modulate(StableIValue* stack, uint64_t, uint64_t) { norm("norm_modulate", false, false, stack); }
void norm_modulate_bare(StableIValue* stack, uint64_t, uint64_t) { norm("norm_modulate", false, true, stack); }
void norm_modulate_pair(StableIValue* stack, uint64_t, uint64_t) { norm("norm_modulate_pair", true, false, stack); }
void norm_modulate_pair_bare(StableIValue* stack, uint64_t, uint64_t) { norm("norm_modulate_pair", true, true, stack); }
void gate_residual(StableIValue* stack, uint64_t, uint64_t) { gated("gate_residual", false, false, false, stack); }
void gate_residual_bare(StableIValue* stack, uint64_t, uint64_t) { gated("gate_residual", false, false, true, stack); }
void gate_residual_norm_modulate(StableIValue* stack, uint64_t, uint64_t) {
  gated("gate_residual_norm_modulate", true, false, false, stack);
}
void gate_residual_norm_modulate_bare(StableIValue* stack, uint64_t, uint64_t) {
  gated("gate_residual_norm_modulate", true, false, true, stack);
}
void gate_residual_norm_modulate_pair(StableIValue* stack, uint64_t, uint64_t) {
  gated("gate_residual_norm_modulate_pair", true, true, false, stack);
}
void gate_residual_norm_modulate_pair_bare(StableIValue* stack, uint64_t, uint64_t) {
  gated("gate_residual_norm_modulate_pair", true, true, true, stack);
}

void register_ops(Library& m) {
  m.impl("norm_modulate", &norm_modulate);
  m.impl("norm_modulate_pair", &norm_modulate_pair);
  m.impl("gate_residual", &gate_residual);
  m.impl("gate_residual_norm_modulate", &gate_residual_norm_modulate);
  m.impl("gate_residual_norm_modulate_pair", &gate_residual_norm_modulate_pair);
}

void register_bare(Library& m) {
  m.impl("norm_modulate_bare", &norm_modulate_bare);
  m.impl("norm_modulate_pair_bare", &norm_modulate_pair_bare);
  m.impl("gate_residual_bare", &gate_residual_bare);
  m.impl("gate_residual_norm_modulate_bare", &gate_residual_norm_modulate_bare);
  m.impl("gate_residual_norm_modulate_pair_bare", &gate_residual_norm_modulate_pair_bare);
}

MASKACCEL_CUDA_LIBRARY(register_ops)
MASKACCEL_CUDA_RAW_LIBRARY(register_bare)

}  // namespace
}  // namespace maskaccel::cuda
