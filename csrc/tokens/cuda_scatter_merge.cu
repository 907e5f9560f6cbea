// Bindings of scatter_merge and its backward to CUDA.
#include "cuda_scatter_merge.cuh"
#include "cuda_tokens.h"

namespace maskaccel::cuda {
namespace {

Merge merge_of(const Call& call, int64_t mode) {
  call.check(mode >= 0 && mode <= 4, "mode is ", mode, "; allowed are 0 to 4");
  return static_cast<Merge>(mode);
}

/// Whether an operand that may be fp32 is.
bool is_wide(const Call& call, const Arg& a, Dtype dtype) { return call.one_dtype(dtype, {&a}); }

void same_dtype(const Call& call, const Arg& a, Dtype dtype) {
  call.check(dtype_of_arg(a) == dtype, a.name, " must have the dtype of the other rows");
}

void absent(const Call& call, const Arg& a, bool named) { call.check(!a || named, a.name, " is not of this mode"); }

void scatter_merge(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg full = in.optional("full"), rows = in.tensor("rows"), ids = in.tensor("ids"),
            inverse = in.tensor("inverse");
  const Arg gate = in.optional("gate"), token = in.optional("mask_token"), pos = in.optional("pos");
  const double lam = in.number();
  const int64_t mode = in.integer();
  const Call call("scatter_merge", rows);
  ScatterMergeParams p;
  p.mode = merge_of(call, mode);
  p.lam = static_cast<float>(lam);
  const Dtype dtype = dtype_of_arg(rows);
  p.rows = read_rows(call, rows, -1, -1, -1);
  const int64_t batch = rows.size(0), kept = rows.size(1), width = rows.size(2);
  read_index(call, ids, batch, kept);
  p.inverse = read_index(call, inverse, batch);
  const int64_t tokens = p.inverse.count;
  const bool filled = p.mode == Merge::mask_token || p.mode == Merge::zero;
  absent(call, gate, p.mode == Merge::add_gated);
  absent(call, token, p.mode == Merge::mask_token);
  absent(call, pos, filled);
  absent(call, full, !filled);
  call.check(full || filled, "full must be given in this mode");
  call.check(token || p.mode != Merge::mask_token, "mask_token must be given in this mode");
  if (full) {
    same_dtype(call, full, dtype);
    p.full = read_rows(call, full, batch, tokens, width);
  }
  if (gate) {
    p.gate_wide = is_wide(call, gate, dtype);
    p.gate = read_shared_rows(call, gate, batch, kept, width, true);
  }
  if (token) {
    p.token_wide = is_wide(call, token, dtype);
    call.vector(token, width);
    p.token = Vector{token.data, aligned(token.data) && width % kVec == 0};
  }
  if (pos) {
    p.pos_wide = is_wide(call, pos, dtype);
    p.pos = read_shared_rows(call, pos, batch, tokens, width, false);
  }
  p.total = batch * tokens;
  call.check(p.total <= kMostRows, "inverse is out of range: ", shape_text(inverse));
  Result out(call, {batch, tokens, width}, dtype);
  const bool moves = (p.mode == Merge::replace || filled) && !pos && (!token || token.code == rows.code);
  if (moves) {
    CopyParams copy;
    copy.index = p.inverse;
    copy.from = p.rows.data;
    copy.from_b = p.rows.stride_b;
    copy.from_n = p.rows.stride_n;
    copy.limit = static_cast<int>(kept);
    copy.other = full ? p.full.data : p.token.data;
    copy.other_b = p.full.stride_b;
    copy.other_n = p.full.stride_n;
    copy.out = out.data();
    copy.total = p.total;
    copy_rows(call, copy, dtype, width, p.rows.vec && (!full || p.full.vec) && (!token || p.token.vec));
  } else if (p.total > 0 && width > 0) {
    p.kept = static_cast<int>(kept);
    p.width = static_cast<int>(width);
    p.out = out.data();
    p.out_vec = width % kVec == 0;
    p.lanes = lanes_of(ceil_div(width, kVec));
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(call.op(), scatter_merge_kernel<T>, rows_grid(p.total, p.lanes), kRowThreads, 0, call.stream(), p);
    });
  }
  stack[0] = out.release();
}

/// CTAs for `rows` rows of each sample. Where sums are wanted, about 8 for each multiprocessor, so that few are added.
dim3 plan_chunks(const Call& call, MergeGradParams& p, int64_t rows, int64_t batch, bool sums) {
  const int64_t columns = ceil_div(p.width, int64_t(p.lanes) * kVec), groups = kRowThreads / p.lanes;
  const int64_t wanted = ceil_div(int64_t(call.info().multiprocessors) * (sums ? 8 : 32), batch * columns);
  const int64_t chunks = std::min(wanted, ceil_div(rows, groups));
  p.per_chunk = static_cast<int>(ceil_div(ceil_div(rows, chunks), groups) * groups);
  return dim3(static_cast<unsigned>(ceil_div(rows, p.per_chunk)), static_cast<unsigned>(batch),
              static_cast<unsigned>(columns));
}

void scatter_merge_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dout = in.tensor("dout"), rows = in.optional("rows"), ids = in.tensor("ids"),
            inverse = in.tensor("inverse");
  const Arg gate = in.optional("gate");
  const double lam = in.number();
  const int64_t mode_number = in.integer(), needs = in.integer();
  const Call call("scatter_merge_backward", dout);
  const Merge mode = merge_of(call, mode_number);
  const Dtype dtype = dtype_of_arg(dout);
  MergeGradParams p;
  p.dout = read_rows(call, dout, -1, -1, -1);
  const int64_t batch = dout.size(0), tokens = dout.size(1), width = dout.size(2);
  p.inverse = read_index(call, inverse, batch, tokens);
  p.ids = read_index(call, ids, batch);
  const int64_t kept = p.ids.count;
  call.check(batch < 65536 && batch * kept <= kMostRows, "dout is out of range: ", shape_text(dout));
  absent(call, gate, mode == Merge::add_gated);
  if (gate) {
    p.gate_wide = is_wide(call, gate, dtype);
    p.gate = read_shared_rows(call, gate, batch, kept, width, true);
  }
  const bool wants_gate = needs & kNeedMergeGate, wants_mask = needs & kNeedMask;
  call.check(!wants_gate || (gate && rows), "dgate needs gate and rows");
  call.check(!(needs & kNeedFull) || mode == Merge::replace || mode == Merge::blend, "dfull is not of mode ",
             mode_number);
  call.check(!wants_mask || mode == Merge::mask_token, "dmask is not of mode ", mode_number);
  if (rows) {
    same_dtype(call, rows, dtype);
    p.rows = read_rows(call, rows, batch, kept, width);
  }
  const bool summed = wants_gate && gate.size(1) == 1;
  Result dfull = needs & kNeedFull ? Result(call, {batch, tokens, width}, dtype) : none(call, dtype);
  Result drows = needs & kNeedRows ? Result(call, {batch, kept, width}, dtype) : none(call, dtype);
  Result dgate = wants_gate ? Result(call, {batch, gate.size(1), width}, Dtype::f32) : none(call, Dtype::f32);
  Result dmask = wants_mask ? Result(call, {width}, Dtype::f32) : none(call, Dtype::f32);
  p.tokens = static_cast<int>(tokens);
  p.kept = static_cast<int>(kept);
  p.width = static_cast<int>(width);
  p.out_vec = width % kVec == 0;
  p.lanes = 1;
  while (p.lanes < ceil_div(width, kVec) && p.lanes < kRowThreads) p.lanes *= 2;
  if (mode == Merge::blend) {
    p.of_full = static_cast<float>(lam);
    p.of_rows = 1.f - static_cast<float>(lam);
  }
  Workspace workspace(call);
  // Sums the partial sums of a launch into `out`, one for each of `samples`.
  const auto reduce = [&](float* out, unsigned chunks, int64_t samples) {
    ReduceTask t;
    t.in = p.partial;
    t.out = out;
    t.stride = width;
    t.inner = static_cast<int>(chunks * (batch / samples));
    t.group_step = chunks;
    t.groups = static_cast<int>(samples);
    t.width = p.width;
    run_reduce(call.op(), &t, 1, call.stream());
  };
  const bool some = batch > 0 && width > 0;
  by_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (some && kept > 0 && (needs & (kNeedRows | kNeedMergeGate))) {
      const dim3 grid = plan_chunks(call, p, kept, batch, summed);
      p.drows = needs & kNeedRows ? drows.data() : nullptr;
      p.dgate = wants_gate && !summed ? dgate.floats() : nullptr;
      p.partial = summed ? workspace(batch * grid.x * width) : nullptr;
      launch(call.op(), merge_rows_grad_kernel<T>, grid, kRowThreads, 0, call.stream(), p);
      if (summed) reduce(dgate.floats(), grid.x, batch);
    } else if (summed) {
      dgate.clear(call);
    }
    if (some && tokens > 0 && (needs & (kNeedFull | kNeedMask))) {
      const dim3 grid = plan_chunks(call, p, tokens, batch, wants_mask);
      p.dfull = needs & kNeedFull ? dfull.data() : nullptr;
      p.partial = wants_mask ? workspace(batch * grid.x * width) : nullptr;
      launch(call.op(), merge_tokens_grad_kernel<T>, grid, kRowThreads, 0, call.stream(), p);
      if (wants_mask) reduce(dmask.floats(), grid.x, 1);
    } else if (wants_mask) {
      dmask.clear(call);
    }
  });
  stack[0] = dfull.release();
  stack[1] = drows.release();
  stack[2] = dgate.release();
  stack[3] = dmask.release();
}

void register_ops(Library& m) {
  m.impl("scatter_merge", &scatter_merge);
  m.impl("scatter_merge_backward", &scatter_merge_backward);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
