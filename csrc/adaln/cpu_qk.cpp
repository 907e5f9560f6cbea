// qk_norm_rope and gated_activation, forward and backward, on CPU tensors.
#include <algorithm>

#include "../common/stable.h"
#include "cpu_args.h"

namespace maskaccel {
namespace {


void check_side(QkNormRope& s, int i, const Arg& x) {
  STD_TORCH_CHECK(x.dim == 4, x.name, " must be (B, S, H, Dh), got ", x.dim, " dimensions");
  STD_TORCH_CHECK(dtype_of_arg(x) == s.dtype && x.size(0) == s.B && x.size(3) == s.Dh, x.name,
                  " must have the dtype, batch and head size of q");
  STD_TORCH_CHECK(x.dense_last(), x.name, " must be contiguous in its last dim");
  QkNormRope::Side& q = s.side[i];
  q.x = x.data;
  q.S = x.size(1);
  q.H = x.size(2);
  q.stride_b = x.stride(0);
  q.stride_s = x.stride(1);
  q.stride_h = x.stride(2);
}

const void* check_affine(QkNormRope& s, const Arg& v, int i, bool& seen) {
  if (!v) return nullptr;
  const int64_t size = s.flags & kAcrossHeads ? s.side[i].H * s.Dh : s.Dh;
  STD_TORCH_CHECK(v.dim == 1 && v.size(0) == size && v.dense_last(), v.name, " must be contiguous of shape (", size,
                  ",)");
  const Dtype d = dtype_of_arg(v);
  STD_TORCH_CHECK(seen ? d == s.affine_dtype : (d == s.dtype || d == Dtype::f32), v.name,
                  " must be float32 or of the dtype of q, as all weights and biases");
  s.affine_dtype = d;
  seen = true;
  return v.data;
}

void check_tables(QkNormRope& s, const Arg& cos, const Arg& sin, const Arg& positions) {
  STD_TORCH_CHECK(static_cast<bool>(cos) == static_cast<bool>(sin), "cos and sin must be given together");
  if (!cos) return;
  const int64_t S = s.side[0].S;
  STD_TORCH_CHECK(s.side[1].S == S, "q and k must have the same sequence length under RoPE");
  STD_TORCH_CHECK(s.Dh % 2 == 0, "RoPE needs an even head size, got ", s.Dh);
  STD_TORCH_CHECK(cos.dim >= 2 && cos.dim <= 4 && sin.dim == cos.dim,
                  "cos and sin must be (S, T), (B, S, T) or (B, S, H, T)");
  for (int64_t i = 0; i < cos.dim; ++i) STD_TORCH_CHECK(cos.size(i) == sin.size(i), "cos and sin must have one shape");
  s.table_dtype = dtype_of_arg(cos);
  STD_TORCH_CHECK(dtype_of_arg(sin) == s.table_dtype && (s.table_dtype == s.dtype || s.table_dtype == Dtype::f32),
                  "cos and sin must be float32 or of the dtype of q");
  s.T = cos.size(-1);
  STD_TORCH_CHECK(s.T == s.Dh || s.T == s.Dh / 2, "the last dim of cos must be ", s.Dh, " or ", s.Dh / 2, ", got ",
                  s.T);
  const int64_t at = cos.dim == 2 ? 0 : 1, rows = cos.size(at);
  STD_TORCH_CHECK(cos.dim == 2 || cos.size(0) == 1 || cos.size(0) == s.B, "the batch of cos must be ", s.B, " or 1");
  STD_TORCH_CHECK(positions || rows == S, "cos must have ", S, " rows, got ", rows);
  if (cos.dim == 4 && cos.size(2) != 1) {
    STD_TORCH_CHECK(cos.size(2) == s.side[0].H && s.side[1].H == s.side[0].H,
                    "per-head cos needs as many heads as q and k");
    s.table_per_head = true;
  }
  const auto strides = [&](const Arg& t, int64_t* out) {
    out[0] = t.dim > 2 && t.size(0) > 1 ? t.stride(0) : 0;
    out[1] = t.stride(at);
    out[2] = s.table_per_head ? t.stride(2) : 0;
    out[3] = t.stride(-1);
  };
  strides(cos, s.cos_stride);
  strides(sin, s.sin_stride);
  s.cos = cos.data;
  s.sin = sin.data;
  if (!positions) return;
  STD_TORCH_CHECK(positions.code == codes().i32 && positions.contiguous(), "positions must be contiguous int32");
  const bool shared = positions.dim == 1 && positions.size(0) == S;
  STD_TORCH_CHECK(shared || (positions.dim == 2 && positions.size(0) == s.B && positions.size(1) == S),
                  "positions must have shape (S,) or (B, S)");
  s.positions = static_cast<const int32_t*>(positions.data);
  s.positions_stride = shared ? 0 : S;
  check_indices("positions", s.positions, shared ? S : s.B * S, rows);
}

struct QkArgs {
  Arg q, k, weight[2], bias[2], cos, sin, positions;
  Numbers numbers;
};

void read(QkArgs& a, Inputs& in, bool bare) {
  a.q = in.tensor("q");
  a.k = in.tensor("k");
  a.weight[0] = in.optional("q_weight");
  a.weight[1] = in.optional("k_weight");
  a.bias[0] = in.rare("q_bias");
  a.bias[1] = in.rare("k_bias");
  a.cos = in.optional("cos");
  a.sin = in.optional("sin");
  a.positions = in.rare("positions");
  a.numbers = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, 0.0, in.integer()};
}

void check(QkNormRope& s, const QkArgs& a) {
  const int64_t flags = a.numbers.flags;
  STD_TORCH_CHECK(flags >= 0 && flags < 64 && (flags & kNormMask) != 3, "unknown flags ", flags);
  s.flags = static_cast<int>(flags);
  s.eps = static_cast<float>(a.numbers.eps);
  STD_TORCH_CHECK(a.q.dim == 4, "q must be (B, S, H, Dh), got ", a.q.dim, " dimensions");
  s.dtype = s.affine_dtype = dtype_of_arg(a.q);
  s.B = a.q.size(0);
  s.Dh = a.q.size(3);
  STD_TORCH_CHECK(s.Dh > 0, "q must have a head size of at least 1");
  check_side(s, 0, a.q);
  check_side(s, 1, a.k);
  bool seen = false;
  for (int i = 0; i < 2; ++i) {
    s.side[i].weight = check_affine(s, a.weight[i], i, seen);
    s.side[i].bias = check_affine(s, a.bias[i], i, seen);
  }
  check_tables(s, a.cos, a.sin, a.positions);
}

int64_t elements(const QkNormRope& s, int i) { return s.B * s.side[i].S * s.side[i].H * s.Dh; }

Output like(const QkNormRope& s, int i) { return Output({s.B, s.side[i].S, s.side[i].H, s.Dh}, s.dtype); }

void qk_norm_rope_any(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  QkArgs a;
  read(a, in, bare);
  QkNormRope s;
  check(s, a);
  Output out[2] = {like(s, 0), like(s, 1)};
  for (int i = 0; i < 2; ++i) s.side[i].out = out[i].data();
  s.past_cache = (s.Dh * size_of(s.dtype)) % kLine == 0 && out[0].bytes() + out[1].bytes() >= kPastCacheFrom;
  const AdalnKernels& kernels = adaln_kernels();
  const auto rows = [&](int which, int64_t heads) {
    const int64_t tokens = s.B * s.side[which == 2 ? 0 : which].S;
    if (heads == 0) return;
    parallel(tokens, grain_for(heads * s.Dh),
             [&](int64_t begin, int64_t end) { kernels.qk_forward(s, which, begin, end); });
  };
  if (s.side[0].S == s.side[1].S) {
    rows(2, s.side[0].H + s.side[1].H);
  } else {
    rows(0, s.side[0].H);
    rows(1, s.side[1].H);
  }
  stack[0] = out[0].release();
  stack[1] = out[1].release();
}

void qk_norm_rope(StableIValue* stack, uint64_t, uint64_t) { qk_norm_rope_any(stack, false); }
void qk_norm_rope_bare(StableIValue* stack, uint64_t, uint64_t) { qk_norm_rope_any(stack, true); }

void qk_norm_rope_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dy[2] = {in.tensor("dq"), in.tensor("dk")};
  QkArgs a;
  read(a, in, false);
  const int64_t needs = in.integer();
  QkNormRope s;
  check(s, a);
  const AdalnKernels& kernels = adaln_kernels();
  Output dx[2], dweight[2], dbias[2];
  constexpr int64_t kChunk = 64;
  s.chunk = kChunk;
  for (int i = 0; i < 2; ++i) {
    QkNormRope::Side& q = s.side[i];
    const Arg& g = dy[i];
    STD_TORCH_CHECK(g.dim == 4 && g.size(0) == s.B && g.size(1) == q.S && g.size(2) == q.H && g.size(3) == s.Dh &&
                        dtype_of_arg(g) == s.dtype && g.dense_last(),
                    g.name, " must have the shape and dtype of its tensor and a contiguous last dim");
    q.dy = g.data;
    q.dy_b = g.stride(0);
    q.dy_s = g.stride(1);
    q.dy_h = g.stride(2);
    const bool want_x = needs >> i & 1, want_w = (needs >> (2 + i) & 1) && a.weight[i],
               want_b = (needs >> (4 + i) & 1) && a.bias[i];
    const int64_t size = s.flags & kAcrossHeads ? q.H * s.Dh : s.Dh;
    s.chunks = (q.S + kChunk - 1) / kChunk;
    const int64_t total = s.B * s.chunks;
    dx[i] = want_x ? like(s, i) : nothing(s.dtype);
    q.out = want_x ? dx[i].data() : nullptr;
    dweight[i] = Output({want_w ? size : 0}, Dtype::f32);
    dbias[i] = Output({want_b ? size : 0}, Dtype::f32);
    Output part_w({want_w ? total * size : 0}, Dtype::f32), part_b({want_b ? total * size : 0}, Dtype::f32);
    q.dweight = want_w ? part_w.floats() : nullptr;
    q.dbias = want_b ? part_b.floats() : nullptr;
    if (!want_x && !want_w && !want_b) continue;
    if (elements(s, i) > 0)
      parallel(total, 1, [&](int64_t begin, int64_t end) { kernels.qk_backward(s, i, begin, end); });
    const auto sum = [&](const Output& parts, const Output& out) {
      if (elements(s, i) == 0) {
        std::memset(out.data(), 0, static_cast<size_t>(size) * sizeof(float));
        return;
      }
      AdalnReduce r;
      r.partial = parts.floats();
      r.out = out.floats();
      r.B = 1;
      r.N = r.group = total;
      r.D = size;
      r.chunk = r.per_chunk = 1;
      r.per_sample = total;
      r.out_b = 1;
      kernels.reduce(r, 0, 1);
    };
    if (want_w) sum(part_w, dweight[i]);
    if (want_b) sum(part_b, dbias[i]);
  }
  StableIValue* out = stack;
  for (Output* group : {dx, dweight, dbias})
    for (int i = 0; i < 2; ++i) *out++ = group[i].release();
}

// Returns the rows.
int64_t check_activation(GatedActivation& a, const Arg& x, int64_t flags) {
  STD_TORCH_CHECK(flags >= 0 && flags < 8 && (flags & kActivationMask) != 3, "unknown flags ", flags);
  a.flags = static_cast<int>(flags);
  int64_t rows = 0;
  STD_TORCH_CHECK(x.dim >= 1 && x.dim <= kMostDims && x.dense_last() && x.as_rows(rows, a.stride_x),
                  "x must have a contiguous last dim and leading dims of one common stride");
  const bool halves = (flags & kActivationMask) != kGeluTanh;
  STD_TORCH_CHECK(!halves || x.size(-1) % 2 == 0, "the width of x must be even, got ", x.size(-1));
  a.dtype = dtype_of_arg(x);
  a.width = halves ? x.size(-1) / 2 : x.size(-1);
  a.x = x.data;
  return rows;
}

void gated_activation(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x");
  GatedActivation a;
  const int64_t rows = check_activation(a, x, in.integer());
  int64_t sizes[kMostDims];
  std::copy_n(x.sizes, x.dim - 1, sizes);
  sizes[x.dim - 1] = a.width;
  Output y(sizes, static_cast<int>(x.dim), a.dtype);
  a.out = y.data();
  const AdalnKernels& kernels = adaln_kernels();
  parallel(rows, grain_for(4 * a.width), [&](int64_t begin, int64_t end) { kernels.activation(a, begin, end); });
  stack[0] = y.release();
}

void gated_activation_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dy = in.tensor("dy"), x = in.tensor("x");
  GatedActivation a;
  const int64_t rows = check_activation(a, x, in.integer());
  int64_t dy_rows = 0;
  STD_TORCH_CHECK(dy.dim == x.dim && std::equal(x.sizes, x.sizes + x.dim - 1, dy.sizes) && dy.size(-1) == a.width &&
                      dtype_of_arg(dy) == a.dtype && dy.dense_last() && dy.as_rows(dy_rows, a.stride_dy),
                  "dy must have the shape and dtype of the result, a contiguous last dim and leading dims of one "
                  "common stride");
  a.dy = dy.data;
  Output dx(x.sizes, static_cast<int>(x.dim), a.dtype);
  a.out = dx.data();
  const AdalnKernels& kernels = adaln_kernels();
  parallel(rows, grain_for(4 * a.width),
           [&](int64_t begin, int64_t end) { kernels.activation_backward(a, begin, end); });
  stack[0] = dx.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("qk_norm_rope", qk_norm_rope);
  m.impl("qk_norm_rope_backward", qk_norm_rope_backward);
  m.impl("gated_activation", gated_activation);
  m.impl("gated_activation_backward", gated_activation_backward);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) {
  maskaccel::implement(m);
  m.impl("qk_norm_rope_bare", maskaccel::qk_norm_rope_bare);
}
