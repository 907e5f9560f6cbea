// Binding of match_tokens to CUDA.
#include "cuda_match.cuh"
#include "cuda_tokens.h"

namespace maskaccel::cuda {
namespace {

void match_tokens(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg metric = in.tensor("metric"), src = in.tensor("src"), dst = in.tensor("dst");
  const Call call("match_tokens", metric);
  const Dtype dtype = dtype_of_arg(metric);
  MatchParams p;
  p.metric = read_rows(call, metric, -1, -1, -1);
  const int64_t batch = metric.size(0), tokens = metric.size(1), width = metric.size(2);
  p.source = read_index(call, src, batch);
  p.target = read_index(call, dst, batch);
  call.check(batch < 65536 && batch * p.source.count <= kMostRows, "src is out of range: ", shape_text(src));
  call.check(p.target.count >= 1, "dst must name at least one row, got ", shape_text(dst));
  p.tokens = static_cast<int>(tokens);
  p.width = static_cast<int>(width);
  Result best = integers(call, {batch, p.source.count}), similarity(call, {batch, p.source.count}, Dtype::f32);
  const int64_t rows = batch * p.source.count;
  if (rows > 0 && (tokens == 0 || width == 0)) {
    best.clear(call);  // nothing but zeros: the first is as near as any
    similarity.clear(call);
  } else if (rows > 0) {
    const int64_t sources = ceil_div(p.source.count, kMatchSources), tiles = ceil_div(p.target.count, kMatchTargets);
    const int64_t wanted = ceil_div(int64_t(call.info().multiprocessors) * 2, sources * batch);
    p.per_split = static_cast<int>(ceil_div(tiles, std::min(std::min(wanted, tiles), int64_t{64})));
    p.splits = static_cast<int>(ceil_div(tiles, p.per_split));
    Workspace workspace(call);
    p.scale = workspace(batch * tokens);
    p.found = reinterpret_cast<Matched*>(workspace(rows * p.splits * int64_t(sizeof(Matched) / sizeof(float))));
    p.best = static_cast<int*>(best.data());
    p.similarity = similarity.floats();
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto z = static_cast<unsigned>(batch);
      const dim3 lengths(static_cast<unsigned>(ceil_div(tokens, kMatchThreads / kWarp)), z);
      launch(call.op(), match_length_kernel<T>, lengths, kMatchThreads, 0, call.stream(), p);
      const dim3 grid(static_cast<unsigned>(sources), static_cast<unsigned>(p.splits), z);
      launch(call.op(), match_tokens_kernel<T>, grid, kMatchThreads, 0, call.stream(), p);
      const dim3 pairs(static_cast<unsigned>(ceil_div(p.source.count, kMatchThreads / kWarp)), z);
      launch(call.op(), match_similarity_kernel<T>, pairs, kMatchThreads, 0, call.stream(), p);
    });
  }
  stack[0] = best.release();
  stack[1] = similarity.release();
}

void register_ops(Library& m) { m.impl("match_tokens", &match_tokens); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
