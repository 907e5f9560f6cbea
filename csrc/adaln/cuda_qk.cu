// Bindings of qk_norm_rope and its backward to CUDA.
#include <algorithm>

#include "../common/cuda_binding.h"
#include "cuda_qk.cuh"
#include "cuda_qk_heads.cuh"
#include "cuda_reduce.cuh"

namespace maskaccel::cuda {
namespace {

struct QkOperands {
  const Call& call;
  QkParams p;
  Dtype dtype;

  QkOperands(const Call& call_, const Arg& q, const Arg& k, int64_t flags, double eps) : call(call_), dtype(dtype_of_arg(q)) {
    call.check((flags & kNormMask) != 3, "unknown norm in flags ", flags);
    p.flags = static_cast<int>(flags);
    p.eps = static_cast<float>(eps);
    tokens(q, q);
    tokens(k, q);
    p.batch = static_cast<int>(q.size(0));
    p.head_dim = static_cast<int>(q.size(3));
    call.check(k.size(0) == q.size(0) && k.size(3) == q.size(3), "k must have the batch and head dim of q, got ",
               shape_text(k), " and ", shape_text(q));
    side(0, q);
    side(1, k);
  }

  void weights(const Arg& q_weight, const Arg& k_weight, const Arg& q_bias, const Arg& k_bias) {
    p.weight_wide = call.one_dtype(dtype, {&q_weight, &k_weight, &q_bias, &k_bias});
    const Arg* all[2][2] = {{&q_weight, &q_bias}, {&k_weight, &k_bias}};
    for (int i = 0; i < 2; ++i) {
      QkSide& s = p.side[i];
      for (const Arg* a : all[i]) {
        if (*a) call.vector(*a, row_width(i));
      }
      s.weight = all[i][0]->data;
      s.bias = all[i][1]->data;
      s.weight_vec = aligned(s.weight) && p.head_dim % kVec == 0;
      s.bias_vec = aligned(s.bias) && p.head_dim % kVec == 0;
    }
  }

  void rope(const Arg& cos, const Arg& sin, const Arg& positions) {
    call.check(bool(cos) == bool(sin), "cos and sin go together");
    if (!cos) {
      call.check(!positions, "positions need cos and sin");
      return;
    }
    p.table_wide = call.one_dtype(dtype, {&cos, &sin});
    call.same_device(cos);
    call.same_device(sin);
    const int64_t tokens = p.side[0].tokens, dim = p.head_dim, last = cos.dim > 0 ? cos.size(-1) : 0;
    bool same = cos.dim == sin.dim;
    for (int64_t i = 0; same && i < cos.dim; ++i) same = cos.size(i) == sin.size(i);
    call.check(same, "sin must have the shape of cos ", shape_text(cos), ", got ", shape_text(sin));
    call.check(p.side[1].tokens == tokens, "k must have the length of q with cos, got ", p.side[1].tokens, " and ", tokens);
    call.check(dim % 2 == 0 && (last == dim || last == dim / 2), "cos must end in ", dim / 2, " or ", dim, ", got ",
               shape_text(cos));
    const int64_t rows_at = cos.dim == 2 ? 0 : 1, heads = cos.dim == 4 ? cos.size(2) : 1;
    const bool per_head = heads != 1;
    call.check(cos.dim >= 2 && cos.dim <= 4 && (cos.dim == 2 || cos.size(0) == 1 || cos.size(0) == p.batch) &&
                   (!per_head || (heads == p.side[0].heads && heads == p.side[1].heads)) &&
                   (positions || cos.size(rows_at) == tokens),
               "cos must be (S, T), (B|1, S, T) or (B|1, S, H|1, T) with S = ", tokens, ", got ", shape_text(cos));
    p.cos = cos.data;
    p.sin = sin.data;
    p.table_full = last == dim;
    p.table_per_head = per_head;
    auto strides = [&](const Arg& t, int64_t& b, int64_t& s, int64_t& h, int64_t& e) {
      b = t.dim == 2 || t.size(0) == 1 ? 0 : t.stride(0);
      s = t.stride(rows_at);
      h = per_head ? t.stride(2) : 0;
      e = t.stride(-1);
    };
    strides(cos, p.cos_b, p.cos_s, p.cos_h, p.cos_t);
    strides(sin, p.sin_b, p.sin_s, p.sin_h, p.sin_t);
    if (positions) {
      call.same_device(positions);
      const bool shared = positions.dim == 1 && positions.size(0) == tokens;
      call.check((shared || (positions.dim == 2 && positions.size(0) == p.batch && positions.size(1) == tokens)) &&
                     positions.contiguous() && positions.code == codes().i32,
                 "positions must be contiguous int32 of shape (", tokens, ",) or (", p.batch, ", ", tokens, "), got ",
                 shape_text(positions));
      p.positions = static_cast<const int32_t*>(positions.data);
      p.positions_b = shared ? 0 : tokens;
    }
  }

  void gradient(int i, const Arg& grad, const Arg& of) {
    QkSide& s = p.side[i];
    call.same_device(grad);
    bool same = grad.dim == 4;
    for (int64_t d = 0; same && d < 4; ++d) same = grad.size(d) == of.size(d);
    call.check(same && grad.code == of.code && grad.dense_last(), grad.name, " must be like ", of.name, " ", shape_text(of),
               " with a contiguous last dim, got ", shape_text(grad));
    s.grad = grad.data;
    s.grad_b = grad.stride(0);
    s.grad_s = grad.stride(1);
    s.grad_h = grad.stride(2);
    s.grad_vec = rows_aligned(grad);
  }

  bool across() const { return p.flags & kAcrossHeads; }
  int64_t row_width(int i) const { return int64_t(p.head_dim) * (across() ? p.side[i].heads : 1); }
  bool empty() const { return rows() == 0; }
  /// Rows of the longer side, in the unit a CTA walks.
  int64_t rows() const {
    int64_t most = 0;
    for (const QkSide& s : p.side) {
      most = std::max(most, s.heads == 0 ? 0 : int64_t(p.batch) * s.tokens * (by_row() && !across() ? s.heads : 1));
    }
    return most;
  }
  bool by_row() const { return across() || p.head_dim > 32 * kVec; }
  int64_t longest() const { return std::max(p.side[0].tokens, p.side[1].tokens); }
  /// Whether the fast kernels serve: heads of 40 to 128 elements, all operands by whole vectors.
  bool whole_heads() const {
    const int size = p.table_wide || dtype == Dtype::f32 ? 4 : 2;
    return (p.lanes == 8 || p.lanes == 16) && std::all_of(p.side, p.side + 2, [](const QkSide& s) {
      return s.vec && (s.weight == nullptr || s.weight_vec) && (s.bias == nullptr || s.bias_vec);
    }) && tables_aligned(p, size);
  }

  template <bool kBackward>
  void run(unsigned ctas) {
    const dim3 grid(ctas, 2);
    const int vectors = static_cast<int>(ceil_div(p.head_dim, kVec));
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (!by_row()) {
        p.lanes = 1;
        while (p.lanes < vectors) p.lanes *= 2;
        if constexpr (!kBackward) {
          if (whole_heads()) {
            const dim3 tokens(static_cast<unsigned>(ceil_div(int64_t(p.batch) * longest(), kHeadWarps)), 2);
            return by_heads<T>(p, [&](auto lanes, auto half, auto narrow) {
              const auto kernel = qk_heads_kernel<T, lanes.value, half.value, narrow.value>;
              launch(call.op(), kernel, tokens, kHeadThreads, 0, call.stream(), p);
            });
          }
        }
        return launch(call.op(), qk_head_kernel<T, kBackward>, grid, kQkThreads, 0, call.stream(), p);
      }
      p.lanes = vectors;
      const int64_t row = int64_t(vectors) * (across() ? std::max(p.side[0].heads, p.side[1].heads) : 1);
      call.check(row <= kQkRowSteps * kQkRowThreads, "rows of more than ", kQkRowSteps * kQkRowThreads * kVec,
                 " elements are not supported, got ", std::max(row_width(0), row_width(1)));
      const int threads = static_cast<int>(ceil_div(ceil_div(row, kQkRowSteps), kWarp)) * kWarp;
      launch(call.op(), qk_row_kernel<T, kBackward>, grid, threads, 0, call.stream(), p);
    });
  }

 private:
  void tokens(const Arg& t, const Arg& q) const {
    call.same_device(t);
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    call.check(t.dim == 4, t.name, " must be (B, S, H, Dh), got ", shape_text(t));
    call.check(t.size(3) > 0 && t.size(0) * t.size(1) * t.size(2) <= kMost && t.size(2) * t.size(3) <= kMost, t.name,
               " of shape ", shape_text(t), " is out of range");
    call.check(t.code == q.code, t.name, " must have the dtype of q");
    call.check(t.dense_last(), t.name, " must have a contiguous last dim, got stride ", t.stride(-1));
  }
  void side(int i, const Arg& t) {
    QkSide& s = p.side[i];
    s.in = t.data;
    s.stride_b = t.stride(0);
    s.stride_s = t.stride(1);
    s.stride_h = t.stride(2);
    s.tokens = static_cast<int>(t.size(1));
    s.heads = static_cast<int>(t.size(2));
    s.vec = rows_aligned(t);
  }
};

void forward(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg q = in.tensor("q"), k = in.tensor("k"), q_weight = in.optional("q_weight"), k_weight = in.optional("k_weight");
  const Arg q_bias = in.rare("q_bias"), k_bias = in.rare("k_bias"), cos = in.optional("cos"), sin = in.optional("sin");
  const Arg positions = in.rare("positions");
  const Numbers n = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, 0.0, in.integer()};

  const Call call("qk_norm_rope", q);
  QkOperands o(call, q, k, n.flags, n.eps);
  o.weights(q_weight, k_weight, q_bias, k_bias);
  o.rope(cos, sin, positions);
  Result q_out(call, {q.size(0), q.size(1), q.size(2), q.size(3)}, o.dtype);
  Result k_out(call, {k.size(0), k.size(1), k.size(2), k.size(3)}, o.dtype);
  o.p.side[0].out = q_out.data();
  o.p.side[1].out = k_out.data();
  if (!o.empty()) {
    const int64_t rows = o.rows();
    o.p.run = std::min<int64_t>(4, std::max<int64_t>(1, rows / (int64_t(call.info().multiprocessors) * 32)));
    o.run<false>(static_cast<unsigned>(ceil_div(rows, o.p.run)));
  }
  stack[0] = q_out.release();
  stack[1] = k_out.release();
}

void qk_norm_rope(StableIValue* stack, uint64_t, uint64_t) { forward(stack, false); }
void qk_norm_rope_bare(StableIValue* stack, uint64_t, uint64_t) { forward(stack, true); }

void qk_norm_rope_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dq = in.tensor("dq"), dk = in.tensor("dk"), q = in.tensor("q"), k = in.tensor("k");
  const Arg q_weight = in.optional("q_weight"), k_weight = in.optional("k_weight"), q_bias = in.optional("q_bias");
  const Arg k_bias = in.optional("k_bias"), cos = in.optional("cos"), sin = in.optional("sin");
  const Arg positions = in.optional("positions");
  const double eps = in.number();
  const int64_t flags = in.integer(), needs = in.integer();

  const Call call("qk_norm_rope_backward", q);
  QkOperands o(call, q, k, flags, eps);
  o.weights(q_weight, k_weight, q_bias, k_bias);
  o.rope(cos, sin, positions);
  o.gradient(0, dq, q);
  o.gradient(1, dk, k);

  Result out[6];
  const Arg* inputs[2] = {&q, &k};
  for (int i = 0; i < 2; ++i) {
    if (needs >> i & 1) {
      out[i] = Result(call, inputs[i]->sizes, 4, o.dtype);
      o.p.side[i].out = out[i].data();
    } else {
      out[i] = Result::nothing(call, o.dtype);
    }
  }
  const Arg* vectors[4] = {&q_weight, &k_weight, &q_bias, &k_bias};
  bool reduce = false;
  for (int i = 0; i < 4; ++i) {
    const bool wanted = (needs >> (2 + i) & 1) && *vectors[i];
    out[2 + i] = wanted ? Result(call, {o.row_width(i % 2)}, Dtype::f32) : Result::nothing(call, Dtype::f32);
    if (wanted && o.empty()) out[2 + i].clear(call);
    reduce |= wanted;
  }
  if (!o.empty()) {
    const int64_t rows = o.rows(), sms = call.info().multiprocessors;
    o.p.run = std::max<int64_t>(1, reduce ? ceil_div(rows, sms * 8) : std::min<int64_t>(4, rows / (sms * 32)));
    const int64_t ctas = ceil_div(rows, o.p.run);
    Workspace workspace(call);
    o.p.width = std::max(o.row_width(0), o.row_width(1));
    if (reduce) o.p.workspace = workspace(2 * ctas * 2 * o.p.width);
    o.run<true>(static_cast<unsigned>(ctas));
    ReduceTask tasks[4];
    int count = 0;
    for (int i = 0; i < 4; ++i) {
      const bool wanted = (needs >> (2 + i) & 1) && *vectors[i];
      if (!wanted) continue;
      ReduceTask& t = tasks[count++];
      t.in = o.p.workspace + (i % 2) * ctas * 2 * o.p.width + (i / 2) * o.p.width;
      t.out = out[2 + i].floats();
      t.stride = 2 * o.p.width;
      t.inner = static_cast<int>(ctas);
      t.groups = 1;
      t.width = static_cast<int>(o.row_width(i % 2));
    }
    run_reduce(call.op(), tasks, count, call.stream());
  }
  for (int i = 0; i < 6; ++i) stack[i] = out[i].release();
}

void register_ops(Library& m) {
  m.impl("qk_norm_rope", &qk_norm_rope);
  m.impl("qk_norm_rope_backward", &qk_norm_rope_backward);
}

void register_bare(Library& m) { m.impl("qk_norm_rope_bare", &qk_norm_rope_bare); }

MASKACCEL_CUDA_LIBRARY(register_ops)
MASKACCEL_CUDA_RAW_LIBRARY(register_bare)

}  // namespace
}  // namespace maskaccel::cuda
