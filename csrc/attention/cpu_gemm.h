// Small matrix products of attention tiles: a block of the result stays in the registers while one dim is summed.
#pragma once

#include "cpu_pack.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

// What a product is added to: zero, the result's own values, or those times a factor for each row.
enum class Start { zero, own, scaled };

// `factor` is null unless `start` is Start::scaled.
template <class O, int ROWS, int VECTORS>
MASKACCEL_INLINE void product_block(int64_t steps, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                    int64_t ldb, float* c, int64_t ldc, Start start, const float* factor) {
  V sum[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = set1(0.0f);
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += ldb) {
    V right[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b + j * W, Full{});
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const V left = O::spread(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = O::madd(left, right[j], sum[i][j]);
    }
  }
  const auto put = [&](auto finish) MASKACCEL_HOT {
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        float* const to = c + i * ldc + j * W;
        store(to, finish(to, i, sum[i][j]), Full{});
      }
  };
  if (start == Start::zero) {
    put([](const float*, int, V s) MASKACCEL_HOT { return s; });
  } else if (factor == nullptr) {
    put([](const float* to, int, V s) MASKACCEL_HOT { return add(load(to, Full{}), s); });
  } else if (factor != nullptr) {
    put([&](const float* to, int i, V s) MASKACCEL_HOT { return fma(load(to, Full{}), set1(factor[i]), s); });
  }
}

// Rows of a block VECTORS wide: sums, right operands and one left operand fit the registers.
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;
template <int VECTORS>
constexpr int kBlockRows = VECTORS == 4 ? 6 : 8;
#elif defined(__AVX2__)
constexpr int kBlockVectors = 3;
template <int VECTORS>
constexpr int kBlockRows = VECTORS == 3 ? 4 : VECTORS == 2 ? 6 : 8;
#else
constexpr int kBlockVectors = 2;
template <int VECTORS>
constexpr int kBlockRows = 8;  // sums in memory, yet twice as fast as 2 rows: more products for each spread number
#endif

template <class O, int VECTORS>
MASKACCEL_OUTLINE void product_columns(int64_t m, int64_t steps, const float* a, int64_t a_row, int64_t a_step,
                                       const float* b, int64_t ldb, float* c, int64_t ldc, Start start,
                                       const float* factor) {
  constexpr int R = kBlockRows<VECTORS>;
  const auto run = [&](auto rows) MASKACCEL_HOT {
    constexpr int N = decltype(rows)::k;
    product_block<O, N, VECTORS>(steps, a, a_row, a_step, b, ldb, c, ldc, start, factor);
    a += N * a_row;
    c += N * ldc;
    if (factor != nullptr) factor += N;
    m -= N;
  };
  while (m >= R) run(Chain<R>{});
  if constexpr (R > 4) {
    if (m >= 4) run(Chain<4>{});
  }
  if constexpr (R > 2) {
    if (m >= 2) run(Chain<2>{});
  }
  if (m >= 1) run(Chain<1>{});
}

// c[i][j] = start + sum over k < steps of a[i][k] . b[k][j], for i < m and j < n, in words of O (see cpu_pack.h):
// word (i, k) of the left operand is a[i * a_row + k * a_step], word (k, j) of the right one b[k * ldb + j], and
// `steps` is the summed dim / O::kDepth, rounded up. n is a multiple of W (whole_vectors): b and c must have that many
// columns. `factor`, for Start::scaled, holds m numbers. c must not overlap a or b.
// Sums over at most kLongestSum steps are taken on their own, in ascending order, and then added: rounding grows with
// the length of one of them, not of all that are added up. One element is the same whatever m, n and the strides are.
constexpr int64_t kLongestSum = 80;

template <class O>
MASKACCEL_OUTLINE void product(int64_t m, int64_t n, int64_t steps, const float* a, int64_t a_row, int64_t a_step,
                               const float* b, int64_t ldb, float* c, int64_t ldc, Start start = Start::zero,
                               const float* factor = nullptr) {
  int64_t vectors = n / W;
  for (int64_t blocks = (vectors + kBlockVectors - 1) / kBlockVectors; blocks > 0; --blocks) {
    const int64_t wide = (vectors + blocks - 1) / blocks;  // 5 vectors are 3 and 2, not 4 and 1
    const int64_t sums = (steps + kLongestSum - 1) / kLongestSum;
    for (int64_t part = 0, k = 0; part < sums; ++part) {
      const int64_t count = (steps - k + sums - part - 1) / (sums - part);
      const auto run = [&](auto width) MASKACCEL_HOT {
        product_columns<O, decltype(width)::k>(m, count, a + k * a_step, a_row, a_step, b + k * ldb, ldb, c, ldc,
                                               part == 0 ? start : Start::own,
                                               part == 0 && start == Start::scaled ? factor : nullptr);
      };
      switch (wide) {
#if defined(__AVX512F__)
        case 4:
          run(Chain<4>{});
          break;
#endif
#if defined(__AVX2__)
        case 3:
          run(Chain<3>{});
          break;
#endif
        case 2:
          run(Chain<2>{});
          break;
        default:
          run(Chain<1>{});
      }
      k += count;
    }
    vectors -= wide;
    b += wide * W;
    c += wide * W;
  }
}

constexpr double kLog2e = 1.4426950408889634;

// 2^(whole + fraction) for whole numbers and fractions of about a half at most: within 7e-8 of the exact value, and
// exactly 1 at 0. Below the normal numbers it is 0 or, on AVX-512, subnormal; NaN stays.
MASKACCEL_INLINE V vexp2_of(V whole, V fraction) {
  V p = set1(0x1.41801cp-13f);
  p = fma(p, fraction, set1(0x1.5f0950p-10f));
  p = fma(p, fraction, set1(0x1.3b2dcep-7f));
  p = fma(p, fraction, set1(0x1.c6af7ap-5f));
  p = fma(p, fraction, set1(0x1.ebfbdcp-3f));
  p = fma(p, fraction, set1(0x1.62e430p-1f));
  p = fma(p, fraction, set1(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  return mul(p, pow2_normal(vmax(set1(-127.0f), whole)));  // the factor for -127 is 0
#endif
}

// 2^x, as above; 0 at -inf.
MASKACCEL_INLINE V vexp2(V x) {
#if defined(__AVX512F__)
  const V fraction = _mm512_reduce_ps(x, 0);  // 0 for -inf
  return vexp2_of(sub(x, fraction), fraction);
#else
  const V near = vmax(set1(-127.0f), x), whole = vround(near);
  return vexp2_of(whole, sub(near, whole));
#endif
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
