// Operands of the small matrix products of attention tiles, packed as 32-bit words. For kernel sources only: all of it
// lives in the namespace of the instruction set.
//
// A word is one fp32 number (`Singles`) or two bf16 numbers that follow each other along the summed dim, the first in
// the low half (`Pairs`, where there are bf16 dot products). Words are held as float whatever their bits mean; a word
// of zero bits is zero in both. `OperandOf<T>` is what tiles of T are multiplied as: bf16 as Pairs where they exist,
// all else as Singles. Packing converts: from fp32, bf16, fp16 to Singles; from bf16 and fp32 (rounded to nearest
// even) to Pairs. kDepth is the numbers in a word.
//
// Of a source X [rows][columns], rows at any stride, columns contiguous:
//
//   pack_rows        word[i][c] = X[i][c ..]      [rows][columns / kDepth]: X as the left operand, summed over columns
//   pack_transposed  word[c][i] = X[i][c ..]      [columns / kDepth][rows]: X^T as the right operand, summed over
//                                                 columns
//   pack_stacked     word[i][c] = X[i ..][c]      [ceil(rows / kDepth)][columns]: X as the right operand, summed over
//                                                 rows; read with a_row = 1, a_step = ld it is X^T as the left operand,
//                                                 summed over rows
//
// where `[c ..]` are the kDepth elements from kDepth * c on. For Singles rows and stacked are the same. Every row of
// words is filled with zeros up to `ld`, and an odd last row of pack_stacked is paired with zeros. `columns` is a
// multiple of kDepth for rows and transposed.
#pragma once

#include "../common/vec.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

// The least multiple of a vector that holds n: for rows of words of right operands and results.
MASKACCEL_INLINE int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }

struct Singles {
  static constexpr int kDepth = 1;
  MASKACCEL_INLINE V spread(const float* word) { return set1(*word); }
  MASKACCEL_INLINE V madd(V a, V b, V sum) { return fma(a, b, sum); }
  // W words of a row, and those of one row of pack_stacked.
  template <class T, class Part>
  MASKACCEL_INLINE V words(const T* p, Part part) {
    return load(p, part);
  }
  template <class T, class Part>
  MASKACCEL_INLINE V stacked(const T* p, const T*, Part part) {
    return load(p, part);
  }
};

#if defined(__AVX512BF16__)

struct Pairs {
  static constexpr int kDepth = 2;
  MASKACCEL_INLINE V spread(const float* word) { return _mm512_castsi512_ps(_mm512_set1_epi32(bits(word))); }
  MASKACCEL_INLINE V madd(V a, V b, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  // Two vectors, one above the other, rounded: each word pairs what stands in one lane.
  MASKACCEL_INLINE V stack(V low, V high) {
    const __m512i order = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set_epi32(31 << 16, 30 << 16, 29 << 16, 28 << 16, 27 << 16, 26 << 16,
                                                            25 << 16, 24 << 16, 23 << 16, 22 << 16, 21 << 16, 20 << 16,
                                                            19 << 16, 18 << 16, 17 << 16, 16 << 16));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
  }
  // Two vectors, one after the other, rounded: each word pairs neighbours.
  MASKACCEL_INLINE V follow(V first, V second) { return (V)_mm512_cvtne2ps_pbh(second, first); }
  MASKACCEL_INLINE V words(const bf16* p, Full) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  MASKACCEL_INLINE V words(const bf16* p, Tail t) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask(t), p));
  }
  MASKACCEL_INLINE V words(const float* p, Full) {
    return follow(_mm512_loadu_ps(p), _mm512_loadu_ps(p + W));
  }
  MASKACCEL_INLINE V words(const float* p, Tail t) {
    const uint32_t all = (1u << (2 * t.n)) - 1;
    return follow(_mm512_maskz_loadu_ps(static_cast<__mmask16>(all), p),
                  _mm512_maskz_loadu_ps(static_cast<__mmask16>(all >> 16), p + W));
  }
  template <class Part>
  MASKACCEL_INLINE V stacked(const bf16* low, const bf16* high, Part part) {
    const __m512i a = _mm512_cvtepu16_epi32(raw(low, part));
    if (high == nullptr) return _mm512_castsi512_ps(a);
    return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw(high, part)), 16)));
  }
  template <class Part>
  MASKACCEL_INLINE V stacked(const float* low, const float* high, Part part) {
    return stack(load(low, part), high == nullptr ? set1(0.0f) : load(high, part));
  }

 private:
  MASKACCEL_INLINE int bits(const float* word) {
    int u;
    std::memcpy(&u, word, sizeof u);
    return u;
  }
  MASKACCEL_INLINE __m256i raw(const bf16* p, Full) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  MASKACCEL_INLINE __m256i raw(const bf16* p, Tail t) { return _mm256_maskz_loadu_epi16(mask(t), p); }
};

#endif

template <class T>
struct OperandFor {
  using type = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct OperandFor<bf16> {
  using type = Pairs;
};
#endif
template <class T>
using OperandOf = typename OperandFor<T>::type;

// f(i, Full | Tail) over n words, in vectors.
template <class F>
MASKACCEL_INLINE void each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Tail{static_cast<int>(n - i)});
}

MASKACCEL_INLINE void fill_zero(float* row, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) row[i] = 0.0f;
}

template <class O, class T>
MASKACCEL_OUTLINE void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t ld) {
  const int64_t words = columns / O::kDepth;
  for (int64_t i = 0; i < rows; ++i, x += stride, to += ld) {
    each_vector(words, [&](int64_t c, auto part) MASKACCEL_HOT {
      store(to + c, O::words(x + c * O::kDepth, part), part);
    });
    fill_zero(to, words, ld);
  }
}

template <class O, class T>
MASKACCEL_OUTLINE void pack_stacked(const T* x, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += O::kDepth, x += O::kDepth * stride, to += ld) {
    const T* const next = i + 1 < rows ? x + stride : nullptr;
    each_vector(columns, [&](int64_t c, auto part) MASKACCEL_HOT {
      store(to + c, O::stacked(x + c, next == nullptr ? nullptr : next + c, part), part);
    });
    fill_zero(to, columns, ld);
  }
}

// W vectors as the rows of a square: its transpose.
#if defined(__AVX512F__)
MASKACCEL_INLINE void transpose_square(V* r) {
  V t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](V a, V b) MASKACCEL_HOT {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](V a, V b) MASKACCEL_HOT {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  // r[4 g + j] holds, in each quarter q, column 4 q + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V even_low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd_low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const V even_high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88),
            odd_high = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#elif defined(__AVX2__)
MASKACCEL_INLINE void transpose_square(V* r) {
  V t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#else
MASKACCEL_INLINE void transpose_square(V* r) {
  float in[W][W], out[W][W];
  std::memcpy(in, r, sizeof in);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) out[j][i] = in[i][j];
  std::memcpy(r, out, sizeof out);
}
#endif

// f(c, i, vector) with the words of pack_transposed: word c of rows i to i + W - 1, zeros past the last row, for all
// words and i = 0, W, ... below `lanes`.
template <class O, class T, class F>
MASKACCEL_INLINE void each_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t lanes, F&& f) {
  const int64_t words = columns / O::kDepth;
  for (int64_t i = 0; i < lanes; i += W) {
    const int64_t there = rows - i < W ? (rows > i ? rows - i : 0) : W;
    each_vector(words, [&](int64_t c, auto part) MASKACCEL_HOT {
      V square[W];
      for (int64_t j = 0; j < W; ++j)
        square[j] = j < there ? O::words(x + (i + j) * stride + c * O::kDepth, part) : set1(0.0f);
      transpose_square(square);
      const int64_t lines = words - c < W ? words - c : W;
      for (int64_t j = 0; j < lines; ++j) f(c + j, i, square[j]);
    });
  }
}

template <class O, class T>
MASKACCEL_OUTLINE void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, float* to,
                                       int64_t ld) {
  each_transposed<O>(x, stride, rows, columns, ld, [&](int64_t c, int64_t i, V v) MASKACCEL_HOT {
    if (ld - i >= W) {
      store(to + c * ld + i, v, Full{});
    } else {
      store(to + c * ld + i, v, Tail{static_cast<int>(ld - i)});
    }
  });
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
