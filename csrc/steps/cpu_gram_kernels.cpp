// Inner products of remembered features. Compiled once per instruction set; see common/isa.h.
#include "../common/vec_double.h"
#include "cpu_gram.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// Rows of a tile: its products and one tile of rows fit the vector registers.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 3;
#endif
// Elements between two additions to the sums of a chunk: the rows stay in the nearest cache from tile to tile, and
// short runs keep the rounding of long sums small.
constexpr int64_t kBlock = 512;

// sums[i * kMost + j] += <row i, row j> over n elements, for I x J rows; of a tile on the diagonal only i <= j.
template <int I, int J, bool DIAGONAL, class T>
void tile_products(const T* const* rows, const T* const* columns, int64_t n, VD* sums) {
  VD total[I][J];
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) total[i][j] = zero_d();
  const auto step = [&](int64_t at, auto part) MASKACCEL_HOT {
    V b[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) b[j] = load(columns[j] + at, part);
    // The low halves of all products before the high ones: two products of one sum are then far apart.
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      VD wide[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) wide[j] = half == 0 ? low_half(b[j]) : high_half(b[j]);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) {
        const V a = DIAGONAL ? b[i] : load(rows[i] + at, part);
        const VD left = DIAGONAL ? wide[i] : half == 0 ? low_half(a) : high_half(a);
#pragma GCC unroll 4
        for (int j = DIAGONAL ? i : 0; j < J; ++j) total[i][j] = fma(left, wide[j], total[i][j]);
      }
    }
  };
  int64_t at = 0;
  for (; at + W <= n; at += W) step(at, Full{});
  if (at < n) step(at, Tail{static_cast<int>(n - at)});
  for (int i = 0; i < I; ++i)
    for (int j = DIAGONAL ? i : 0; j < J; ++j) {
      VD& sum = sums[i * Gram::kMost + j];
      sum = add(sum, total[i][j]);
    }
}

template <bool DIAGONAL, class T>
void any_tile(const T* const* rows, const T* const* columns, int64_t count, int64_t n, VD* sums) {
  const auto run = [&](auto size) {
    constexpr int J = decltype(size)::k;
    tile_products<DIAGONAL ? J : kTile, J, DIAGONAL>(rows, columns, n, sums);
  };
  if (count == 1) return run(Chain<1>{});
  if (count == 2) return run(Chain<2>{});
  if (count == 3) return run(Chain<3>{});
  run(Chain<kTile>{});
}

template <class T>
void gram_chunks(const Gram& s, int64_t begin, int64_t end) {
  VD sums[Gram::kMost * Gram::kMost];
  const T* rows[Gram::kMost];
  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t n = s.size - from < s.chunk ? s.size - from : s.chunk;
    for (VD& sum : sums) sum = zero_d();
    for (int64_t done = 0; done < n; done += kBlock) {
      const int64_t count = n - done < kBlock ? n - done : kBlock;
      for (int64_t k = 0; k < s.K; ++k)
        rows[k] = static_cast<const T*>(s.history) + k * s.stride_k + b * s.stride_b + from + done;
      for (int64_t i = 0; i < s.K; i += kTile)
        for (int64_t j = i; j < s.K; j += kTile) {
          const int64_t width = s.K - j < kTile ? s.K - j : kTile;
          VD* const at = sums + i * Gram::kMost + j;
          if (i == j) {
            any_tile<true>(rows + i, rows + j, width, count, at);
          } else {
            any_tile<false>(rows + i, rows + j, width, count, at);
          }
        }
    }
    double* const out = s.partial + c * s.K * s.K;
    for (int64_t i = 0; i < s.K; ++i)
      for (int64_t j = i; j < s.K; ++j) out[i * s.K + j] = hsum(sums[i * Gram::kMost + j]);
  }
}

void gram(const Gram& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { gram_chunks<decltype(t)>(s, begin, end); });
}

}  // namespace

const GramKernels gram_kernels = {gram};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
