// Binding of gram to CUDA.
#include "cuda_gram.cuh"

#include <algorithm>

#include "../common/cuda_binding.h"

namespace maskaccel::cuda {
namespace {

Result doubles(const Call& call, std::initializer_list<int64_t> sizes) {
  return Result(call, sizes.begin(), static_cast<int>(sizes.size()), codes().f64, int64_t{sizeof(double)});
}

void gram(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg history = in.tensor("history");
  const bool per_sample = in.boolean();
  const Call call("gram", history);
  const Dtype dtype = dtype_of_arg(history);
  call.check(history.dim == 4 && history.size(0) >= 1 && history.size(0) <= kMaxGram && history.size(3) > 0,
             "history must be (K, B, N, D) with K from 1 to 16 and D positive, got ", shape_text(history));
  const int64_t terms = history.size(0), batch = history.size(1), tokens = history.size(2), width = history.size(3);
  const bool dense = history.dense_last() && (tokens <= 1 || history.stride(2) == width);
  call.check(dense || history.numel() == 0, "history must be dense in N and D");
  call.check(batch < 65536, "history has too many samples: ", batch);
  Result out = per_sample ? doubles(call, {batch, terms, terms}) : doubles(call, {terms, terms});
  if (history.numel() == 0) {
    out.clear(call);
  } else {
    GramParams p;
    p.history = history.data;
    p.stride_k = history.stride(0);
    p.stride_b = history.stride(1);
    p.count = tokens * width;
    p.terms = static_cast<int>(terms);
    const int64_t bytes = size_of(dtype), tiles = ceil_div(terms, kGramTile);
    p.pairs = static_cast<int>(tiles * (tiles + 1) / 2);
    p.samples = per_sample ? 1 : static_cast<int>(batch);
    p.vec = aligned(history.data) && (terms == 1 || p.stride_k * bytes % 16 == 0) && (batch == 1 || p.stride_b * bytes % 16 == 0);
    const int64_t slices = std::max<int64_t>(8 / p.pairs, 1), step = slices * kWarp * kVec;
    // A thread takes at least four vectors of each row; about four CTAs per multiprocessor are resident.
    const int64_t wanted = std::max<int64_t>(1, int64_t(call.info().multiprocessors) * 8 / batch);
    const int64_t chunks = std::min<int64_t>({wanted, ceil_div(p.count, 4 * step), 65535});
    p.per_chunk = ceil_div(ceil_div(p.count, chunks), step) * step;
    p.chunks = static_cast<int>(ceil_div(p.count, p.per_chunk));
    const Result partial = doubles(call, {batch, p.chunks, p.pairs, kGramTile * kGramTile});
    p.partial = static_cast<double*>(partial.data());
    p.out = static_cast<double*>(out.data());
    const dim3 grid(static_cast<unsigned>(batch), static_cast<unsigned>(p.chunks));
    by_dtype(dtype, [&](auto tag) {
      const int threads = static_cast<int>(slices * p.pairs * kWarp);
      launch(call.op(), gram_kernel<typename decltype(tag)::type>, grid, threads, 0, call.stream(), p);
    });
    const dim3 results(static_cast<unsigned>(terms * terms), static_cast<unsigned>(per_sample ? batch : 1));
    launch(call.op(), gram_sum_kernel, results, 128, 0, call.stream(), p);
  }
  stack[0] = out.release();
}

void register_ops(Library& m) { m.impl("gram", &gram); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
