// Binding of gather_modulate to CUDA.
#include "../adaln/cuda_args.h"
#include "cuda_gather_modulate.cuh"
#include "cuda_tokens.h"

namespace maskaccel::cuda {
namespace {

void modulated(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), ids = in.tensor("ids"), inverse = in.tensor("inverse");
  const Arg scale = in.optional("scale"), shift = in.optional("shift");
  const Arg weight = in.rare("weight"), bias = in.rare("bias");
  const Numbers given = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, in.number(), in.integer()};
  const int64_t flags = given.flags;
  const Call call("gather_modulate", x);
  Operands o(call, x, flags);
  o.c.eps = static_cast<float>(given.eps);
  o.c.offset = static_cast<float>(given.offset);
  o.c.modulation_wide = call.one_dtype(o.dtype, {&scale, &shift});
  o.c.weight_wide = call.one_dtype(o.dtype, {&weight, &bias});
  GatherModulateParams p;
  p.x = o.activation(x);
  p.ids = read_index(call, ids, x.size(0));
  read_index(call, inverse, x.size(0), x.size(1));
  for (const Arg* m : {&scale, &shift}) {
    if (*m && m->dim != 2) read_shared_rows(call, *m, x.size(0), x.size(1), x.size(2), true);
  }
  // Without tokens no row of the modulation is read, and F rows of a sample divide nothing.
  const bool tokens = x.size(1) > 0;
  p.scale = o.modulation(tokens || scale.dim == 2 ? scale : Arg{}, Arg{});
  p.shift = o.modulation(tokens || shift.dim == 2 ? shift : Arg{}, Arg{});
  p.weight = o.vector(weight);
  p.bias = o.vector(bias);
  p.c = o.c;
  p.total = x.size(0) * p.ids.count;
  call.check(p.total <= kMostRows, "ids is out of range: ", shape_text(ids));
  p.out_vec = o.c.width % kVec == 0;
  const bool stores = !(flags & kNoRows);
  Result rows = stores ? Result(call, {x.size(0), p.ids.count, x.size(2)}, o.dtype) : none(call, o.dtype);
  Result y(call, {x.size(0), p.ids.count, x.size(2)}, o.dtype);
  p.rows = stores ? rows.data() : nullptr;
  p.y = y.data();
  if (p.total > 0) {
    by_dtype(o.dtype, [&](auto tag) {
      run_gather_modulate<typename decltype(tag)::type>(call.op(), p, call.info(), call.stream());
    });
  }
  stack[0] = rows.release();
  stack[1] = y.release();
}

void gather_modulate(StableIValue* stack, uint64_t, uint64_t) { modulated(stack, false); }
void gather_modulate_bare(StableIValue* stack, uint64_t, uint64_t) { modulated(stack, true); }

void register_ops(Library& m) { m.impl("gather_modulate", &gather_modulate); }
void register_bare(Library& m) { m.impl("gather_modulate_bare", &gather_modulate_bare); }

MASKACCEL_CUDA_LIBRARY(register_ops)
MASKACCEL_CUDA_RAW_LIBRARY(register_bare)

}  // namespace
}  // namespace maskaccel::cuda
