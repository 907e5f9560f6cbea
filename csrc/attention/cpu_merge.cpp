// merge_attention and its backward on CPU tensors; the contract is in maskaccel/ops/attention/schema.py.
#include "cpu_merge.h"

#include "cpu_args.h"

namespace maskaccel {
namespace {

HeadRows rows_like(const Arg& a, const Arg& like) {
  check_sizes(a, {like.size(0), like.size(1), like.size(2), like.size(3)});
  STD_TORCH_CHECK(a.code == like.code, a.name, " must have the dtype of out1");
  STD_TORCH_CHECK(a.dense_last(), a.name, " must have a contiguous last dim");
  return {a.data, a.stride(0), a.stride(1), a.stride(2)};
}

const float* lse_of(const Arg& a, const MergeAttention& m) {
  check_float(a);
  check_sizes(a, {m.B, m.H, m.S});
  return static_cast<const float*>(a.data);
}

// out1, lse1, out2, lse2.
void read_parts(Inputs& in, MergeAttention& m, Arg& first) {
  first = in.tensor("out1");
  STD_TORCH_CHECK(first.dim == 4, "out1 must be (B, S, H, D), got ", first.dim, " dimensions");
  m.dtype = dtype_of_arg(first);
  m.B = first.size(0);
  m.S = first.size(1);
  m.H = first.size(2);
  m.D = first.size(3);
  m.part[0] = rows_like(first, first);
  m.part_lse[0] = lse_of(in.tensor("lse1"), m);
  m.part[1] = rows_like(in.tensor("out2"), first);
  m.part_lse[1] = lse_of(in.tensor("lse2"), m);
}

Output rows(const MergeAttention& m) { return Output({m.B, m.S, m.H, m.D}, m.dtype); }
Output lse(const MergeAttention& m) { return Output({m.B, m.H, m.S}, Dtype::f32); }

void merge_attention(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  MergeAttention m;
  Arg first;
  read_parts(in, m, first);
  Output out = rows(m), total = lse(m);
  m.out = out.data();
  m.lse = total.floats();
  m.past_cache = past_cache(out, m.D * size_of(m.dtype));
  const MergeKernels& kernels = merge_kernels();
  parallel(m.B * m.S, grain_for(m.H * m.D), [&](int64_t begin, int64_t end) { kernels.merge(m, begin, end); });
  stack[0] = out.release();
  stack[1] = total.release();
}

void merge_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  MergeAttentionBackward m;
  Arg first;
  const Arg dout = in.tensor("dout"), dlse = in.optional("dlse");
  read_parts(in, m, first);
  m.dout = rows_like(dout, first);
  if (dlse) m.dlse = lse_of(dlse, m);
  Output out1 = rows(m), out2 = rows(m), lse1 = lse(m), lse2 = lse(m);
  m.dpart[0] = out1.data();
  m.dpart[1] = out2.data();
  m.dpart_lse[0] = lse1.floats();
  m.dpart_lse[1] = lse2.floats();
  m.past_cache = past_cache(out1, m.D * size_of(m.dtype));
  const MergeKernels& kernels = merge_kernels();
  parallel(m.B * m.S, grain_for(m.H * m.D), [&](int64_t begin, int64_t end) { kernels.backward(m, begin, end); });
  stack[0] = out1.release();
  stack[1] = lse1.release();
  stack[2] = out2.release();
  stack[3] = lse2.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("merge_attention", merge_attention);
  m.impl("merge_attention_backward", merge_attention_backward);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
