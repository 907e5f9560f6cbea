// fp64 vectors, half as many lanes as a vector of fp32: for sums whose small differences matter.
#pragma once

#include "vec.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

constexpr int WD = W / 2;

#if defined(__AVX512F__)

using VD = __m512d;
MASKACCEL_INLINE VD zero_d() { return _mm512_setzero_pd(); }
MASKACCEL_INLINE VD add(VD a, VD b) { return _mm512_add_pd(a, b); }
MASKACCEL_INLINE VD fma(VD a, VD b, VD c) { return _mm512_fmadd_pd(a, b, c); }
MASKACCEL_INLINE VD low_half(V v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
MASKACCEL_INLINE VD high_half(V v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
MASKACCEL_INLINE double hsum(VD a) { return _mm512_reduce_add_pd(a); }

#elif defined(__AVX2__)

using VD = __m256d;
MASKACCEL_INLINE VD zero_d() { return _mm256_setzero_pd(); }
MASKACCEL_INLINE VD add(VD a, VD b) { return _mm256_add_pd(a, b); }
MASKACCEL_INLINE VD fma(VD a, VD b, VD c) { return _mm256_fmadd_pd(a, b, c); }
MASKACCEL_INLINE VD low_half(V v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
MASKACCEL_INLINE VD high_half(V v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
MASKACCEL_INLINE double hsum(VD a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

#else

typedef double VD __attribute__((vector_size(32)));
MASKACCEL_INLINE VD zero_d() { return VD{0.0, 0.0, 0.0, 0.0}; }
MASKACCEL_INLINE VD add(VD a, VD b) { return a + b; }
MASKACCEL_INLINE VD fma(VD a, VD b, VD c) { return a * b + c; }
MASKACCEL_INLINE VD low_half(V v) { return VD{v[0], v[1], v[2], v[3]}; }
MASKACCEL_INLINE VD high_half(V v) { return VD{v[4], v[5], v[6], v[7]}; }
MASKACCEL_INLINE double hsum(VD a) { return (a[0] + a[2]) + (a[1] + a[3]); }

#endif

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
