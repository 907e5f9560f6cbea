// Bindings of the adaLN backward ops to CUDA.
#include "cuda_args.h"

namespace maskaccel::cuda {
namespace {

template <int kMode>
void backward(const Operands& o, BackwardParams& p, const Wanted (&wanted)[kReducedCount]) {
  if (o.c.total == 0) return;
  p.c = o.c;
  p.out_vec = o.c.width % kVec == 0;
  Workspace workspace(o.call);
  by_dtype(o.dtype, [&](auto tag) {
    run_backward<typename decltype(tag)::type, kMode>(o.call.op(), p, wanted, o.call.info(), o.call.stream(), workspace);
  });
}

void check_needs(const Operands& o, const Arg& dy2, int64_t needs) {
  const bool second = needs & (kNeedScale2 | kNeedShift2);
  o.call.check(dy2 || !second, "dy2 is needed for the gradients of scale2 and shift2");
}

// The arguments of a norm's backward, in schema order from `scale` on.
struct NormArgs {
  Arg scale, shift, scale2, shift2, weight, bias, scale_table, shift_table, rows;

  explicit NormArgs(Inputs& in)
      : scale(in.optional("scale")), shift(in.optional("shift")), scale2(in.optional("scale2")),
        shift2(in.optional("shift2")), weight(in.optional("weight")), bias(in.optional("bias")),
        scale_table(in.optional("scale_table")), shift_table(in.optional("shift_table")), rows(in.optional("rows")) {}

  void set(const Operands& o, BackwardParams& p) const {
    p.scale = o.modulation(scale, scale_table);
    p.scale2 = o.modulation(scale2, Arg{});
    p.weight = o.vector(weight);
    p.bias = o.vector(bias);
  }

  // (dscale, dshift, dscale2, dshift2, dweight, dbias)
  void grads(const Operands& o, const BackwardParams& p, int64_t needs, Wanted (&w)[kReducedCount], Result (&out)[6]) const {
    out[0] = o.modulation_grad(needs & kNeedScale, scale, scale_table, p.scale, w[kScale]);
    out[1] = o.modulation_grad(needs & kNeedShift, shift, shift_table, o.modulation(shift, shift_table), w[kShift]);
    out[2] = o.modulation_grad(needs & kNeedScale2, scale2, Arg{}, p.scale2, w[kScale2]);
    out[3] = o.modulation_grad(needs & kNeedShift2, shift2, Arg{}, o.modulation(shift2, Arg{}), w[kShift2]);
    out[4] = o.vector_grad(needs & kNeedWeight, weight, w[kWeight]);
    out[5] = o.vector_grad(needs & kNeedBias, bias, w[kBias]);
  }
};

void norm_modulate_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dy = in.tensor("dy"), dy2 = in.optional("dy2"), x = in.tensor("x");
  const NormArgs n(in);
  const double eps = in.number(), offset = in.number();
  const int64_t flags = in.integer(), needs = in.integer();

  const Call call("norm_modulate_backward", x);
  Operands o(call, x, flags);
  o.c.eps = static_cast<float>(eps);
  o.c.offset = static_cast<float>(offset);
  o.rows(n.rows);
  o.c.modulation_wide =
      call.one_dtype(o.dtype, {&n.scale, &n.shift, &n.scale2, &n.shift2, &n.scale_table, &n.shift_table});
  o.c.weight_wide = call.one_dtype(o.dtype, {&n.weight, &n.bias});
  check_needs(o, dy2, needs);
  BackwardParams p;
  p.dy = o.activation(dy);
  p.dy2 = o.activation(dy2);
  p.x = o.activation(x);
  n.set(o, p);
  Result dx = o.like_x(needs & kNeedX), grads[6];
  p.dx = needs & kNeedX ? dx.data() : nullptr;
  Wanted wanted[kReducedCount];
  n.grads(o, p, needs, wanted, grads);
  backward<kNormalise>(o, p, wanted);
  stack[0] = dx.release();
  for (int i = 0; i < 6; ++i) stack[1 + i] = grads[i].release();
}

void gate_residual_norm_modulate_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dr = in.optional("dr"), dy = in.tensor("dy"), dy2 = in.optional("dy2"), r = in.tensor("r"), a = in.tensor("a");
  const Arg gate = in.optional("gate"), gate_table = in.optional("gate_table"), post_weight = in.optional("post_weight");
  const NormArgs n(in);
  const double eps = in.number(), post_eps = in.number(), offset = in.number();
  const int64_t flags = in.integer(), needs = in.integer();

  const Call call("gate_residual_norm_modulate_backward", r);
  Operands o(call, r, flags);
  o.c.eps = static_cast<float>(eps);
  o.c.post_eps = static_cast<float>(post_eps);
  o.c.offset = static_cast<float>(offset);
  o.rows(n.rows);
  o.c.modulation_wide = call.one_dtype(
      o.dtype, {&gate, &gate_table, &n.scale, &n.shift, &n.scale2, &n.shift2, &n.scale_table, &n.shift_table});
  o.c.weight_wide = call.one_dtype(o.dtype, {&n.weight, &n.bias, &post_weight});
  check_needs(o, dy2, needs);
  BackwardParams p;
  p.dr = o.activation(dr);
  p.dy = o.activation(dy);
  p.dy2 = o.activation(dy2);
  p.x = o.activation(r);
  p.a = o.activation(a);
  p.gate = o.modulation(gate, gate_table);
  p.post_weight = o.vector(post_weight);
  n.set(o, p);
  Result dx = o.like_x(needs & kNeedX), da = o.like_x(needs & kNeedA), grads[6];
  p.dx = needs & kNeedX ? dx.data() : nullptr;
  p.da = needs & kNeedA ? da.data() : nullptr;
  Wanted wanted[kReducedCount];
  Result dgate = o.modulation_grad(needs & kNeedGate, gate, gate_table, p.gate, wanted[kGate]);
  n.grads(o, p, needs, wanted, grads);
  Result dpost = o.vector_grad(needs & kNeedPost, post_weight, wanted[kPostWeight]);
  backward<kBoth>(o, p, wanted);
  stack[0] = dx.release();
  stack[1] = da.release();
  stack[2] = dgate.release();
  for (int i = 0; i < 6; ++i) stack[3 + i] = grads[i].release();
  stack[9] = dpost.release();
}

void gate_residual_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dr = in.tensor("dr"), a = in.tensor("a"), gate = in.optional("gate"), gate_table = in.optional("gate_table");
  const Arg post_weight = in.optional("post_weight"), rows = in.optional("rows");
  const double post_eps = in.number();
  const int64_t flags = in.integer(), needs = in.integer();

  const Call call("gate_residual_backward", a);
  Operands o(call, a, flags);
  o.c.post_eps = static_cast<float>(post_eps);
  o.rows(rows);
  o.c.modulation_wide = call.one_dtype(o.dtype, {&gate, &gate_table});
  o.c.weight_wide = call.one_dtype(o.dtype, {&post_weight});
  BackwardParams p;
  p.dr = o.activation(dr);
  p.a = o.activation(a);
  p.gate = o.modulation(gate, gate_table);
  p.post_weight = o.vector(post_weight);
  Result da = o.like_x(needs & kNeedA);
  p.da = needs & kNeedA ? da.data() : nullptr;
  Wanted wanted[kReducedCount];
  Result dgate = o.modulation_grad(needs & kNeedGate, gate, gate_table, p.gate, wanted[kGate]);
  Result dpost = o.vector_grad(needs & kNeedPost, post_weight, wanted[kPostWeight]);
  backward<kResidual>(o, p, wanted);
  stack[0] = da.release();
  stack[1] = dgate.release();
  stack[2] = dpost.release();
}

void register_ops(Library& m) {
  m.impl("norm_modulate_backward", &norm_modulate_backward);
  m.impl("gate_residual_norm_modulate_backward", &gate_residual_norm_modulate_backward);
  m.impl("gate_residual_backward", &gate_residual_backward);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
