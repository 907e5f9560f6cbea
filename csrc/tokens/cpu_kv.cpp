// write_kv_rows and read_kv_rows on CPU tensors; the contract is in maskaccel/ops/tokens/schema.py.
#include "cpu_kv.h"

#include <algorithm>
#include <vector>

#include "cpu_checks.h"

namespace maskaccel {
namespace {

// First and last byte + 1 of what a tensor spans.
struct Span {
  const char *from, *to;
  Span(const Arg& a, int64_t item) : from(static_cast<const char*>(a.data)), to(from) {
    if (!a || a.numel() == 0) return;
    int64_t last = 0;
    for (int64_t i = 0; i < a.dim; ++i) last += (a.size(i) - 1) * a.stride(i);
    to = from + (last + 1) * item;
  }
  bool meets(const Span& o) const { return from < o.to && o.from < to; }
};

int64_t item_of(const Arg& a) {
  return a.code == codes().u8 ? 1 : a.code == codes().i32 ? 4 : a.code == codes().f32 ? 4 : 2;
}

// (B, M, H, Dh) of the dtype of k.
void check_heads(const Arg& a, const Arg& k, bool same_heads) {
  STD_TORCH_CHECK(a.dim == 4 && a.size(0) == k.size(0) && a.size(1) == k.size(1) && a.size(3) == k.size(3) &&
                      (!same_heads || a.size(2) == k.size(2)),
                  a.name, " must have the shape of k", same_heads ? "" : " but for its heads");
  STD_TORCH_CHECK(a.code == k.code, a.name, " must have the dtype of k");
  STD_TORCH_CHECK(a.dense_last(), a.name, " must be contiguous in its last dim");
}

QkNormRope::Side side_of(const Arg& x, const Arg& weight, const void* out) {
  QkNormRope::Side s;
  s.x = x.data;
  s.stride_b = x.stride(0);
  s.stride_s = x.stride(1);
  s.stride_h = x.stride(2);
  s.S = x.size(1);
  s.H = x.size(2);
  s.weight = weight ? weight.data : nullptr;
  s.out = const_cast<void*>(out);
  return s;
}

void check_weight(QkNormRope& s, const Arg& w, int64_t heads, bool& seen) {
  if (!w) return;
  const int64_t size = s.flags & kAcrossHeads ? heads * s.Dh : s.Dh;
  const Dtype d = dtype_of_arg(w);
  STD_TORCH_CHECK(w.dim == 1 && w.size(0) == size && w.dense_last(), w.name, " must be contiguous of shape (", size,
                  ",)");
  STD_TORCH_CHECK(seen ? d == s.affine_dtype : (d == s.dtype || d == Dtype::f32), w.name,
                  " must be float32 or of the dtype of k, as both weights");
  s.affine_dtype = d;
  seen = true;
}

// Returns the rows of the tables.
int64_t check_tables(QkNormRope& s, const Arg& cos, const Arg& sin) {
  STD_TORCH_CHECK(static_cast<bool>(cos) == static_cast<bool>(sin), "cos and sin must be given together");
  if (!cos) return 0;
  STD_TORCH_CHECK(s.Dh % 2 == 0, "RoPE needs an even head size, got ", s.Dh);
  STD_TORCH_CHECK((cos.dim == 2 || cos.dim == 3) && sin.dim == cos.dim, "cos and sin must be (S, T) or (B, S, T)");
  for (int64_t i = 0; i < cos.dim; ++i) STD_TORCH_CHECK(cos.size(i) == sin.size(i), "cos and sin must have one shape");
  s.table_dtype = dtype_of_arg(cos);
  STD_TORCH_CHECK(sin.code == cos.code && (s.table_dtype == s.dtype || s.table_dtype == Dtype::f32),
                  "cos and sin must be float32 or of the dtype of k");
  s.T = cos.size(-1);
  STD_TORCH_CHECK(s.T == s.Dh || s.T == s.Dh / 2, "the last dim of cos must be ", s.Dh, " or ", s.Dh / 2, ", got ",
                  s.T);
  STD_TORCH_CHECK(cos.dim == 2 || cos.size(0) == 1 || cos.size(0) == s.B, "the batch of cos must be ", s.B, " or 1");
  STD_TORCH_CHECK(cos.size(-2) > 0, "cos has no rows");
  const auto strides = [&](const Arg& t, int64_t* out) {
    out[0] = t.dim == 3 && t.size(0) > 1 ? t.stride(0) : 0;
    out[1] = t.stride(-2);
    out[2] = 0;
    out[3] = t.stride(-1);
  };
  strides(cos, s.cos_stride);
  strides(sin, s.sin_stride);
  s.cos = cos.data;
  s.sin = sin.data;
  return cos.size(-2);
}

KvCache check_cache(const Arg& cache, const Arg& scale, const Arg& k, int64_t S) {
  STD_TORCH_CHECK(cache.dim == 4 && cache.size(0) == k.size(0) && cache.size(1) == S && cache.size(2) == k.size(2) &&
                      cache.size(3) == k.size(3) && cache.dense_last(),
                  cache.name, " must be (B, S, Hk, Dh) with B, Hk and Dh of k, S = ", S, " and a contiguous last dim");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(cache.size(i) <= 1 || cache.stride(i) != 0, cache.name,
                    " is written to, so it must not be expanded");
  const bool narrow = cache.code == codes().u8;
  STD_TORCH_CHECK(narrow || cache.code == k.code, cache.name, " must have the dtype of k, or be uint8");
  STD_TORCH_CHECK(narrow == static_cast<bool>(scale), scale.name, " goes with a uint8 cache, and with no other");
  KvCache c;
  MASKACCEL_SHIM(aoti_torch_get_data_ptr(cache.handle, &c.data));
  c.stride_b = cache.stride(0);
  c.stride_s = cache.stride(1);
  c.stride_h = cache.stride(2);
  if (!scale) return c;
  check_dense(scale, codes().f32, "float32", {k.size(0), S, k.size(2)});
  STD_TORCH_CHECK(S >= 1 && k.size(1) >= 1, cache.name, " is fp8: it and k must have at least one row");
  void* data = nullptr;
  MASKACCEL_SHIM(aoti_torch_get_data_ptr(scale.handle, &data));
  c.scale = static_cast<float*>(data);
  return c;
}

// The two caches may lie between each other's rows, as halves of one tensor do.
bool interleaved(const Arg& a, const Arg& b, int64_t item) {
  for (int64_t i = 0; i < a.dim; ++i)
    if (a.stride(i) != b.stride(i)) return false;
  const int64_t apart = static_cast<const char*>(a.data) - static_cast<const char*>(b.data);
  return (apart < 0 ? -apart : apart) >= a.size(3) * item;
}

void write(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg q = in.optional("q"), k = in.tensor("k"), v = in.tensor("v"), k_cache = in.tensor("k_cache"),
            v_cache = in.tensor("v_cache"), k_scale = in.rare("k_scale"), v_scale = in.rare("v_scale"),
            ids = in.tensor("ids"), q_weight = in.optional("q_weight"), k_weight = in.optional("k_weight"),
            cos = in.optional("cos"), sin = in.optional("sin"), positions = in.rare("positions");
  const Numbers given = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, 0.0, in.integer()};
  const int64_t flags = given.flags;
  STD_TORCH_CHECK(flags >= 0 && flags < 2 * kPreRope && (flags & kNormMask) != 3, "unknown flags ", flags);
  STD_TORCH_CHECK(k.dim == 4, "k must be (B, M, Hk, Dh), got ", k.dim, " dimensions");
  WriteKv s;
  QkNormRope& qk = s.qk;
  qk.dtype = qk.affine_dtype = dtype_of_arg(k);
  qk.B = k.size(0);
  qk.Dh = k.size(3);
  qk.eps = static_cast<float>(given.eps);
  qk.flags = static_cast<int>(flags & ~int64_t{kPreRope});
  STD_TORCH_CHECK(qk.Dh > 0, "k must have a head size of at least 1");
  s.M = k.size(1);
  s.H = k.size(2);
  check_heads(k, k, true);
  check_heads(v, k, true);
  if (q) check_heads(q, k, false);
  STD_TORCH_CHECK(k_cache.dim == 4, "k_cache must be (B, S, Hk, Dh), got ", k_cache.dim, " dimensions");
  s.S = k_cache.size(1);
  s.k_cache = check_cache(k_cache, k_scale, k, s.S);
  s.v_cache = check_cache(v_cache, v_scale, k, s.S);
  STD_TORCH_CHECK(k_cache.code == v_cache.code, "v_cache must have the dtype of k_cache");
  bool seen = false;
  if (q) check_weight(qk, q_weight, q.size(2), seen);
  check_weight(qk, k_weight, s.H, seen);
  const int64_t rows = check_tables(qk, cos, sin);
  const Samples<int32_t> at = samples<int32_t>(ids, qk.B, s.M, "M");
  const bool flat = positions && positions.dim == 1;
  if (flat) {
    check_dense(positions, codes().i32, "int32", {s.M});
  }
  const Samples<int32_t> own = flat ? Samples<int32_t>{static_cast<const int32_t*>(positions.data), 0, s.M}
                                    : samples<int32_t>(positions, qk.B, s.M, "M");
  const Span written[] = {Span(k_cache, item_of(k_cache)), Span(v_cache, item_of(v_cache)), Span(k_scale, 4),
                          Span(v_scale, 4)};
  const char* const names[] = {"k_cache", "v_cache", "k_scale", "v_scale"};
  for (int i = 0; i < 4; ++i) {
    for (const Arg* a : {&q, &k, &v, &ids, &q_weight, &k_weight, &cos, &sin, &positions})
      STD_TORCH_CHECK(!written[i].meets(Span(*a, item_of(*a))), a->name, " shares memory with ", names[i],
                      ", which is written");
    for (int j = 0; j < i; ++j)
      STD_TORCH_CHECK(!written[i].meets(written[j]) || (i == 1 && interleaved(k_cache, v_cache, item_of(k_cache))),
                      names[j], " shares memory with ", names[i]);
  }

  // Of equal rows the last one is written, whichever thread takes it.
  std::vector<int32_t> to(static_cast<size_t>(ids.size(0) * s.M)), last;
  for (int64_t b = 0; b < ids.size(0); ++b) {
    const int32_t* const from = at.of(b);
    int32_t* const place = to.data() + b * s.M;
    bool ascending = true;
    for (int64_t m = 0; m < s.M; ++m) {
      place[m] = from[m] >= 0 && from[m] < s.S ? from[m] : -1;
      ascending = ascending && (m == 0 || from[m] > from[m - 1]);
    }
    if (ascending) continue;
    last.assign(static_cast<size_t>(s.S), -1);
    for (int64_t m = 0; m < s.M; ++m)
      if (place[m] >= 0) last[place[m]] = static_cast<int32_t>(m);
    for (int64_t m = 0; m < s.M; ++m)
      if (place[m] >= 0 && last[place[m]] != m) place[m] = -1;
  }
  s.to = to.data();
  s.to_stride = at.stride;
  std::vector<int32_t> table_rows;
  if (cos) {
    const Samples<int32_t>& wanted = positions ? own : at;
    const int64_t samples = wanted.stride == 0 ? 1 : qk.B;
    table_rows.resize(static_cast<size_t>(samples * s.M));
    for (int64_t i = 0; i < samples * s.M; ++i)
      table_rows[i] = std::clamp<int32_t>(wanted.data[i], 0, static_cast<int32_t>(rows - 1));
    qk.positions = table_rows.data();
    qk.positions_stride = wanted.stride;
  }
  const int64_t heads = q ? q.size(2) : 0;
  Output out = q ? Output({qk.B, s.M, heads, qk.Dh}, qk.dtype) : nothing(qk.dtype);
  if (q && heads > 0) {
    qk.side[0] = side_of(q, q_weight, out.data());
    qk.past_cache = past_cache(out, qk.Dh * size_of(qk.dtype));
    const AdalnKernels& kernels = adaln_kernels();
    parallel(qk.B * s.M, grain_for(heads * qk.Dh),
             [&](int64_t begin, int64_t end) { kernels.qk_forward(qk, 0, begin, end); });
  }
  qk.side[1] = side_of(k, k_weight, nullptr);
  if (flags & kPreRope) qk.cos = qk.sin = nullptr;
  s.v = {v.data, v.stride(0), v.stride(1), v.stride(2)};
  const KvKernels& kernels = kv_kernels();
  parallel(qk.B * s.M, grain_for(2 * s.H * qk.Dh), [&](int64_t begin, int64_t end) { kernels.write(s, begin, end); });
  stack[0] = out.release();
}

void write_kv_rows(StableIValue* stack, uint64_t, uint64_t) { write(stack, false); }
void write_kv_rows_bare(StableIValue* stack, uint64_t, uint64_t) { write(stack, true); }

void read_kv_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg cache = in.tensor("cache"), scale = in.tensor("scale");
  const int64_t kind = in.integer();
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "kind is ", kind, "; allowed are 0 to 2");
  STD_TORCH_CHECK(cache.code == codes().u8 && cache.dim == 4 && cache.dense_last(),
                  "cache must be uint8 (B, S, Hk, Dh) with a contiguous last dim");
  const int64_t B = cache.size(0);
  ReadKv s;
  s.S = cache.size(1);
  s.H = cache.size(2);
  s.Dh = cache.size(3);
  check_dense(scale, codes().f32, "float32", {B, s.S, s.H});
  s.dtype = static_cast<Dtype>(kind);
  s.cache = {cache.data, cache.stride(0), cache.stride(1), cache.stride(2)};
  s.scale = static_cast<const float*>(scale.data);
  Output out({B, s.S, s.H, s.Dh}, s.dtype);
  s.out = out.data();
  s.past_cache = past_cache(out, s.Dh * size_of(s.dtype));
  const KvKernels& kernels = kv_kernels();
  parallel(B * s.S, grain_for(2 * s.H * s.Dh), [&](int64_t begin, int64_t end) { kernels.read(s, begin, end); });
  stack[0] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("write_kv_rows", write_kv_rows);
  m.impl("read_kv_rows", read_kv_rows);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) {
  maskaccel::implement(m);
  m.impl("write_kv_rows_bare", maskaccel::write_kv_rows_bare);
}
