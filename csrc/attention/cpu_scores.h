// Probabilities of scores formed again, with lse known: which elements count, what is added, the exponential; for
// vectors along the keys. For kernel sources only.
#pragma once

#include "cpu_gemm.h"
#include "cpu_problem.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

constexpr float kFarBelow = -0x1p20f;  // a score that stands for -inf, which would make NaN of differences

// Bits of W elements of a pattern's row, from element `at` on, a multiple of W.
MASKACCEL_INLINE uint32_t bits_at(const int32_t* row, int64_t at) {
  return (static_cast<uint32_t>(row[at / 32]) >> (at % 32)) & ((1u << W) - 1);
}
// Those of the first n elements from `at` on.
MASKACCEL_INLINE uint32_t bits_below(int64_t n, int64_t at) {
  const int64_t left = n - at;
  return left >= W ? (1u << W) - 1 : left <= 0 ? 0u : (1u << left) - 1;
}

// Lane l is `yes` where bit l is set, else `no`.
MASKACCEL_INLINE V choose(uint32_t bits, V yes, V no) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(no, static_cast<__mmask16>(bits), yes);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes), lanes);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(set));
#else
  const VI lanes = {1, 2, 4, 8, 16, 32, 64, 128};
  const int32_t b = static_cast<int32_t>(bits);
  return (VI{b, b, b, b, b, b, b, b} & lanes) != 0 ? yes : no;
#endif
}

template <class T>
MASKACCEL_INLINE void bias_row(const T* bias, int64_t step, int64_t n, float* to) {
  if (step == 1) {
    int64_t j = 0;
    for (; j + W <= n; j += W) store(to + j, load(bias + j, Full{}), Full{});
    if (j < n) store(to + j, load(bias + j, Tail{static_cast<int>(n - j)}), Full{});
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = to_float(bias[j * step]);
  }
}

// Bias and relative position of query i and keys j to j + n - 1, then zeros up to a whole vector.
MASKACCEL_OUTLINE void added_scores(const ScoreTerms& t, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n,
                                    float* to) {
  for (int64_t l = n / W * W; l < (n + W - 1) / W * W; ++l) to[l] = 0.0f;
  if (t.bias != nullptr) {
    const int64_t at = b * t.bias_b + h * t.bias_h + i * t.bias_i + j * t.bias_j;
    with_dtype(t.bias_dtype, [&](auto of) { bias_row(static_cast<const decltype(of)*>(t.bias) + at, t.bias_j, n, to); });
  } else {
    for (int64_t l = 0; l < n; ++l) to[l] = 0.0f;
  }
  if (t.table == nullptr) return;
  const float* const table = t.table + h * t.table_h + t.relpos_q[b * t.relpos_q_b + i];
  const int32_t* const keys = t.relpos_k + b * t.relpos_k_b + j;
  for (int64_t l = 0; l < n; ++l) to[l] += table[-static_cast<int64_t>(keys[l])];
}

// A number as the sum of two: what is multiplied by it is then as good as not rounded.
struct Split {
  float high = 0.0f, low = 0.0f;
  Split() = default;
  explicit Split(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - high)) {}
};

// What the vectors of one row of a block share. P = share * 2^(log2(e) * (scale * s + added) - shift) with a whole
// shift near lse: the power's whole part is taken off before anything is rounded, so that the error of P is that of lse
// and s.
struct ScoreRow {
  Split factor;  // scale * log2(e)
  float minus_shift, share, delta;
  const float* added;   // null: nothing is added
  const int32_t* kept;  // null: all are
};

// P of W scores, 0 where not kept.
MASKACCEL_INLINE V probability(const ScoreRow& r, V score, int64_t j, int64_t keys) {
  const V factor = set1(r.factor.high), minus_shift = set1(r.minus_shift);
  V whole, fraction;
  if (r.added == nullptr) {
    whole = vround(fma(score, factor, minus_shift));
    fraction = fma(score, factor, sub(minus_shift, whole));
  } else {
    const Split unit(kLog2e);
    const V added = vmax(set1(kFarBelow), load(r.added + j, Full{})), by = set1(unit.high);
    whole = vround(fma(score, factor, fma(added, by, minus_shift)));
    fraction = fma(score, factor, fma(added, by, sub(minus_shift, whole)));
    fraction = fma(added, set1(unit.low), fraction);
  }
  fraction = fma(score, set1(r.factor.low), fraction);
  V p = mul(vexp2_of(whole, fraction), set1(r.share));
  if (r.kept != nullptr) p = choose(bits_at(r.kept, j), p, set1(0.0f));
  if (j + W > keys) p = choose(bits_below(keys, j), p, set1(0.0f));
  return p;
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
