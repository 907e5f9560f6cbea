// Binding of merge_attention and its backward to CUDA.
#include "../common/cuda_binding.h"
#include "cuda_merge.cuh"

namespace maskaccel::cuda {
namespace {

/// out1, lse1, out2, lse2.
struct Parts {
  Arg out[2], lse[2];
  explicit Parts(Inputs& in) : out{in.tensor("out1"), {}}, lse{in.tensor("lse1"), {}} {
    out[1] = in.tensor("out2");
    lse[1] = in.tensor("lse2");
  }
};

struct Merge {
  const Call& call;
  const Parts& parts;
  Dtype dtype;
  MergeParams p;

  Merge(const Call& call_, const Parts& parts_) : call(call_), parts(parts_), dtype(dtype_of_arg(parts_.out[0])) {
    const Arg& first = parts.out[0];
    call.check(first.dim == 4 && first.numel() / (first.size(3) > 0 ? first.size(3) : 1) < int64_t{1} << 31 &&
                   first.size(3) < int64_t{1} << 28,
               "out1 must be (B, S, H, D) with fewer than 2^31 rows, got ", shape_text(first));
    p.batch = static_cast<int>(first.size(0)), p.tokens = static_cast<int>(first.size(1));
    p.heads = static_cast<int>(first.size(2)), p.dim = static_cast<int>(first.size(3));
    while (p.lanes < kWarp && p.lanes * kVec < p.dim) p.lanes *= 2;
    for (int i = 0; i < 2; ++i) {
      p.part[i] = rows(parts.out[i]);
      p.lse[i] = statistics(parts.lse[i]);
    }
  }
  Rows rows(const Arg& t) const {
    call.same_device(t);
    call.check(t.dim == 4 && t.size(0) == p.batch && t.size(1) == p.tokens && t.size(2) == p.heads &&
                   t.size(3) == p.dim && dtype_of_arg(t) == dtype && t.dense_last(),
               t.name, " must be (", p.batch, ", ", p.tokens, ", ", p.heads, ", ", p.dim,
               ") of the dtype of out1 with a contiguous last dim, got ", shape_text(t));
    return Rows{t.data, t.stride(0), t.stride(1), t.stride(2), rows_aligned(t)};
  }
  const float* statistics(const Arg& t) const {
    call.same_device(t);
    call.check(t.code == codes().f32 && t.dim == 3 && t.size(0) == p.batch && t.size(1) == p.heads &&
                   t.size(2) == p.tokens && t.contiguous(),
               t.name, " must be contiguous float32 (", p.batch, ", ", p.heads, ", ", p.tokens, "), got ",
               shape_text(t));
    return static_cast<const float*>(t.data);
  }
  Result like_out() const { return Result(call, {p.batch, p.tokens, p.heads, p.dim}, dtype); }
  Result like_lse() const { return Result(call, {p.batch, p.heads, p.tokens}, Dtype::f32); }
  dim3 grid() const {
    return dim3(static_cast<unsigned>(ceil_div(int64_t{p.batch} * p.tokens * p.heads * p.lanes, kMergeThreads)));
  }
};

void merge_attention(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Parts parts(in);
  const Call call("merge_attention", parts.out[0]);
  Merge m(call, parts);
  Result out = m.like_out(), lse = m.like_lse();
  m.p.out = out.data();
  m.p.lse_out = lse.floats();
  if (m.grid().x > 0) {
    by_dtype(m.dtype, [&](auto tag) {
      launch(call.op(), merge_attention_kernel<typename decltype(tag)::type>, m.grid(), kMergeThreads, 0, call.stream(),
             m.p);
    });
  }
  stack[0] = out.release();
  stack[1] = lse.release();
}

void merge_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dout = in.tensor("dout"), dlse = in.optional("dlse");
  const Parts parts(in);
  const Call call("merge_attention_backward", parts.out[0]);
  Merge m(call, parts);
  m.p.dout = m.rows(dout);
  if (dlse) m.p.dlse = m.statistics(dlse);
  Result out[2] = {m.like_out(), m.like_out()}, lse[2] = {m.like_lse(), m.like_lse()};
  for (int i = 0; i < 2; ++i) m.p.dpart[i] = out[i].data(), m.p.dpart_lse[i] = lse[i].floats();
  if (m.grid().x > 0) {
    by_dtype(m.dtype, [&](auto tag) {
      launch(call.op(), merge_attention_backward_kernel<typename decltype(tag)::type>, m.grid(), kMergeThreads, 0,
             call.stream(), m.p);
    });
  }
  for (int i = 0; i < 2; ++i) {
    stack[2 * i] = out[i].release();
    stack[2 * i + 1] = lse[i].release();
  }
}

void register_ops(Library& m) {
  m.impl("merge_attention", &merge_attention);
  m.impl("merge_attention_backward", &merge_attention_backward);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
