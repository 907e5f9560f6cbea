// Binding of combine_sites to CUDA.
#include "cuda_sites.cuh"

#include "cuda_combine.h"

namespace maskaccel::cuda {
namespace {

void combine_sites(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history"), weights = in.tensor("weights"), x = in.optional("x"),
            gates = in.optional("gates");
  const Call call("combine_sites", history);
  call.check(history.dim == 5 && history.size(0) >= 1 && history.size(0) < int64_t{1} << 31 && history.size(4) > 0,
             "history must be (S, K, B, N, D) with S and D positive, got ", shape_text(history));
  const int64_t sites = history.size(0);
  const bool per_site = weights.dim > 1;
  call.check(weights.contiguous() && (!per_site || weights.size(0) == sites), "weights must be contiguous of shape (K,), (",
             sites, ", K) or (", sites, ", K, D), got ", shape_text(weights));
  call.check(!gates || ((gates.dim == 3 || gates.dim == 4) && gates.size(0) == sites), "gates must be (", sites, ", B, D) or (",
             sites, ", B, F, D), got ", shape_text(gates));
  SitesParams p;
  static_cast<HistoryParams&>(p) =
      read_history(call, history.first(), per_site ? weights.first() : weights, x, gates.first());
  p.sites = static_cast<int>(sites);
  p.history_s = history.stride(0);
  p.weights_s = per_site ? weights.numel() / sites : 0;
  p.gate_s = gates ? gates.stride(0) : 0;
  p.history_vec = rows_aligned(history);
  p.gate_vec = gates && rows_aligned(gates);
  const Dtype stored = dtype_of_arg(history), dtype = dtype_of_arg(x ? x : history);
  Result out(call, {p.batch, p.tokens, p.width}, dtype);
  p.out = out.data();
  if (p.batch > 0 && p.tokens > 0) {
    by_dtype(stored, [&](auto history_tag) {
      by_dtype(dtype, [&](auto tag) {
        launch(call.op(), sites_kernel<typename decltype(history_tag)::type, typename decltype(tag)::type>,
               history_grid(call, p), 256, 0, call.stream(), p);
      });
    });
  }
  stack[0] = out.release();
}

void register_ops(Library& m) { m.impl("combine_sites", &combine_sites); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
