// Bindings of gather_rows, unmerge_rows and segment_rows to CUDA.
#include "cuda_tokens.h"

namespace maskaccel::cuda {

void copy_rows(const Call& call, CopyParams p, Dtype dtype, int64_t width, bool vec) {
  if (p.total == 0 || width == 0) return;
  const int64_t per = vec ? 16 / size_of(dtype) : 1;
  for (int64_t* stride : {&p.from_b, &p.from_n, &p.other_b, &p.other_n}) *stride /= per;
  p.words = static_cast<int>(width / per);
  p.lanes = lanes_of(p.words);
  const dim3 grid = rows_grid(p.total, p.lanes);
  if (vec) return launch(call.op(), copy_rows_kernel<uint4>, grid, kRowThreads, 0, call.stream(), p);
  if (dtype == Dtype::f32) return launch(call.op(), copy_rows_kernel<uint32_t>, grid, kRowThreads, 0, call.stream(), p);
  launch(call.op(), copy_rows_kernel<uint16_t>, grid, kRowThreads, 0, call.stream(), p);
}

namespace {

Result gathered(const Call& call, const Arg& x, const Arg& ids) {
  const Activation from = read_rows(call, x, -1, -1, -1);
  const int64_t batch = x.size(0), width = x.size(2);
  CopyParams p;
  p.index = read_index(call, ids, batch);
  p.total = batch * p.index.count;
  call.check(p.total <= kMostRows, ids.name, " is out of range: ", shape_text(ids));
  Result out(call, {batch, p.index.count, width}, dtype_of_arg(x));
  p.from = from.data;
  p.from_b = from.stride_b;
  p.from_n = from.stride_n;
  p.limit = static_cast<int>(x.size(1));
  p.out = out.data();
  copy_rows(call, p, dtype_of_arg(x), width, from.vec);
  return out;
}

void gather_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), ids = in.tensor("ids"), inverse = in.optional("inverse");
  const Call call("gather_rows", x);
  dtype_of_arg(x);
  read_rows(call, x, -1, -1, -1);
  if (inverse) read_index(call, inverse, x.size(0), x.size(1));
  stack[0] = gathered(call, x, ids).release();
}

void unmerge_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), slot = in.tensor("slot"), order = in.tensor("order"), offsets = in.tensor("offsets");
  const Call call("unmerge_rows", x);
  dtype_of_arg(x);
  read_rows(call, x, -1, -1, -1);
  const Index to = read_index(call, slot, x.size(0));
  read_index(call, order, x.size(0), to.count);
  read_index(call, offsets, x.size(0), x.size(1) + 1);
  stack[0] = gathered(call, x, slot).release();
}

void segment_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), order = in.tensor("order"), offsets = in.tensor("offsets"), slot = in.tensor("slot");
  SegmentParams p;
  p.mean = in.boolean();
  const Call call("segment_rows", x);
  const Dtype dtype = dtype_of_arg(x);
  p.x = read_rows(call, x, -1, -1, -1);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  p.order = read_index(call, order, batch, tokens);
  p.offsets = read_index(call, offsets, batch);
  call.check(p.offsets.count >= 1, "offsets must have at least one column, got ", shape_text(offsets));
  read_index(call, slot, batch, tokens);
  p.segments = p.offsets.count - 1;
  p.total = batch * p.segments;
  call.check(p.total <= kMostRows, "offsets is out of range: ", shape_text(offsets));
  Result out(call, {batch, p.segments, width}, dtype);
  if (p.total > 0 && width > 0) {
    p.out = out.data();
    p.tokens = static_cast<int>(tokens);
    p.width = static_cast<int>(width);
    p.out_vec = width % kVec == 0;
    p.lanes = lanes_of(ceil_div(width, kVec));
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(call.op(), segment_rows_kernel<T>, rows_grid(p.total, p.lanes), kRowThreads, 0, call.stream(), p);
    });
  }
  stack[0] = out.release();
}

void register_ops(Library& m) {
  m.impl("gather_rows", &gather_rows);
  m.impl("unmerge_rows", &unmerge_rows);
  m.impl("segment_rows", &segment_rows);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
