// Bindings of the cached-feature ops to CUDA.
#include <algorithm>

#include "../common/cuda_binding.h"
#include "cuda_steps.cuh"

namespace maskaccel::cuda {
namespace {

void relative_difference(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), reference = in.tensor("reference"), base = in.optional("base");
  const Call call("relative_difference", x);
  const Dtype dtype = dtype_of_arg(x);
  call.check(x.dim >= 1 && x.contiguous(), "x must be contiguous (B, ...), got ", shape_text(x));
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
  Result out(call, {batch, tokens, width}, dtype);
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
  p.out = out.data();
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
  const int64_t vectors = batch * tokens * ceil_div(width, kVec);
  if (vectors > 0) {
    const int64_t ctas = std::min<int64_t>(ceil_div(vectors, 256), int64_t(call.info().multiprocessors) * 64);
    by_dtype(stored, [&](auto history_tag) {
      by_dtype(dtype, [&](auto tag) {
        launch(call.op(), history_kernel<typename decltype(history_tag)::type, typename decltype(tag)::type>,
               dim3(static_cast<unsigned>(ctas)), 256, 0, call.stream(), p);
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
