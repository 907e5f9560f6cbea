// Vectors of 32-bit words, one for each lane of an fp32 vector, and Philox on them.
#pragma once

#include "../common/vec_math.h"
#include "philox.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

#if defined(__AVX512F__)

using Words = __m512i;
MASKACCEL_INLINE Words set1_words(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
// first, first + 1, ...
MASKACCEL_INLINE Words count_from(uint32_t first) {
  return _mm512_add_epi32(set1_words(first), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}
MASKACCEL_INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
MASKACCEL_INLINE V as_floats(Words a) { return _mm512_castsi512_ps(a); }
MASKACCEL_INLINE Words as_words(V a) { return _mm512_castps_si512(a); }
template <int N>
MASKACCEL_INLINE Words shift_right(Words a) {
  return _mm512_srli_epi32(a, N);
}
template <int N>
MASKACCEL_INLINE Words shift_left(Words a) {
  return _mm512_slli_epi32(a, N);
}
MASKACCEL_INLINE Words bit_and(Words a, Words b) { return _mm512_and_si512(a, b); }
MASKACCEL_INLINE Words bit_or(Words a, Words b) { return _mm512_or_si512(a, b); }
MASKACCEL_INLINE V to_floats(Words a) { return _mm512_cvtepi32_ps(a); }  // of words below 2^31
MASKACCEL_INLINE Words exclusive(Words a, Words b) { return _mm512_xor_si512(a, b); }
MASKACCEL_INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a); }
MASKACCEL_INLINE bool any_less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }

#elif defined(__AVX2__)

using Words = __m256i;
MASKACCEL_INLINE Words set1_words(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
MASKACCEL_INLINE Words count_from(uint32_t first) {
  return _mm256_add_epi32(set1_words(first), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
MASKACCEL_INLINE Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
MASKACCEL_INLINE V as_floats(Words a) { return _mm256_castsi256_ps(a); }
MASKACCEL_INLINE Words as_words(V a) { return _mm256_castps_si256(a); }
template <int N>
MASKACCEL_INLINE Words shift_right(Words a) {
  return _mm256_srli_epi32(a, N);
}
template <int N>
MASKACCEL_INLINE Words shift_left(Words a) {
  return _mm256_slli_epi32(a, N);
}
MASKACCEL_INLINE Words bit_and(Words a, Words b) { return _mm256_and_si256(a, b); }
MASKACCEL_INLINE Words bit_or(Words a, Words b) { return _mm256_or_si256(a, b); }
MASKACCEL_INLINE V to_floats(Words a) { return _mm256_cvtepi32_ps(a); }
MASKACCEL_INLINE Words exclusive(Words a, Words b) { return _mm256_xor_si256(a, b); }
MASKACCEL_INLINE void store(uint32_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
MASKACCEL_INLINE bool any_less(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0; }

#else

using Words = VU;
MASKACCEL_INLINE Words set1_words(uint32_t v) { return Words{v, v, v, v, v, v, v, v}; }
MASKACCEL_INLINE Words count_from(uint32_t first) { return first + Words{0, 1, 2, 3, 4, 5, 6, 7}; }
MASKACCEL_INLINE Words add(Words a, Words b) { return a + b; }
MASKACCEL_INLINE V as_floats(Words a) { return (V)a; }
MASKACCEL_INLINE Words as_words(V a) { return (Words)a; }
template <int N>
MASKACCEL_INLINE Words shift_right(Words a) {
  return a >> N;
}
template <int N>
MASKACCEL_INLINE Words shift_left(Words a) {
  return a << N;
}
MASKACCEL_INLINE Words bit_and(Words a, Words b) { return a & b; }
MASKACCEL_INLINE Words bit_or(Words a, Words b) { return a | b; }
MASKACCEL_INLINE V to_floats(Words a) { return __builtin_convertvector((VI)a, V); }
MASKACCEL_INLINE Words exclusive(Words a, Words b) { return a ^ b; }
MASKACCEL_INLINE void store(uint32_t* p, Words a) { std::memcpy(p, &a, sizeof a); }
MASKACCEL_INLINE bool any_less(V a, V b) {
  const VI yes = a < b;
  int32_t any = 0;
  for (int i = 0; i < W; ++i) any |= yes[i];
  return any != 0;
}

#endif

#if defined(__AVX2__)

// Two vectors of 64-bit lanes, for the even and for the odd items: a widening product reads the low half of a lane and
// leaves both of its own, so no word has to be moved. What stands in the high halves is never read.
class PhiloxWords {
 public:
  explicit PhiloxWords(const Stream& s) {
    const uint64_t of_step = static_cast<uint64_t>(philox::kMul1) * s.step;
    const uint32_t c0 = static_cast<uint32_t>(of_step >> 32) ^ s.sample ^ s.key0;
    const uint64_t of_c0 = static_cast<uint64_t>(philox::kMul0) * c0;
    // Until the item has reached every counter word, what it has not reached is the same for all items.
    high0_ = spread(s.route ^ s.key1);
    one1_ = spread(static_cast<uint32_t>(of_step) ^ key(s.key0, philox::kWeyl0, 1));
    one2_ = spread(static_cast<uint32_t>(of_c0 >> 32) ^ key(s.key1, philox::kWeyl1, 1));
    one3_ = spread(static_cast<uint32_t>(of_c0));
    for (int r = 2; r < philox::kRounds; ++r) {
      key0_[r] = spread(key(s.key0, philox::kWeyl0, static_cast<uint32_t>(r)));
      key1_[r] = spread(key(s.key1, philox::kWeyl1, static_cast<uint32_t>(r)));
    }
  }

  // Of the items in the lanes.
  MASKACCEL_HOT Words operator()(Words items) const {
    const Words even = half(items), odd = half(wide_right(items));
#if defined(__AVX512F__)
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#else
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#endif
  }

 private:
  static uint32_t key(uint32_t start, uint32_t weyl, uint32_t round) { return start + weyl * round; }
#if defined(__AVX512F__)
  MASKACCEL_INLINE Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
  MASKACCEL_INLINE Words wide_right(Words a) { return _mm512_srli_epi64(a, 32); }
#else
  MASKACCEL_INLINE Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
  MASKACCEL_INLINE Words wide_right(Words a) { return _mm256_srli_epi64(a, 32); }
#endif
  MASKACCEL_INLINE Words spread(uint32_t v) { return set1_words(v); }

  MASKACCEL_HOT Words half(Words item) const {
    const Words m0 = spread(philox::kMul0), m1 = spread(philox::kMul1);
    const Words first = product(item, m0);
    const Words p = product(exclusive(wide_right(first), high0_), m1);
    Words c0 = exclusive(wide_right(p), one1_), c1 = p, c2 = exclusive(first, one2_), c3 = one3_;
#pragma GCC unroll 8
    for (int r = 2; r < philox::kRounds; ++r) {
      const Words p0 = product(c0, m0), p1 = product(c2, m1);
      c0 = exclusive(exclusive(wide_right(p1), c1), key0_[r]);
      c2 = exclusive(exclusive(wide_right(p0), c3), key1_[r]);
      c1 = p1;
      c3 = p0;
    }
    return c0;
  }

  Words high0_, one1_, one2_, one3_, key0_[philox::kRounds], key1_[philox::kRounds];
};

#else

class PhiloxWords {
 public:
  explicit PhiloxWords(const Stream& s) : s_(s) {}
  Words operator()(Words items) const {
    Words out;
    for (int i = 0; i < W; ++i) out[i] = random_word(s_, items[i]);
    return out;
  }

 private:
  Stream s_;
};

#endif

// `uniform_of` of each word.
MASKACCEL_INLINE V uniforms(Words words) {
  return mul(add(to_floats(shift_right<9>(words)), set1(0.5f)), set1(0x1p-23f));
}

// The natural logarithm of positive normal numbers within 1 ulp: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and a fit of
// log(1 + f) = f - f^2 / 2 + f^3 P(f) with a weight of 1 / f^3, so that it is as exact near 1.
MASKACCEL_INLINE V vlog(V x) {
  const Words bits = as_words(x), offset = set1_words(0x3f800000u - 0x3f3504f3u);
  const Words moved = add(bits, offset);
  const V n = sub(to_floats(shift_right<23>(moved)), set1(127.0f));
  const V m = as_floats(add(bit_and(moved, set1_words(0x007fffffu)), set1_words(0x3f3504f3u)));
  const V f = sub(m, set1(1.0f)), square = mul(f, f);
  constexpr float c[] = {0.333333313f, -0.250008196f, 0.200012267f, -0.166233569f,
                         0.142017573f, -0.13160184f,  0.127615824f, -0.0763449743f};
  const V tail = fma(n, set1(1.42860677e-6f), mul(mul(polynomial(f, c, 7), f), square));
  return fma(n, set1(0.693145752f), add(f, fma(set1(-0.5f), square, tail)));
}

// Gumbel noise of each word.
MASKACCEL_INLINE V gumbel(Words words) {
  const V zero = set1(0.0f);
  return sub(zero, vlog(sub(zero, vlog(uniforms(words)))));
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
