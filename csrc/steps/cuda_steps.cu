// Bindings of the cached-feature ops to CUDA.
#include <algorithm>

#include "cuda_combine.h"

namespace maskaccel::cuda {
namespace {

void relative_difference(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), reference = in.tensor("reference"), base = in.optional("base");
  const Call call("relative_difference", x);
  const Dtype dtype = dtype_of_arg(x);
  call.check(x.dim >= 2 && x.contiguous(), "x must be contiguous (B, ...) of two dims or more, got ", shape_text(x));
  for (const Arg* a : {&reference, &base}) {
    if (!*a) continue;
    call.same_device(*a);
    bool same = a->dim == x.dim;
    for (int64_t i = 0; same && i < x.dim; ++i) same = a->size(i) == x.size(i);
    call.check(same && a->code == x.code && a->contiguous(), a->name, " must be contiguous with the shape ", shape_text(x),
               " and dtype of x, got ", shape_text(*a));
  }
  const int64_t batch = x.size(0);
  call.check(batch < int64_t{1} << 31, "x has too many samples: ", batch);
  Result out(call, {batch, 2}, Dtype::f32);
  if (x.numel() == 0) {
    out.clear(call);
  } else {
    DifferenceParams p;
    p.x = x.data;
    p.reference = reference.data;
    p.base = base.data;
    p.out = out.floats();
    p.count = x.numel() / batch;
    p.vec = aligned(x.data) && aligned(reference.data) && aligned(base.data) && p.count % kVec == 0;
    // A CTA takes at least four vectors per thread; about eight CTAs per multiprocessor are in flight.
    const int64_t wanted = std::max<int64_t>(1, int64_t(call.info().multiprocessors) * 16 / batch);
    const int64_t chunks = std::min<int64_t>({wanted, ceil_div(p.count, 4 * 256 * kVec), 65535});
    p.per_chunk = ceil_div(ceil_div(p.count, chunks), kVec) * kVec;
    p.chunks = static_cast<int>(ceil_div(p.count, p.per_chunk));
    Workspace workspace(call);
    p.partial = workspace(batch * p.chunks * 2);
    const dim3 grid(static_cast<unsigned>(batch), static_cast<unsigned>(p.chunks));
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(call.op(), difference_kernel<T>, grid, 256, 0, call.stream(), p);
    });
    launch(call.op(), difference_sum_kernel, dim3(static_cast<unsigned>(batch)), 256, 0, call.stream(), p);
  }
  stack[0] = out.release();
}

void combine_history(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history"), weights = in.tensor("weights"), x = in.optional("x"), gate = in.optional("gate");
  const Call call("combine_history", history);
  const Dtype stored = dtype_of_arg(history), dtype = x ? dtype_of_arg(x) : stored;
  HistoryParams p = read_history(call, history, weights, x, gate);
  Result out(call, {p.batch, p.tokens, p.width}, dtype);
  p.out = out.data();
  const ColumnPlan plan = ColumnPlan::of(call, p);
  if (plan.grid.x > 0) {
    by_dtype(stored, [&](auto history_tag) {
      by_dtype(dtype, [&](auto tag) {
        using H = typename decltype(history_tag)::type;
        using T = typename decltype(tag)::type;
        const auto kernel = p.all_vec() ? history_kernel<H, T, true> : history_kernel<H, T, false>;
        launch(call.op(), kernel, plan.grid, plan.threads, 0, call.stream(), p);
      });
    });
  }
  stack[0] = out.release();
}

void register_ops(Library& m) {
  m.impl("relative_difference", &relative_difference);
  m.impl("combine_history", &combine_history);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
