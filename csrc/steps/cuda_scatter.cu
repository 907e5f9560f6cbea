// Binding of scatter_combine to CUDA.
#include "cuda_scatter.cuh"

#include "cuda_combine.h"
#include "scatter_args.h"

namespace maskaccel::cuda {
namespace {

void scatter_combine(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const ScatterArgs a = read_scatter(in);
  const Call call("scatter_combine", a.history);
  ScatterParams p;
  static_cast<HistoryParams&>(p) = read_history(call, a.history, a.weights, a.x, a.gate);
  call.same_device(a.fresh);
  call.same_device(a.index);
  if (a.labels) call.same_device(a.labels);
  call.check(p.batch < 65536 && a.rows < int64_t{1} << 31, "history or fresh is out of range");
  const Dtype stored = dtype_of_arg(a.history), dtype = dtype_of_arg(a.x ? a.x : a.history);
  Result out(call, {p.batch, p.tokens, p.width}, dtype);
  p.out = out.data();
  const ColumnPlan plan = ColumnPlan::of(call, p);
  if (plan.grid.x > 0) {
    p.value = a.data;
    p.newest = static_cast<int>(a.newest);
    p.fresh = a.fresh.data;
    p.fresh_vec = rows_aligned(a.fresh);
    p.index = static_cast<const int*>(a.index.data);
    p.rows = static_cast<int>(a.rows);
    p.gamma = static_cast<float>(a.gamma);
    const bool blend = p.gamma > 0.f && p.rows > 0;
    Workspace workspace(call);
    const Result row_of = integers(call, {p.batch, p.tokens}), first = integers(call, {p.batch, blend ? p.tokens : 0});
    p.row_of = static_cast<int*>(row_of.data());
    const auto batch = static_cast<unsigned>(p.batch);
    if (blend) {
      p.labels = static_cast<const int*>(a.labels.data);
      p.first = static_cast<int*>(first.data());
      p.mean = workspace(int64_t(p.batch) * p.rows * p.width);
    }
    const dim3 tokens(static_cast<unsigned>(ceil_div(p.tokens, kTokenThreads)), batch);
    launch(call.op(), token_rows_kernel, tokens, kTokenThreads, 0, call.stream(), p);
    by_dtype(stored, [&](auto history_tag) {
      using H = typename decltype(history_tag)::type;
      if (blend) {
        launch(call.op(), cluster_mean_kernel<H>, dim3(static_cast<unsigned>(p.rows), batch), kTokenThreads, 0, call.stream(), p);
      }
      by_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto kernel = p.all_vec() && p.fresh_vec ? scatter_kernel<H, T, true> : scatter_kernel<H, T, false>;
        launch(call.op(), kernel, plan.grid, plan.threads, 0, call.stream(), p);
      });
    });
  }
  stack[0] = out.release();
}

void register_ops(Library& m) { m.impl("scatter_combine", &scatter_combine); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
