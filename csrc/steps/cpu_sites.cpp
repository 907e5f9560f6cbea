// combine_sites on CPU tensors; the contract is in maskaccel/ops/steps/schema.py.
#include "cpu_sites.h"

#include "cpu_combine.h"

namespace maskaccel {
namespace {

void combine_sites(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history"), weights = in.tensor("weights"), x = in.optional("x"),
            gates = in.optional("gates");
  STD_TORCH_CHECK(history.dim == 5 && history.size(0) >= 1, "history must be (S, K, B, N, D) with S of at least 1, got ",
                  history.dim, " dimensions");
  STD_TORCH_CHECK(history.size(4) > 0, "history must have a last dim of at least 1");
  const int64_t S = history.size(0);
  const bool per_site = weights.dim > 1;
  STD_TORCH_CHECK(weights.contiguous() && (weights.dim == 1 || weights.size(0) == S),
                  "weights must be contiguous of shape (K,), (S, K) or (S, K, D)");
  STD_TORCH_CHECK(!gates || ((gates.dim == 3 || gates.dim == 4) && gates.size(0) == S),
                  "gates must be (S, B, D) or (S, B, F, D)");
  CombineSites s;
  static_cast<CombineHistory&>(s) =
      read_combine(history.first(), per_site ? weights.first() : weights, x, gates.first());
  s.S = S;
  s.history_site = history.stride(0);
  s.weight_site = per_site ? weights.numel() / S : 0;
  s.gate_site = gates ? gates.stride(0) : 0;
  Output out({s.B, s.N, s.D}, s.dtype);
  s.out = out.data();
  s.past_cache = past_cache(out, s.D * size_of(s.dtype));
  const SitesKernels& kernels = sites_kernels();
  parallel(s.B * s.N, grain_for(s.D * (s.S * s.K + 1) / 2),
           [&](int64_t begin, int64_t end) { kernels.combine_sites(s, begin, end); });
  stack[0] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("combine_sites", combine_sites); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
