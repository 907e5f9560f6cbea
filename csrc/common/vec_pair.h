// Two vectors at a time. For bf16 a pair holds the even and the odd elements of a stretch: widening is then one
// shift and one mask, and a store fills a whole cache line. Rows of fp32 scratch that meet such pairs are kept in
// the same order.
#pragma once

#include "vec.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

struct Two {
  V lo, hi;
};

template <class T>
MASKACCEL_INLINE Two load2(const T* p) {
  return {load(p, Full{}), load(p + W, Full{})};
}
MASKACCEL_INLINE void store2(float* p, Two v) {
  store(p, v.lo, Full{});
  store(p + W, v.hi, Full{});
}

// Stores a pair (unless p is null) and returns it as stored, rounded to T.
template <class T>
MASKACCEL_INLINE Two put2(T* p, Two v, bool past) {
  if (p != nullptr) {
    put(p, v.lo, Full{}, past);
    put(p + W, v.hi, Full{}, past);
  }
  return {rounded(v.lo, T{}), rounded(v.hi, T{})};
}

#if defined(__AVX512F__)

MASKACCEL_INLINE Two unpack_bf16(__m512i u) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
MASKACCEL_INLINE __m512i pack_bf16(Two v) {
#if defined(__AVX512BF16__)
  // cvtne2 puts its second operand into the low half; the permutation interleaves the halves
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(v.hi, v.lo));
#else
  const auto half = [](V x) MASKACCEL_HOT {
    const __m512i u = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i r = _mm512_add_epi32(
        u, _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(u, 16), one), _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  };
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(half(v.lo), 16), half(v.hi));
#endif
}
MASKACCEL_INLINE Two load2(const bf16* p) { return unpack_bf16(_mm512_loadu_si512(p)); }
MASKACCEL_INLINE Two put2(bf16* p, Two v, bool past) {
  const __m512i u = pack_bf16(v);
  if (p != nullptr) {
    if (past) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), u);
    } else {
      _mm512_storeu_si512(p, u);
    }
  }
  return unpack_bf16(u);
}
// From natural order into the order of the pairs of T.
MASKACCEL_INLINE Two ordered(Two v, bf16) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(v.lo, even, v.hi), _mm512_permutex2var_ps(v.lo, odd, v.hi)};
}
MASKACCEL_INLINE Two natural(Two v, bf16) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(v.lo, low, v.hi), _mm512_permutex2var_ps(v.lo, high, v.hi)};
}
constexpr bool kReorders = true;

#elif defined(__AVX2__)

MASKACCEL_INLINE Two unpack_bf16(__m256i u) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
MASKACCEL_INLINE __m256i pack_bf16(Two v) {
  const auto half = [](V x) MASKACCEL_HOT {
    const __m256i u = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
    const __m256i r = _mm256_add_epi32(
        u, _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(u, 16), one), _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  };
  return _mm256_blend_epi16(_mm256_srli_epi32(half(v.lo), 16), half(v.hi), 0xaa);
}
MASKACCEL_INLINE Two load2(const bf16* p) {
  return unpack_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MASKACCEL_INLINE Two put2(bf16* p, Two v, bool past) {
  const __m256i u = pack_bf16(v);
  if (p != nullptr) {
    if (past) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), u);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), u);
    }
  }
  return unpack_bf16(u);
}
MASKACCEL_INLINE Two ordered(Two v, bf16) {
  const __m256 even = _mm256_shuffle_ps(v.lo, v.hi, 0x88), odd = _mm256_shuffle_ps(v.lo, v.hi, 0xdd);
  const auto fix = [](__m256 x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); };
  return {fix(even), fix(odd)};
}
MASKACCEL_INLINE Two natural(Two v, bf16) {
  const __m256 a = _mm256_unpacklo_ps(v.lo, v.hi), b = _mm256_unpackhi_ps(v.lo, v.hi);
  return {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}
constexpr bool kReorders = true;

#else
constexpr bool kReorders = false;
MASKACCEL_INLINE Two ordered(Two v, bf16) { return v; }
MASKACCEL_INLINE Two natural(Two v, bf16) { return v; }
#endif

MASKACCEL_INLINE void to_pair_order(float*, int64_t, float) {}
MASKACCEL_INLINE void to_pair_order(float*, int64_t, f16) {}
MASKACCEL_INLINE void to_pair_order(float* row, int64_t d, bf16 t) {
  if (!kReorders) return;
  for (int64_t i = 0; i + 2 * W <= d; i += 2 * W) store2(row + i, ordered(load2(row + i), t));
}

MASKACCEL_INLINE void to_natural_order(float*, int64_t, float) {}
MASKACCEL_INLINE void to_natural_order(float*, int64_t, f16) {}
MASKACCEL_INLINE void to_natural_order(float* row, int64_t d, bf16 t) {
  if (!kReorders) return;
  for (int64_t i = 0; i + 2 * W <= d; i += 2 * W) store2(row + i, natural(load2(row + i), t));
}

// two(i, Chain<0 or 2>) for whole pairs, one(i, Full | Tail, Chain<1>) for what is left, in natural order.
template <class F, class G>
MASKACCEL_INLINE void sweep2(int64_t d, F&& two, G&& one) {
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    two(i, Chain<0>{});
    two(i + 2 * W, Chain<2>{});
  }
  if (i + 2 * W <= d) {
    two(i, Chain<0>{});
    i += 2 * W;
  }
  if (i + W <= d) {
    one(i, Full{}, Chain<0>{});
    i += W;
  }
  if (i < d) one(i, Tail{static_cast<int>(d - i)}, Chain<1>{});
}

// Sum of a row. bf16 pairs are summed by the dot product with ones, which widens for free.
template <class T>
MASKACCEL_INLINE float row_sum(const T* row, int64_t d) {
  Sum sum = Sum::zero();
  const auto one = [&](int64_t i, auto part, auto chain)
                       MASKACCEL_HOT { sum.part[chain.k] = add(sum.part[chain.k], load(row + i, part)); };
  const auto two = [&](int64_t i, auto chain) MASKACCEL_HOT {
#if defined(__AVX512BF16__)
    if constexpr (dtype_of<T> == Dtype::bf16) {
      const __m512i ones = _mm512_set1_epi32(0x3f803f80);
      sum.part[chain.k] = _mm512_dpbf16_ps(sum.part[chain.k], (__m512bh)_mm512_loadu_si512(row + i), (__m512bh)ones);
      return;
    }
#endif
    const Two v = load2(row + i);
    sum.part[chain.k] = add(sum.part[chain.k], v.lo);
    sum.part[chain.k + 1] = add(sum.part[chain.k + 1], v.hi);
  };
  sweep2(d, two, one);
  return sum.total();
}

// Sum of squared distances from `mean`.
template <class T>
MASKACCEL_INLINE float squares(const T* row, int64_t d, float mean) {
  Sum sum = Sum::zero();
  const V m = set1(mean);
  const auto add_square = [&](V v, auto chain) MASKACCEL_HOT {
    const V c = sub(v, m);
    sum.part[chain.k] = fma(c, c, sum.part[chain.k]);
  };
  sweep2(
      d,
      [&](int64_t i, auto chain) MASKACCEL_HOT {
        const Two v = load2(row + i);
        add_square(v.lo, chain);
        add_square(v.hi, Chain<decltype(chain)::k + 1>{});
      },
      [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
        const V c = keep(sub(load(row + i, part), m), part);
        sum.part[chain.k] = fma(c, c, sum.part[chain.k]);
      });
  return sum.total();
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
