// Bindings of write_kv_rows and read_kv_rows to CUDA.
#include "cuda_kv.cuh"
#include "cuda_tokens.h"

namespace maskaccel::cuda {
namespace {

int64_t item_of(const Arg& a) {
  return a.code == codes().u8 ? 1 : a.code == codes().f32 || a.code == codes().i32 ? 4 : 2;
}

/// Bytes from the first to the last element of dims [from, dim).
int64_t extent(const Arg& a, int64_t from) {
  int64_t last = 0;
  for (int64_t i = from; i < a.dim; ++i) last += (a.size(i) - 1) * a.stride(i);
  return (last + 1) * item_of(a);
}

bool meets(const Arg& a, const Arg& b) {
  if (!a || !b || a.numel() == 0 || b.numel() == 0) return false;
  const auto *x = static_cast<const char*>(a.data), *y = static_cast<const char*>(b.data);
  return x < y + extent(b, 0) && y < x + extent(a, 0);
}

/// Whether two tensors of one form take turns along a dim, as the halves of (B, S, 2, H, D) do.
bool take_turns(const Arg& a, const Arg& b) {
  const int64_t apart = std::abs(static_cast<const char*>(a.data) - static_cast<const char*>(b.data));
  bool same = a.dim == b.dim, found = false;
  for (int64_t i = 0; same && i < a.dim; ++i) same = a.size(i) == b.size(i) && a.stride(i) == b.stride(i);
  for (int64_t i = 0; same && i + 1 < a.dim; ++i) {
    found = found || (extent(a, i + 1) <= apart && apart + extent(a, i + 1) <= a.stride(i) * item_of(a));
  }
  return found;
}

void check_heads(const Call& call, const Arg& t, const Arg& k) {
  call.same_device(t);
  call.check(t.dim == 4 && t.size(0) == k.size(0) && t.size(1) == k.size(1) && t.size(3) == k.size(3), t.name,
             " must be (B, M, H, Dh) with the B, M and Dh of k ", shape_text(k), ", got ", shape_text(t));
  call.check(t.code == k.code, t.name, " must have the dtype of k");
  call.check(t.dense_last(), t.name, " must have a contiguous last dim, got stride ", t.stride(-1));
  call.check(t.size(2) * t.size(3) < int64_t{1} << 28 && t.size(0) * t.size(1) <= kMostRows, t.name,
             " is out of range: ", shape_text(t));
}

/// Whether four elements of an fp8 row and head can be written at once.
bool fours_aligned(const Arg& a) {
  bool good = a.size(-1) % kVec == 0 && reinterpret_cast<uintptr_t>(a.data) % 4 == 0;
  for (int64_t i = 0; i < 3; ++i) good = good && (a.size(i) <= 1 || a.stride(i) % 4 == 0);
  return good;
}

struct KvOperands {
  const Call& call;
  KvParams p;
  Dtype dtype;

  KvOperands(const Call& call_, const Arg& k, double eps, int64_t flags) : call(call_), dtype(dtype_of_arg(k)) {
    call.check(k.dim == 4 && k.size(3) > 0, "k must be (B, M, Hk, Dh) with Dh positive, got ", shape_text(k));
    call.check((flags & kNormMask) != 3, "unknown norm in flags ", flags);
    p.qk.flags = static_cast<int>(flags);
    p.qk.eps = static_cast<float>(eps);
    p.qk.batch = static_cast<int>(k.size(0));
    p.qk.head_dim = static_cast<int>(k.size(3));
    p.total = k.size(0) * k.size(1);
  }

  void input(int which, const Arg& t, const Arg& k) {
    check_heads(call, t, k);
    KvSide& s = p.side[which];
    s.in = t.data;
    s.in_b = t.stride(0);
    s.in_s = t.stride(1);
    s.in_h = t.stride(2);
    s.heads = static_cast<int>(t.size(2));
    s.vec = rows_aligned(t);
    s.norm = which != kV;
  }

  void weight(int which, const Arg& w) {
    if (!w) return;
    KvSide& s = p.side[which];
    call.vector(w, int64_t(p.qk.head_dim) * (p.qk.flags & kAcrossHeads ? s.heads : 1));
    s.weight = w.data;
    s.weight_vec = aligned(w.data) && p.qk.head_dim % kVec == 0;
  }

  void cache(int which, const Arg& t, const Arg& scale, const Arg& k, int64_t slots) {
    call.same_device(t);
    call.check(t.dim == 4 && t.size(0) == k.size(0) && t.size(1) == slots && t.size(2) == k.size(2) &&
                   t.size(3) == k.size(3) && slots <= kMostRows,
               t.name, " must be (", k.size(0), ", S, ", k.size(2), ", ", k.size(3), "), S as in the other cache, got ",
               shape_text(t));
    call.check(t.dense_last(), t.name, " must have a contiguous last dim, got stride ", t.stride(-1));
    for (int64_t i = 0; i < 3; ++i) {
      call.check(t.size(i) <= 1 || t.stride(i) != 0, t.name, " is written to, so it must not be expanded");
    }
    KvSide& s = p.side[which];
    MASKACCEL_SHIM(aoti_torch_get_data_ptr(t.handle, &s.out));
    s.out_b = t.stride(0);
    s.out_s = t.stride(1);
    s.out_h = t.stride(2);
    const bool fp8 = t.code == codes().u8;
    call.check(fp8 || t.code == k.code, t.name, " must have the dtype of k, or uint8");
    call.check(fp8 == bool(scale), scale.name, fp8 ? " must be given for a uint8 cache" : " is of a uint8 cache alone");
    s.out_vec = fp8 ? fours_aligned(t) : rows_aligned(t);
    if (!fp8) return;
    call.same_device(scale);
    call.check(scale.code == codes().f32 && scale.dim == 3 && scale.size(0) == t.size(0) &&
                   scale.size(1) == t.size(1) && scale.size(2) == t.size(2) && scale.contiguous(),
               scale.name, " must be contiguous float32 (", t.size(0), ", ", t.size(1), ", ", t.size(2), "), got ",
               shape_text(scale));
    void* data = nullptr;
    MASKACCEL_SHIM(aoti_torch_get_data_ptr(scale.handle, &data));
    s.scale = static_cast<float*>(data);
  }

  void rope(const Arg& cos, const Arg& sin, const Arg& positions) {
    call.check(bool(cos) == bool(sin), "cos and sin go together");
    if (!cos) return;
    p.qk.table_wide = call.one_dtype(dtype, {&cos, &sin});
    const int64_t rows_at = cos.dim == 3 ? 1 : 0, dim = p.qk.head_dim;
    for (const Arg* t : {&cos, &sin}) {
      call.same_device(*t);
      bool good = (t->dim == 2 || t->dim == 3) && t->dim == cos.dim &&
                  (t->dim == 2 || t->size(0) == 1 || t->size(0) == p.qk.batch);
      for (int64_t i = 0; good && i < t->dim; ++i) good = t->size(i) == cos.size(i);
      call.check(good && dim % 2 == 0 && (t->size(-1) == dim || t->size(-1) == dim / 2) && t->size(rows_at) >= 1,
                 t->name, " must be (S, T) or (", p.qk.batch, "|1, S, T) with T ", dim / 2, " or ", dim,
                 ", alike for cos and sin, got ", shape_text(*t));
    }
    p.qk.cos = cos.data;
    p.qk.sin = sin.data;
    p.qk.table_full = cos.size(-1) == dim;
    p.table_rows = static_cast<int>(std::min(cos.size(rows_at), kMostRows));
    p.qk.cos_b = cos.dim == 2 || cos.size(0) == 1 ? 0 : cos.stride(0);
    p.qk.sin_b = sin.dim == 2 || sin.size(0) == 1 ? 0 : sin.stride(0);
    p.qk.cos_s = cos.stride(rows_at);
    p.qk.sin_s = sin.stride(rows_at);
    p.qk.cos_t = cos.stride(-1);
    p.qk.sin_t = sin.stride(-1);
    p.side[kQ].rope = true;
    p.side[kK].rope = !(p.qk.flags & kPreRope);
    if (!positions) return;
    call.same_device(positions);
    const bool shared = positions.dim == 1 && positions.size(0) == p.ids.count;
    call.check(
        (shared || (positions.dim == 2 && positions.size(0) == p.qk.batch && positions.size(1) == p.ids.count)) &&
            positions.contiguous() && positions.code == codes().i32,
        "positions must be contiguous int32 of shape (", p.ids.count, ",) or (", p.qk.batch, ", ", p.ids.count,
        "), got ", shape_text(positions));
    p.qk.positions = static_cast<const int32_t*>(positions.data);
    p.qk.positions_b = shared ? 0 : p.ids.count;
  }

  /// Which row of equal ids is the last; `last` keeps the memory.
  void find_last(Result& last, int64_t samples) {
    if (p.ids.count <= 1) return;
    last = integers(call, {samples, p.slots});
    last.clear(call);
    LastRowParams l;
    l.ids = p.ids;
    l.total = samples * p.ids.count;
    l.slots = p.slots;
    l.last = static_cast<int*>(last.data());
    p.last = l.last;
    launch(call.op(), last_rows_kernel, dim3(static_cast<unsigned>(ceil_div(l.total, kRowThreads))), kRowThreads, 0,
           call.stream(), l);
  }

  void run() {
    const unsigned sides = 3 - static_cast<unsigned>(p.first_side);
    const int64_t vectors = ceil_div(p.qk.head_dim, kVec);
    p.qk.lanes = 1;
    while (p.qk.lanes < vectors && p.qk.lanes < kWarp) p.qk.lanes *= 2;
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (p.qk.flags & kAcrossHeads || vectors > kWarp) {
        const dim3 grid(static_cast<unsigned>(p.total), sides);
        return launch(call.op(), kv_any_kernel<T>, grid, kRowThreads, 0, call.stream(), p);
      }
      p.qk.run = std::clamp<int64_t>(p.total / (int64_t(call.info().multiprocessors) * 32), 1, 4);
      const dim3 grid(static_cast<unsigned>(ceil_div(p.total, p.qk.run)), sides);
      launch(call.op(), kv_head_kernel<T>, grid, kQkThreads, 0, call.stream(), p);
    });
  }
};

void write(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg q = in.optional("q"), k = in.tensor("k"), v = in.tensor("v"), k_cache = in.tensor("k_cache");
  const Arg v_cache = in.tensor("v_cache"), k_scale = in.rare("k_scale"), v_scale = in.rare("v_scale");
  const Arg ids = in.tensor("ids"), q_weight = in.optional("q_weight"), k_weight = in.optional("k_weight");
  const Arg cos = in.optional("cos"), sin = in.optional("sin"), positions = in.rare("positions");
  const Numbers given = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, 0.0, in.integer()};
  const Call call("write_kv_rows", k);
  KvOperands o(call, k, given.eps, given.flags);
  const int64_t slots = k_cache.dim == 4 ? k_cache.size(1) : 0;
  if (q) o.input(kQ, q, k);
  o.input(kK, k, k);
  o.input(kV, v, k);
  call.check(v.size(2) == k.size(2), "v must have the heads of k, got ", shape_text(v));
  o.p.ids = read_index(call, ids, k.size(0), k.size(1));
  o.p.slots = static_cast<int>(slots);
  o.cache(kK, k_cache, k_scale, k, slots);
  o.cache(kV, v_cache, v_scale, k, slots);
  call.check(k_cache.code == v_cache.code, "v_cache must have the dtype of k_cache");
  o.p.qk.weight_wide = call.one_dtype(o.dtype, {q ? &q_weight : &k_weight, &k_weight});
  if (q) o.weight(kQ, q_weight);
  o.weight(kK, k_weight);
  o.rope(cos, sin, positions);
  const Arg* written[] = {&k_cache, &v_cache, &k_scale, &v_scale};
  for (int i = 0; i < 4; ++i) {
    for (const Arg* a : {&q, &k, &v, &ids, &q_weight, &k_weight, &cos, &sin, &positions}) {
      call.check(!meets(*a, *written[i]), a->name, " shares memory with ", written[i]->name, ", which is written");
    }
    for (int j = 0; j < i; ++j) {
      call.check(!meets(*written[i], *written[j]) || take_turns(*written[i], *written[j]), written[i]->name,
                 " shares memory with ", written[j]->name);
    }
  }
  Result out = q ? Result(call, {q.size(0), q.size(1), q.size(2), q.size(3)}, o.dtype) : none(call, o.dtype);
  if (q) {
    KvSide& s = o.p.side[kQ];
    s.out = out.data();
    s.out_h = q.size(3);
    s.out_s = q.size(2) * q.size(3);
    s.out_b = q.size(1) * s.out_s;
    s.out_vec = q.size(3) % kVec == 0;
  }
  o.p.first_side = q ? kQ : kK;
  if (o.p.total > 0) {
    Result last;
    if (slots > 0 && !bare) o.find_last(last, ids.size(0));  // of a bare call none are equal
    o.run();
  }
  stack[0] = out.release();
}

void write_kv_rows(StableIValue* stack, uint64_t, uint64_t) { write(stack, false); }
void write_kv_rows_bare(StableIValue* stack, uint64_t, uint64_t) { write(stack, true); }

void read_kv_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg cache = in.tensor("cache"), scale = in.tensor("scale");
  const int64_t kind = in.integer();
  const Call call("read_kv_rows", cache);
  call.check(cache.code == codes().u8 && cache.dim == 4 && cache.dense_last(),
             "cache must be uint8 (B, S, Hk, Dh) with a contiguous last dim, got ", shape_text(cache));
  call.same_device(scale);
  call.check(scale.code == codes().f32 && scale.dim == 3 && scale.size(0) == cache.size(0) &&
                 scale.size(1) == cache.size(1) && scale.size(2) == cache.size(2) && scale.contiguous(),
             "scale must be contiguous float32 (", cache.size(0), ", ", cache.size(1), ", ", cache.size(2), "), got ",
             shape_text(scale));
  call.check(kind >= 0 && kind <= 2, "kind is ", kind, "; allowed are 0 to 2");
  ReadKvParams p;
  p.total = scale.numel();
  call.check(cache.size(3) < int64_t{1} << 28 && p.total <= kMostRows, "cache is out of range: ", shape_text(cache));
  const auto dtype = static_cast<Dtype>(kind);
  Result out(call, {cache.size(0), cache.size(1), cache.size(2), cache.size(3)}, dtype);
  if (p.total > 0 && cache.size(3) > 0) {
    p.cache = static_cast<const uint8_t*>(cache.data);
    p.scale = static_cast<const float*>(scale.data);
    p.stride_b = cache.stride(0);
    p.stride_s = cache.stride(1);
    p.stride_h = cache.stride(2);
    p.slots = static_cast<int>(cache.size(1));
    p.heads = static_cast<int>(cache.size(2));
    p.head_dim = static_cast<int>(cache.size(3));
    p.vec = p.head_dim % kVec == 0 && reinterpret_cast<uintptr_t>(cache.data) % kVec == 0;
    for (int64_t i = 0; i < 3; ++i) p.vec = p.vec && (cache.size(i) <= 1 || cache.stride(i) % kVec == 0);
    p.out = out.data();
    p.out_vec = p.head_dim % kVec == 0;
    p.lanes = lanes_of(ceil_div(p.head_dim, kVec));
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(call.op(), read_kv_kernel<T>, rows_grid(p.total, p.lanes), kRowThreads, 0, call.stream(), p);
    });
  }
  stack[0] = out.release();
}

void register_ops(Library& m) {
  m.impl("write_kv_rows", &write_kv_rows);
  m.impl("read_kv_rows", &read_kv_rows);
}

void register_bare(Library& m) { m.impl("write_kv_rows_bare", &write_kv_rows_bare); }

MASKACCEL_CUDA_LIBRARY(register_ops)
MASKACCEL_CUDA_RAW_LIBRARY(register_bare)

}  // namespace
}  // namespace maskaccel::cuda
