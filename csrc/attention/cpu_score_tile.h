// What happens to a tile of inner products before the softmax (scale, bias, relative positions, element masks), for
// vectors along the queries. For kernel sources only.
#pragma once

#include <limits>

#include "cpu_gemm.h"
#include "cpu_problem.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Scores of `keys` keys from k0 on and `queries` queries from q0 on, one key a row: what is done for each query then
// runs along the rows, with no sum or maximum across the lanes of a vector. Lanes from `queries` on hold anything.
struct ScoreTile {
  int64_t b = 0, h = 0, q0 = 0, queries = 0, k0 = 0, keys = 0;
  float* scores = nullptr;  // [keys][ld]
  int64_t ld = 0;           // a multiple of W
};

// scores = scale * scores + bias
template <class T>
MASKACCEL_OUTLINE void add_bias(const ScoreTerms& t, const ScoreTile& x, float scale) {
  const T* const bias = static_cast<const T*>(t.bias) + x.b * t.bias_b + x.h * t.bias_h + x.q0 * t.bias_i +
                        x.k0 * t.bias_j;
  const V by = set1(scale);
  const auto put = [&](int64_t j, int64_t i, V v) MASKACCEL_HOT {
    float* const p = x.scores + j * x.ld + i;
    store(p, fma(load(p, Full{}), by, v), Full{});
  };
  const int64_t lanes = whole_vectors(x.queries);
  if (t.bias_i != 0 && t.bias_j == 1) {
    each_transposed<Singles>(bias, t.bias_i, x.queries, x.keys, lanes, put);
    return;
  }
  for (int64_t j = 0; j < x.keys; ++j) {
    const T* const of_key = bias + j * t.bias_j;
    if (t.bias_i == 0) {
      const V same = set1(to_float(*of_key));
      for (int64_t i = 0; i < lanes; i += W) put(j, i, same);
    } else if (t.bias_i == 1) {
      each_vector(x.queries, [&](int64_t i, auto part) MASKACCEL_HOT { put(j, i, load(of_key + i, part)); });
    } else {
      for (int64_t i = 0; i < x.queries; ++i) {
        float& score = x.scores[j * x.ld + i];
        score = score * scale + to_float(of_key[i * t.bias_i]);
      }
    }
  }
}

// scores = scale * scores + relative position
MASKACCEL_OUTLINE void add_relpos(const ScoreTerms& t, const ScoreTile& x, float scale) {
  const float* const table = t.table + x.h * t.table_h;
  const int32_t* const of_query = t.relpos_q + x.b * t.relpos_q_b + x.q0;
  const int32_t* const of_key = t.relpos_k + x.b * t.relpos_k_b + x.k0;
  const V by = set1(scale);
  const auto lanes = [&](int64_t i, int64_t count) MASKACCEL_HOT {
    float of_lane[W] = {};  // filled one by one: a gather is slower
    for (int64_t j = 0; j < x.keys; ++j) {
      float* const p = x.scores + j * x.ld + i;
      for (int64_t lane = 0; lane < count; ++lane) of_lane[lane] = table[of_query[i + lane] - of_key[j]];
      store(p, fma(load(p, Full{}), by, load(of_lane, Full{})), Full{});
    }
  };
  int64_t i = 0;
  for (; i + W <= x.queries; i += W) lanes(i, W);
  if (i < x.queries) lanes(i, x.queries - i);
}

// scores = scale * scores + bias + relative position
MASKACCEL_OUTLINE void add_terms(const ScoreTerms& t, const ScoreTile& x, float scale) {
  if (t.bias != nullptr) {
    with_dtype(t.bias_dtype, [&](auto of) { add_bias<decltype(of)>(t, x, scale); });
    scale = 1.0f;
  }
  if (t.table != nullptr) return add_relpos(t, x, scale);
  if (scale == 1.0f) return;
  for (int64_t j = 0; j < x.keys; ++j)
    for (int64_t i = 0; i < x.queries; ++i) x.scores[j * x.ld + i] *= scale;
}

// Bit j of each of W words chooses between a score and -inf.
#if defined(__AVX512F__)
using Words = __m512i;
MASKACCEL_INLINE Words load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
MASKACCEL_INLINE V where_bit(Words words, int j, V score) {
  return _mm512_mask_mov_ps(set1(kMinusInf), _mm512_test_epi32_mask(words, _mm512_set1_epi32(1 << j)), score);
}
#elif defined(__AVX2__)
using Words = __m256i;
MASKACCEL_INLINE Words load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
MASKACCEL_INLINE V where_bit(Words words, int j, V score) {
  const __m256i sign = _mm256_sll_epi32(words, _mm_cvtsi32_si128(31 - j));
  return _mm256_blendv_ps(set1(kMinusInf), score, _mm256_castsi256_ps(sign));
}
#else
using Words = VI;
MASKACCEL_INLINE Words load_words(const int32_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
MASKACCEL_INLINE V where_bit(Words words, int j, V score) {
  return (words & static_cast<int32_t>(1u << j)) != 0 ? score : set1(kMinusInf);
}
#endif

// -inf where the pattern does not keep. `bits`: the pattern's word of the tile's first key in the row of its first
// query; `words` a row. There is a row of bits for every lane of the tile's vectors.
MASKACCEL_OUTLINE void apply_pattern(const ScoreTile& x, const int32_t* bits, int64_t words) {
  for (int64_t i = 0; i < x.queries; i += W)
    for (int64_t first = 0; first < x.keys; first += 32) {
      int32_t of_lane[W];
      for (int64_t lane = 0; lane < W; ++lane) of_lane[lane] = bits[(i + lane) * words + first / 32];
      const Words of = load_words(of_lane);
      const int count = static_cast<int>(x.keys - first < 32 ? x.keys - first : 32);
      for (int j = 0; j < count; ++j) {
        float* const p = x.scores + (first + j) * x.ld + i;
        store(p, where_bit(of, j, load(p, Full{})), Full{});
      }
    }
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
