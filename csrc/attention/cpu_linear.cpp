// linear_attention and its backward on CPU tensors; the contract is in maskaccel/ops/attention/schema.py.
#include "cpu_linear.h"

#include "cpu_args.h"

namespace maskaccel {
namespace {

// Chunks so that all heads together are about this many tasks.
constexpr int64_t kTasks = 64;
constexpr int64_t kLeastChunk = 512;

LinearSums chunked(int64_t heads, int64_t tokens) {
  LinearSums s;
  const int64_t wanted = std::max<int64_t>(1, kTasks / std::max<int64_t>(1, heads));
  s.chunk = std::max(kLeastChunk, (tokens + wanted - 1) / wanted);
  s.chunk = (s.chunk + LinearAttention::kBlock - 1) / LinearAttention::kBlock * LinearAttention::kBlock;
  s.chunks = std::max<int64_t>(1, (tokens + s.chunk - 1) / s.chunk);
  return s;
}

// Operands whose memory lives as long as the call.
struct Work {
  Output partial, total;
  Work(const LinearAttention& s, LinearSums& sums, int64_t heads)
      : partial({s.B * heads * sums.chunks, s.D + 1, s.ld}, Dtype::f32), total({s.B * s.Hk, s.D + 1, s.ld}, Dtype::f32) {
    sums.partial = partial.floats();
    sums.total = total.floats();
  }
};

struct LinearArgs {
  Arg q, k, v;
};

LinearArgs read(Inputs& in, LinearAttention& s) {
  LinearArgs a = {in.tensor("q"), in.tensor("k"), in.tensor("v")};
  const int64_t map = in.integer(), normalize = in.integer();
  s.eps = static_cast<float>(in.number());
  STD_TORCH_CHECK(a.q.dim == 4, "q must be (B, Sq, H, D), got ", a.q.dim, " dimensions");
  STD_TORCH_CHECK(a.k.dim == 4, "k must be (B, Sk, Hk, D), got ", a.k.dim, " dimensions");
  STD_TORCH_CHECK(map == 0 || map == 1, "feature_map is ", map, "; allowed are 0 (relu) and 1 (elu + 1)");
  STD_TORCH_CHECK(normalize == 0 || normalize == 1, "normalize is ", normalize, "; allowed are 0 (sum) and 1 (mean)");
  s.dtype = dtype_of_arg(a.q);
  s.B = a.q.size(0);
  s.Sq = a.q.size(1);
  s.H = a.q.size(2);
  s.D = a.q.size(3);
  s.Sk = a.k.size(1);
  s.Hk = a.k.size(2);
  STD_TORCH_CHECK(s.D % 8 == 0 && s.D >= 16 && s.D <= 256, "q has head dim ", s.D,
                  "; allowed are multiples of 8 from 16 to 256");
  STD_TORCH_CHECK(s.Hk > 0 && s.H % s.Hk == 0, "q has ", s.H, " heads; they must be a multiple of the ", s.Hk,
                  " heads of k");
  s.ld = (s.D + 15) / 16 * 16;  // whole vectors of every instruction set
  s.q = head_rows(a.q, a.q.code, s.B, s.Sq, s.H, s.D);
  s.k = head_rows(a.k, a.q.code, s.B, s.Sk, s.Hk, s.D);
  s.v = head_rows(a.v, a.q.code, s.B, s.Sk, s.Hk, s.D);
  s.elu = map == 1;
  s.factor = normalize == 1 ? 1.0f / static_cast<float>(s.Sk > 0 ? s.Sk : 1) : 1.0f;
  s.keys = chunked(s.B * s.Hk, s.Sk);
  return a;
}

void sum_keys(const LinearAttention& s, const LinearKernels& kernels) {
  parallel(s.B * s.Hk * s.keys.chunks, 1, [&](int64_t begin, int64_t end) { kernels.key_sums(s, begin, end); });
  parallel(s.B * s.Hk, grain_for(s.size() * s.keys.chunks),
           [&](int64_t begin, int64_t end) { kernels.add_chunks(s, s.keys, 1, begin, end); });
}

void linear_attention(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  LinearAttention s;
  read(in, s);
  const Work keys(s, s.keys, s.Hk);
  Output out({s.B, s.Sq, s.H, s.D}, s.dtype);
  s.out = out.data();
  const LinearKernels& kernels = linear_kernels();
  sum_keys(s, kernels);
  parallel(s.B * s.H * s.q_blocks(), 1, [&](int64_t begin, int64_t end) { kernels.outputs(s, begin, end); });
  stack[0] = out.release();
}

void linear_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  LinearAttentionBackward s;
  const Arg dout = in.tensor("dout");
  const LinearArgs a = read(in, s);
  s.dout = head_rows(dout, a.q.code, s.B, s.Sq, s.H, s.D);
  s.queries = chunked(s.B * s.H, s.Sq);
  const Work keys(s, s.keys, s.Hk), queries(s, s.queries, s.H);
  Output dq({s.B, s.Sq, s.H, s.D}, s.dtype), dk({s.B, s.Sk, s.Hk, s.D}, s.dtype), dv({s.B, s.Sk, s.Hk, s.D}, s.dtype);
  s.dq = dq.data();
  s.dk = dk.data();
  s.dv = dv.data();
  const LinearKernels& kernels = linear_kernels();
  sum_keys(s, kernels);
  parallel(s.B * s.H * s.queries.chunks, 1,
           [&](int64_t begin, int64_t end) { kernels.query_gradients(s, begin, end); });
  const int64_t group = s.H / s.Hk;
  parallel(s.B * s.Hk, grain_for(s.size() * s.queries.chunks * group),
           [&](int64_t begin, int64_t end) { kernels.add_chunks(s, s.queries, group, begin, end); });
  parallel(s.B * s.Hk * s.k_blocks(), 1, [&](int64_t begin, int64_t end) { kernels.key_gradients(s, begin, end); });
  stack[0] = dq.release();
  stack[1] = dk.release();
  stack[2] = dv.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("linear_attention", linear_attention);
  m.impl("linear_attention_backward", linear_attention_backward);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
