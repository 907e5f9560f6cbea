// Rows of a K/V cache. Compiled once per instruction set; see common/isa.h.
#include "../adaln/cpu_heads.h"
#include "cpu_fp8.h"
#include "cpu_kv.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// The scale of a head: its largest magnitude / 448, 1 for zeros, a NaN if there is one.
template <class T>
MASKACCEL_INLINE float fp8_scale(const T* head, int64_t d) {
  V most = set1(0.0f), bad = set1(0.0f);
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V v = keep(vabs(load(head + i, part)), part);
    most = vmax(v, most);
    bad = add(bad, sub(v, v));  // a NaN, and with infinities too
  });
  alignas(64) float lanes[W];
  store(lanes, most, Full{});
  float largest = lanes[0];
  for (int i = 1; i < W; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  if (!(hsum(bad) == 0.0f)) {
    for (int64_t i = 0; i < d; ++i) {
      const float v = to_float(head[i]);
      if (v != v) largest = v;
    }
  }
  const float scale = largest / kFp8Most;
  return scale == 0.0f ? 1.0f : scale;
}

template <class T>
MASKACCEL_INLINE void store_fp8(const T* head, uint8_t* to, float* scale, int64_t d) {
  *scale = fp8_scale(head, d);
  const V divisor = set1(*scale), most = set1(kFp8Most), least = set1(-kFp8Most);
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V v = vmin(most, vmax(least, div(load(head + i, part), divisor)));  // a NaN stays one
    store_bytes(to + i, to_fp8(v), part);
  });
}

// v, head by head.
template <class T>
MASKACCEL_INLINE void store_values(const T* from, int64_t stride, const KvCache& cache, int64_t b, int64_t row,
                                   const WriteKv& s) {
  const int64_t d = s.qk.Dh, at = b * cache.stride_b + row * cache.stride_s;
  if (cache.scale != nullptr) {
    for (int64_t h = 0; h < s.H; ++h)
      store_fp8(from + h * stride, static_cast<uint8_t*>(cache.data) + at + h * cache.stride_h,
                cache.scale + (b * s.S + row) * s.H + h, d);
    return;
  }
  T* const to = static_cast<T*>(cache.data) + at;
  if (stride == d && cache.stride_h == d) {
    std::memcpy(to, from, static_cast<size_t>(s.H * d) * sizeof(T));
    return;
  }
  for (int64_t h = 0; h < s.H; ++h)
    std::memcpy(to + h * cache.stride_h, from + h * stride, static_cast<size_t>(d) * sizeof(T));
}

template <class T, int NV>
void write_rows(const WriteKv& s, int64_t begin, int64_t end) {
  const QkNormRope& qk = s.qk;
  const QkNormRope::Side& k = qk.side[1];
  const HeadPlan p = plan_of(qk);
  const int64_t d = qk.Dh, step = padded(d), wide = p.across ? padded(d * s.H) : step;
  float* const memory = static_cast<float*>(scratch(static_cast<size_t>(4 * step + 2 * wide) * sizeof(float)));
  float *const cos = memory, *const sin = memory + step, *const buffer = memory + 2 * step;
  T* const head = reinterpret_cast<T*>(memory + 3 * step);  // of an fp8 cache, before it is narrowed
  float *const weight = memory + 4 * step, *const bias = weight + wide;
  head_affine(qk, k, p, weight, bias);
  const bool by_half = qk.flags & kRopeHalf, as_is = p.norm == kNormNone && !p.rope && k.weight == nullptr;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / s.M, m = at - b * s.M;
    const int32_t row = s.to[b * s.to_stride + m];
    if (row < 0) continue;
    const T* const v = static_cast<const T*>(s.v.data) + b * s.v.stride_b + m * s.v.stride_s;
    store_values(v, s.v.stride_h, s.v_cache, b, row, s);
    const T* x = static_cast<const T*>(k.x) + b * k.stride_b + m * k.stride_s;
    if (as_is) {
      store_values(x, k.stride_h, s.k_cache, b, row, s);
      continue;
    }
    if (p.rope) build_rotation(cos, sin, qk, b, m, 0);
    HeadNorm norm{{0.0f, 1.0f}, nullptr, nullptr, p.narrow, p.norm == kNormLayer};
    if (p.across) norm.m = head_moments(qk, k, x, p);
    const int64_t first = b * s.k_cache.stride_b + row * s.k_cache.stride_s;
    for (int64_t h = 0; h < s.H; ++h, x += k.stride_h) {
      const int64_t place = first + h * s.k_cache.stride_h;
      float* const scale = s.k_cache.scale;
      T* const out = scale != nullptr ? head : static_cast<T*>(s.k_cache.data) + place;
      if (k.weight != nullptr) norm.weight = weight + (p.across ? h * d : 0);
      if constexpr (NV > 0) {
        head_registers<T, NV>(x, out, norm, p.norm, qk.eps, !p.across, p.rope ? cos : nullptr, sin, by_half, false);
      } else {
        if (!p.across) norm.m = head_moments(qk, k, x, p);
        head_general(x, out, d, norm, p.rope ? cos : nullptr, sin, by_half, buffer, false);
      }
      if (scale != nullptr)
        store_fp8(head, static_cast<uint8_t*>(s.k_cache.data) + place, scale + (b * s.S + row) * s.H + h, d);
    }
  }
}

template <class T>
void write_of(const WriteKv& s, int64_t begin, int64_t end) {
  if (s.qk.Dh == 64) return write_rows<T, 64 / W>(s, begin, end);
  if (s.qk.Dh == 128) return write_rows<T, 128 / W>(s, begin, end);
  write_rows<T, 0>(s, begin, end);
}

void write(const WriteKv& s, int64_t begin, int64_t end) {
  with_dtype(s.qk.dtype, [&](auto t) { write_of<decltype(t)>(s, begin, end); });
}

template <class T>
void read_rows(const ReadKv& s, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / s.S, row = at - b * s.S;
    const uint8_t* from = static_cast<const uint8_t*>(s.cache.data) + b * s.cache.stride_b + row * s.cache.stride_s;
    T* to = static_cast<T*>(s.out) + at * s.H * s.Dh;
    for (int64_t h = 0; h < s.H; ++h, from += s.cache.stride_h, to += s.Dh) {
      const V scale = set1(s.scale[at * s.H + h]);
      sweep(s.Dh, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
        put(to + i, mul(from_fp8(load_bytes(from + i, part)), scale), part, s.past_cache);
      });
    }
  }
  if (s.past_cache) stream_end();
}

void read(const ReadKv& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { read_rows<decltype(t)>(s, begin, end); });
}

}  // namespace

const KvKernels kv_kernels = {write, read};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
