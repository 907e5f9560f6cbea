// Bindings of the step ops with a norm to CUDA.
#include "cuda_normed.cuh"

#include "../adaln/cuda_args.h"
#include "cuda_combine.h"

namespace maskaccel::cuda {
namespace {

/// The operands of norm_modulate from `scale` on.
struct NormInputs {
  Arg scale, shift, weight, bias, scale_table, shift_table, rows;
  double eps = 0, offset = 0;
  int64_t flags = 0;

  explicit NormInputs(Inputs& in)
      : scale(in.optional("scale")),
        shift(in.optional("shift")),
        weight(in.optional("weight")),
        bias(in.optional("bias")),
        scale_table(in.optional("scale_table")),
        shift_table(in.optional("shift_table")),
        rows(in.optional("rows")) {
    eps = in.number();
    offset = in.number();
    flags = in.integer();
  }

  void read(Operands& o, NormedParams& p) const {
    o.c.eps = static_cast<float>(eps);
    o.c.offset = static_cast<float>(offset);
    o.rows(rows);
    o.c.modulation_wide = o.call.one_dtype(o.dtype, {&scale, &shift, &scale_table, &shift_table});
    o.c.weight_wide = o.call.one_dtype(o.dtype, {&weight, &bias});
    p.scale = o.modulation(scale, scale_table);
    p.shift = o.modulation(shift, shift_table);
    p.weight = o.vector(weight);
    p.bias = o.vector(bias);
    p.c = o.c;
    p.out_vec = o.c.width % kVec == 0;
    plan_runs(p, o.call.info());
  }
};

void combine_history_norm_modulate(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history"), weights = in.tensor("weights"), x = in.optional("x"), gate = in.optional("gate");
  const NormInputs inputs(in);
  const Call call("combine_history_norm_modulate", history);
  NormedParams p;
  p.history = read_history(call, history, weights, x, gate);
  p.stored = dtype_of_arg(history);
  Operands o(call, x ? x : history.first(), inputs.flags);
  inputs.read(o, p);
  Result h = o.like_x(true), y = o.like_x(true);
  p.history.out = h.data();
  p.y = y.data();
  if (p.c.total > 0) {
    by_dtype(o.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (p.stored == o.dtype) {
        run_normed<T, Source::kSame>(call.op(), p, call.stream());
      } else {
        run_normed<T, Source::kOther>(call.op(), p, call.stream());
      }
    });
  }
  stack[0] = h.release();
  stack[1] = y.release();
}

void norm_modulate_difference(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), reference = in.tensor("reference");
  const NormInputs inputs(in);
  const Call call("norm_modulate_difference", x);
  Operands o(call, x, inputs.flags);
  NormedParams p;
  p.x = o.activation(x);
  p.reference = o.activation(reference);
  inputs.read(o, p);
  Result y = o.like_x(true), sums(call, {x.size(0), 2}, Dtype::f32);
  p.y = y.data();
  if (p.c.total == 0) {
    sums.clear(call);
  } else {
    Workspace workspace(call);
    p.partial = workspace(x.size(0) * p.chunks * 2);
    by_dtype(o.dtype, [&](auto tag) {
      run_normed<typename decltype(tag)::type, Source::kRemembered>(call.op(), p, call.stream());
    });
    DifferenceParams d;
    d.partial = p.partial;
    d.chunks = p.chunks;
    d.out = sums.floats();
    launch(call.op(), difference_sum_kernel, dim3(static_cast<unsigned>(x.size(0))), 256, 0, call.stream(), d);
  }
  stack[0] = y.release();
  stack[1] = sums.release();
}

void register_ops(Library& m) {
  m.impl("combine_history_norm_modulate", &combine_history_norm_modulate);
  m.impl("norm_modulate_difference", &norm_modulate_difference);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
