// fp32 vectors of the instruction set this file is compiled for: loads and stores convert from and to bf16 and fp16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

#define MASKACCEL_INLINE static inline __attribute__((always_inline))
// For the bodies of the loops below: a call for each vector would send every sum through memory.
#define MASKACCEL_HOT __attribute__((always_inline))
#define MASKACCEL_OUTLINE static __attribute__((noinline, unused))

// How much of a vector a loop step covers.
struct Full {};
struct Tail {
  int n;
};

MASKACCEL_INLINE float to_float(float v) { return v; }
MASKACCEL_INLINE float to_float(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
MASKACCEL_INLINE uint16_t bf16_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
MASKACCEL_INLINE float to_float(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // Shifting the 15 low bits into place leaves the exponent 112 too small; the product fixes it, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  uint32_t u = magnitude;
  float f;
  std::memcpy(&f, &u, 4);
  f *= 0x1p112f;
  std::memcpy(&u, &f, 4);
  if (magnitude >= 0x7c00u << 13) u |= 0x7f800000u;
  u |= static_cast<uint32_t>(v.bits & 0x8000) << 16;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}
MASKACCEL_INLINE uint16_t f16_bits(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, 0);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (u < 0x38800000u) {  // subnormal: adding 0.5 makes the FPU round at the right bit
    float g;
    std::memcpy(&g, &u, 4);
    g += 0.5f;
    std::memcpy(&u, &g, 4);
    return static_cast<uint16_t>(sign | (u - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u >> 13) - (112u << 10)));
#endif
}
MASKACCEL_INLINE void from_float(float* p, float v) { *p = v; }
MASKACCEL_INLINE void from_float(bf16* p, float v) { p->bits = bf16_bits(v); }
MASKACCEL_INLINE void from_float(f16* p, float v) { p->bits = f16_bits(v); }

#if defined(__AVX512F__)

constexpr int W = 16;
using V = __m512;

MASKACCEL_INLINE __mmask16 mask(Tail t) { return static_cast<__mmask16>((1u << t.n) - 1); }
MASKACCEL_INLINE V set1(float v) { return _mm512_set1_ps(v); }
MASKACCEL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
MASKACCEL_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
MASKACCEL_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
MASKACCEL_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
MASKACCEL_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
MASKACCEL_INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
MASKACCEL_INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
MASKACCEL_INLINE V vabs(V a) { return _mm512_abs_ps(a); }
MASKACCEL_INLINE V vround(V a) { return _mm512_roundscale_ps(a, 0); }
MASKACCEL_INLINE V less(V a, V b, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
MASKACCEL_INLINE V pow2(V n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
MASKACCEL_INLINE V swap_pairs(V a) { return _mm512_permute_ps(a, 0xB1); }
MASKACCEL_INLINE float hsum(V a) { return _mm512_reduce_add_ps(a); }
MASKACCEL_INLINE V keep(V a, Full) { return a; }
MASKACCEL_INLINE V keep(V a, Tail t) { return _mm512_maskz_mov_ps(mask(t), a); }

MASKACCEL_INLINE V wide_bf16(__m256i u) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16)); }
MASKACCEL_INLINE __m256i narrow_bf16(V v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i u = _mm512_castps_si512(v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
MASKACCEL_INLINE V load(const float* p, Full) { return _mm512_loadu_ps(p); }
MASKACCEL_INLINE V load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(mask(t), p); }
MASKACCEL_INLINE V load(const bf16* p, Full) {
  return wide_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MASKACCEL_INLINE V load(const bf16* p, Tail t) { return wide_bf16(_mm256_maskz_loadu_epi16(mask(t), p)); }
MASKACCEL_INLINE V load(const f16* p, Full) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MASKACCEL_INLINE V load(const f16* p, Tail t) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(t), p)); }
MASKACCEL_INLINE void store(float* p, V v, Full) { _mm512_storeu_ps(p, v); }
MASKACCEL_INLINE void store(float* p, V v, Tail t) { _mm512_mask_storeu_ps(p, mask(t), v); }
MASKACCEL_INLINE void store(bf16* p, V v, Full) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
MASKACCEL_INLINE void store(bf16* p, V v, Tail t) { _mm256_mask_storeu_epi16(p, mask(t), narrow_bf16(v)); }
MASKACCEL_INLINE void store(f16* p, V v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
}
MASKACCEL_INLINE void store(f16* p, V v, Tail t) { _mm256_mask_storeu_epi16(p, mask(t), _mm512_cvtps_ph(v, 0)); }
MASKACCEL_INLINE void stream(float* p, V v) { _mm512_stream_ps(p, v); }
MASKACCEL_INLINE void stream(bf16* p, V v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
MASKACCEL_INLINE void stream(f16* p, V v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
MASKACCEL_INLINE V rounded(V v, float) { return v; }
MASKACCEL_INLINE V rounded(V v, bf16) { return wide_bf16(narrow_bf16(v)); }
MASKACCEL_INLINE V rounded(V v, f16) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }
MASKACCEL_INLINE void stream_end() { _mm_sfence(); }

#else  // 8 lanes: AVX2 intrinsics, or generic vectors that the compiler lowers to whatever there is

constexpr int W = 8;

#if defined(__AVX2__)
using V = __m256;
MASKACCEL_INLINE V set1(float v) { return _mm256_set1_ps(v); }
MASKACCEL_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
MASKACCEL_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
MASKACCEL_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
MASKACCEL_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
MASKACCEL_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
MASKACCEL_INLINE V vmax(V a, V b) { return _mm256_max_ps(a, b); }
MASKACCEL_INLINE V vmin(V a, V b) { return _mm256_min_ps(a, b); }
MASKACCEL_INLINE V vabs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
MASKACCEL_INLINE V vround(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
MASKACCEL_INLINE V less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
MASKACCEL_INLINE V pow2_normal(V n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
MASKACCEL_INLINE V swap_pairs(V a) { return _mm256_permute_ps(a, 0xB1); }
MASKACCEL_INLINE float hsum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
MASKACCEL_INLINE V wide_bf16(__m128i u) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16)); }
MASKACCEL_INLINE __m128i narrow_bf16(V v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  r = _mm256_srli_epi32(r, 16);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
}
MASKACCEL_INLINE V load(const float* p, Full) { return _mm256_loadu_ps(p); }
MASKACCEL_INLINE V load(const bf16* p, Full) { return wide_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
MASKACCEL_INLINE V load(const f16* p, Full) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MASKACCEL_INLINE void store(float* p, V v, Full) { _mm256_storeu_ps(p, v); }
MASKACCEL_INLINE void store(bf16* p, V v, Full) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
MASKACCEL_INLINE void store(f16* p, V v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
}
MASKACCEL_INLINE void stream(float* p, V v) { _mm256_stream_ps(p, v); }
MASKACCEL_INLINE void stream(bf16* p, V v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
MASKACCEL_INLINE void stream(f16* p, V v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0)); }
MASKACCEL_INLINE V rounded(V v, float) { return v; }
MASKACCEL_INLINE V rounded(V v, bf16) { return wide_bf16(narrow_bf16(v)); }
MASKACCEL_INLINE V rounded(V v, f16) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)); }
MASKACCEL_INLINE void stream_end() { _mm_sfence(); }

#else

typedef float V __attribute__((vector_size(32)));
typedef int32_t VI __attribute__((vector_size(32)));
typedef uint32_t VU __attribute__((vector_size(32)));
typedef uint16_t VH __attribute__((vector_size(16)));

MASKACCEL_INLINE V set1(float v) { return V{v, v, v, v, v, v, v, v}; }
MASKACCEL_INLINE V add(V a, V b) { return a + b; }
MASKACCEL_INLINE V sub(V a, V b) { return a - b; }
MASKACCEL_INLINE V mul(V a, V b) { return a * b; }
MASKACCEL_INLINE V div(V a, V b) { return a / b; }
MASKACCEL_INLINE V fma(V a, V b, V c) { return a * b + c; }
MASKACCEL_INLINE V vmax(V a, V b) { return a > b ? a : b; }
MASKACCEL_INLINE V vmin(V a, V b) { return a < b ? a : b; }
MASKACCEL_INLINE V vabs(V a) { return (V)((VI)a & 0x7fffffff); }
MASKACCEL_INLINE V vround(V a) { return (a + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23, for |a| < 2^22
MASKACCEL_INLINE V less(V a, V b, V yes, V no) { return a < b ? yes : no; }
MASKACCEL_INLINE V pow2_normal(V n) { return (V)((__builtin_convertvector(n, VI) + 127) << 23); }
MASKACCEL_INLINE V swap_pairs(V a) { return V{a[1], a[0], a[3], a[2], a[5], a[4], a[7], a[6]}; }
MASKACCEL_INLINE float hsum(V a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
MASKACCEL_INLINE V load(const float* p, Full) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MASKACCEL_INLINE V load(const bf16* p, Full) {
  VH u;
  std::memcpy(&u, p, sizeof u);
  return (V)(__builtin_convertvector(u, VU) << 16);
}
MASKACCEL_INLINE void store(float* p, V v, Full) { std::memcpy(p, &v, sizeof v); }
MASKACCEL_INLINE void store(bf16* p, V v, Full) {
  const VU u = (VU)v;
  VU r = u + 0x7fffu + ((u >> 16) & 1u);
  r = v != v ? u | 0x400000u : r;
  const VH h = __builtin_convertvector(r >> 16, VH);
  std::memcpy(p, &h, sizeof h);
}
// One lane at a time, hence not inline: it would be copied into every loop.
MASKACCEL_OUTLINE V load(const f16* p, Full) {
  V out;
  for (int i = 0; i < W; ++i) out[i] = to_float(p[i]);
  return out;
}
MASKACCEL_OUTLINE void store(f16* p, V v, Full) {
  for (int i = 0; i < W; ++i) from_float(p + i, v[i]);
}
template <class T>
MASKACCEL_INLINE void stream(T* p, V v) {
  store(p, v, Full{});
}
MASKACCEL_INLINE V rounded(V v, float) { return v; }
template <class T>
MASKACCEL_INLINE V rounded(V v, T) {
  T narrow[W];
  store(narrow, v, Full{});
  return load(narrow, Full{});
}
MASKACCEL_INLINE void stream_end() {}
#endif

// exp needs 2^n down to the smallest subnormal; two factors cover it.
MASKACCEL_INLINE V pow2(V n) {
  const V half = vround(mul(n, set1(0.5f)));
  return mul(pow2_normal(half), pow2_normal(sub(n, half)));
}
MASKACCEL_INLINE V keep(V a, Full) { return a; }
MASKACCEL_OUTLINE V keep(V a, Tail t) {
  float tmp[W];
  store(tmp, a, Full{});
  for (int i = t.n; i < W; ++i) tmp[i] = 0.0f;
  return load(tmp, Full{});
}
template <class T>
MASKACCEL_OUTLINE V load(const T* p, Tail t) {
  float tmp[W] = {};
  for (int i = 0; i < t.n; ++i) tmp[i] = to_float(p[i]);
  return load(tmp, Full{});
}
template <class T>
MASKACCEL_OUTLINE void store(T* p, V v, Tail t) {
  float tmp[W];
  store(tmp, v, Full{});
  for (int i = 0; i < t.n; ++i) from_float(p + i, tmp[i]);
}
#endif

template <class T>
MASKACCEL_INLINE void stream(T* p, V v, Full) {
  stream(p, v);
}
template <class T>
MASKACCEL_INLINE void stream(T* p, V v, Tail t) {
  store(p, v, t);
}
// `past` is loop-invariant: the compiler makes two loops of it.
template <class T, class Part>
MASKACCEL_INLINE void put(T* p, V v, Part part, bool past) {
  if (past) {
    stream(p, v, part);
  } else {
    store(p, v, part);
  }
}

// Load of a tensor whose dtype is known at run time only: modulation, weights, tables.
struct Source {
  const void* data;
  Dtype dtype;
};
template <class Part>
MASKACCEL_INLINE V load(Source s, int64_t i, Part part) {
  switch (s.dtype) {
    case Dtype::bf16:
      return load(static_cast<const bf16*>(s.data) + i, part);
    case Dtype::f16:
      return load(static_cast<const f16*>(s.data) + i, part);
    default:
      return load(static_cast<const float*>(s.data) + i, part);
  }
}
MASKACCEL_INLINE V rounded(V v, Dtype t) {
  return t == Dtype::bf16 ? rounded(v, bf16{}) : t == Dtype::f16 ? rounded(v, f16{}) : v;
}

// f(i, Full | Tail, k): k cycles through 0..3 so that four chains of accumulators hide the latency of the sums.
template <int K>
struct Chain {
  static constexpr int k = K;
};
template <class F>
MASKACCEL_INLINE void sweep(int64_t d, F&& f) {
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    f(i, Full{}, Chain<0>{});
    f(i + W, Full{}, Chain<1>{});
    f(i + 2 * W, Full{}, Chain<2>{});
    f(i + 3 * W, Full{}, Chain<3>{});
  }
  for (; i + W <= d; i += W) f(i, Full{}, Chain<0>{});
  if (i < d) f(i, Tail{static_cast<int>(d - i)}, Chain<1>{});
}

struct Sum {
  V part[4];
  MASKACCEL_INLINE Sum zero() { return Sum{{set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)}}; }
  inline __attribute__((always_inline)) float total() const {
    return hsum(add(add(part[0], part[1]), add(part[2], part[3])));
  }
};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
