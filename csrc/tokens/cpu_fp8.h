// fp8 e4m3fn, as torch converts it, a vector at a time.
#pragma once

#include "cpu_words.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

#if defined(__AVX512F__)
MASKACCEL_INLINE Words load_bytes(const uint8_t* p, Full) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MASKACCEL_INLINE void store_bytes(uint8_t* p, Words v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
#elif defined(__AVX2__)
MASKACCEL_INLINE Words load_bytes(const uint8_t* p, Full) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
MASKACCEL_INLINE void store_bytes(uint8_t* p, Words v, Full) {
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
}
#else
MASKACCEL_INLINE Words load_bytes(const uint8_t* p, Full) {
  Words v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return v;
}
MASKACCEL_INLINE void store_bytes(uint8_t* p, Words v, Full) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(v[i]);
}
#endif
MASKACCEL_INLINE Words load_bytes(const uint8_t* p, Tail t) {
  uint8_t all[W] = {};
  std::memcpy(all, p, static_cast<size_t>(t.n));
  return load_bytes(all, Full{});
}
MASKACCEL_INLINE void store_bytes(uint8_t* p, Words v, Tail t) {
  uint8_t all[W];
  store_bytes(all, v, Full{});
  std::memcpy(p, all, static_cast<size_t>(t.n));
}

constexpr uint32_t kFp8Nan = 0x7f;
constexpr uint32_t kFp8Bias = 120u << 23;  // what the exponents of fp32 and e4m3fn differ by

// The bits of each number, which is 448 at most in magnitude or a NaN, rounded to the nearest even.
MASKACCEL_INLINE Words to_fp8(V v) {
  const Words bits = as_words(v), sign = bit_and(shift_right<24>(bits), set1_words(0x80u));
  const V size = vabs(v);
  const Words fixed = as_words(size), odd = bit_and(shift_right<20>(fixed), set1_words(1u));
  const Words normal = shift_right<20>(add(add(fixed, odd), set1_words(0x7ffffu - kFp8Bias)));
  // Below the normal numbers the sum with 2^14 rounds at the right bit, and leaves the count of 2^-9 in the low ones.
  const Words small = bit_and(as_words(add(size, set1(16384.0f))), set1_words(0xffu));
  V code = less(size, set1(0x1p-6f), as_floats(small), as_floats(normal));
  code = less(size, set1(1000.0f), code, as_floats(set1_words(kFp8Nan)));
  return bit_or(as_words(code), sign);
}

MASKACCEL_INLINE V from_fp8(Words byte) {
  const Words size = bit_and(byte, set1_words(0x7fu)), sign = shift_left<24>(bit_and(byte, set1_words(0x80u)));
  const V count = to_floats(size);
  const V normal = as_floats(add(shift_left<20>(size), set1_words(kFp8Bias)));
  V v = less(count, set1(8.0f), mul(count, set1(0x1p-9f)), normal);
  v = less(count, set1(static_cast<float>(kFp8Nan)), v, set1(__builtin_nanf("")));
  return as_floats(bit_or(as_words(v), sign));
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
