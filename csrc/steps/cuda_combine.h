// Arguments of a weighted sum of remembered features, as read and checked for CUDA tensors.
#pragma once

#include <algorithm>

#include "../common/cuda_binding.h"
#include "cuda_steps.cuh"

namespace maskaccel::cuda {

/// All but the output; the contract is in maskaccel/ops/steps/schema.py.
inline HistoryParams read_history(const Call& call, const Arg& history, const Arg& weights, const Arg& x, const Arg& gate) {
  const Dtype dtype = dtype_of_arg(x ? x : history);
  call.check(history.dim == 4 && history.size(0) >= 1 && history.size(0) <= 16,
             "history must be (K, B, N, D) with K from 1 to 16, got ", shape_text(history));
  HistoryParams p;
  const int64_t terms = history.size(0), batch = history.size(1), tokens = history.size(2), width = history.size(3);
  call.check(batch * tokens < int64_t{1} << 31 && width < int64_t{1} << 28, "history is out of range: ", shape_text(history));
  const bool dense = history.dense_last() && (tokens <= 1 || history.stride(2) == width);
  call.check(dense || history.numel() == 0, "history must be dense in N and D");
  call.same_device(weights);
  p.per_channel = weights.dim == 2;
  call.check((weights.dim == 1 || (weights.dim == 2 && weights.size(1) == width)) && weights.size(0) == terms &&
                 weights.contiguous() && weights.code == codes().f32,
             "weights must be contiguous float32 of shape (", terms, ",) or (", terms, ", ", width, "), got ",
             shape_text(weights));
  p.history = history.data;
  p.history_k = history.stride(0);
  p.history_b = history.stride(1);
  p.history_vec = rows_aligned(history);
  p.weights = static_cast<const float*>(weights.data);
  p.weights_vec = aligned(weights.data) && width % kVec == 0;
  p.terms = static_cast<int>(terms);
  p.batch = static_cast<int>(batch);
  p.tokens = static_cast<int>(tokens);
  p.width = static_cast<int>(width);
  p.out_vec = width % kVec == 0;
  if (x) {
    call.same_device(x);
    call.check(x.dim == 3 && x.size(0) == batch && x.size(1) == tokens && x.size(2) == width && x.dense_last(), "x must be (",
               batch, ", ", tokens, ", ", width, ") with a contiguous last dim, got ", shape_text(x));
    p.x = x.data;
    p.x_b = x.stride(0);
    p.x_n = x.stride(1);
    p.x_vec = rows_aligned(x);
  }
  if (gate) {
    call.same_device(gate);
    p.gate_wide = call.one_dtype(dtype, {&gate});
    const int64_t frames = gate.dim == 3 ? gate.size(1) : 1;
    call.check((gate.dim == 2 || gate.dim == 3) && gate.size(-1) == width && (gate.size(0) == 1 || gate.size(0) == batch) &&
                   (frames > 0 ? tokens % frames == 0 : tokens == 0) && gate.dense_last(),
               "gate must be (", batch, "|1, ", width, ") or (", batch, "|1, F, ", width, ") with F dividing ", tokens,
               ", got ", shape_text(gate));
    p.gate = gate.data;
    p.gate_b = gate.size(0) == 1 ? 0 : gate.stride(0);
    p.gate_g = gate.dim == 3 ? gate.stride(1) : 0;
    p.gate_vec = rows_aligned(gate);
    p.group = tokens > 0 ? static_cast<int>(tokens / frames) : 1;
  }
  return p;
}

/// CTAs of 256 threads for the vectors of (B, N, D), each thread taking several of a large tensor: combine_sites.
inline dim3 history_grid(const Call& call, const HistoryParams& p) {
  const int64_t vectors = int64_t(p.batch) * p.tokens * ceil_div(p.width, kVec);
  return dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(vectors, 256), int64_t(call.info().multiprocessors) * 64)));
}

/// Threads and CTAs of `combine_rows`: columns are shared out evenly, rows in runs that leave about four waves of CTAs.
struct ColumnPlan {
  int threads = 0;
  dim3 grid{0, 0, 0};

  static ColumnPlan of(const Call& call, HistoryParams& p) {
    ColumnPlan plan;
    const int64_t rows = int64_t(p.batch) * p.tokens, vectors = ceil_div(p.width, kVec);
    if (rows == 0 || vectors == 0) return plan;
    const int64_t blocks = ceil_div(vectors, kColumnThreads);
    plan.threads = static_cast<int>(ceil_div(ceil_div(vectors, blocks), kWarp) * kWarp);
    const int64_t ctas = std::max<int64_t>(1, int64_t{call.info().multiprocessors} * 4 * (768 / plan.threads) / blocks);
    p.run = static_cast<int>(ceil_div(rows, ctas));
    plan.grid = dim3(static_cast<unsigned>(ceil_div(rows, p.run)), static_cast<unsigned>(blocks));
    return plan;
  }
};

}  // namespace maskaccel::cuda
