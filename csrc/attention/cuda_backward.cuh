// Gradients of attention over lists of tiles on mma.sync, without atomics: one kernel in two orientations.
//
// For dq, a CTA owns query rows and walks keys along a row of tiles. For dk and dv it owns keys and walks queries along
// a column of tiles, of one query head of the key head after the other. With x the rows owned and y the pieces walked,
// either way
//   s = x1 y1^T,  P = exp(s - lse),  dP = x2 y2^T,  dS = P (dP - delta),  first += dS y1,  second += P y2 (keys alone)
// where (x1, x2) is (q, dout) or (k, v) and (y1, y2) the other pair. s and dP come out of the products laid out as
// their next factor.
#pragma once

#include "cuda_tiles.cuh"

namespace maskaccel::cuda {

struct GradientParams {
  AttentionArgs a;
  RowTerms terms;
};

/// What few calls ask for costs no registers here, so every plan serves it.
template <typename I, bool kKeyRows_>
struct BackwardPlan : I {
  using I::kWidth;
  static constexpr bool kKeyRows = kKeyRows_, kGeneral = true;
  static constexpr int kThreads = 4 * kWarp, kRows = 64;
  // Two gradients of wide heads do not fit the registers: two CTAs form half of their columns each.
  static constexpr int kSplit = kKeyRows && kWidth > 160 ? 2 : 1, kValues = I::kValues / kSplit;
  static constexpr int kPiece = kWidth <= (kKeyRows ? 80 : 96) ? 64 : kWidth <= 160 ? 32 : 16;
  static constexpr int kTile = kPiece * kStep<kWidth>;
  static constexpr int kShared = (2 * kRows * kStep<kWidth> + 4 * kTile) * 2;
};

/// One group of `lanes` lanes is one query of the padded rows.
template <typename T>
__global__ void __launch_bounds__(128) attention_delta_kernel(const __grid_constant__ GradientParams params) {
  const AttentionArgs& p = params.a;
  const RowTerms& terms = params.terms;
  int lanes = 2;
  while (lanes * kVec < p.dim) lanes *= 2;
  const int64_t at = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / lanes;
  const int64_t bh = at / terms.padded;
  const int row = static_cast<int>(at % terms.padded), b = static_cast<int>(bh / p.heads),
            h = static_cast<int>(bh % p.heads);
  const bool inside = b < p.batch && row < p.queries;
  float sum = 0.f;
  if (inside) {
    const int d = threadIdx.x % lanes * kVec;
    const auto row_of = [&](const Rows& r) {
      return static_cast<const T*>(r.data) + b * r.stride_b + row * r.stride_s + h * r.stride_h;
    };
    const Floats x = to_floats<T>(load_pack(row_of(p.dout), d, p.dim, p.dout.vec));
    const Floats y = to_floats<T>(load_pack(row_of(p.result), d, p.dim, p.result.vec));
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += x[i] * y[i];
  }
  sum = warp_sum(sum, lanes);
  if (b >= p.batch || threadIdx.x % lanes != 0) return;
  const int64_t source = bh * p.queries + row;
  const float lse = inside ? p.lse[source] : -kInfinity;
  const bool empty = lse == -kInfinity;
  terms.lse[at] = empty ? kInfinity : lse * kLog2e;
  terms.delta[at] = empty ? 0.f : sum - (p.dlse != nullptr ? p.dlse[source] : 0.f);
}

template <typename P>
__global__ void __launch_bounds__(P::kThreads)
    attention_backward_kernel(const __grid_constant__ GradientParams params) {
  using T = typename P::T;
  constexpr bool kKeyRows = P::kKeyRows;
  constexpr int kPiece = P::kPiece, kStride = kStep<P::kWidth>, kValues = P::kValues;
  const AttentionArgs& p = params.a;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & 31, group = p.heads / p.key_heads;
  const int size = kKeyRows ? p.bn : p.bm, blocks = (size + P::kRows - 1) / P::kRows;
  const Line line = locate<kKeyRows>(p, kKeyRows ? p.key_heads : p.heads, blockIdx.x / blocks);
  const int b = line.b, first = line.line * size + blockIdx.x % blocks * P::kRows;
  const int row_limit = smaller((line.line + 1) * size, kKeyRows ? p.keys : p.queries);
  if (first >= row_limit) return;
  const int from_column = blockIdx.y * kValues;

  T* const x1 = reinterpret_cast<T*>(dynamic_shared());
  T* const x2 = x1 + P::kRows * kStride;
  T* const ring = x2 + P::kRows * kStride;
  T *const my_x1 = x1 + 16 * warp * kStride, *const my_x2 = x2 + 16 * warp * kStride;
  const auto head_of = [&](const Rows& r, int h) {
    return static_cast<const T*>(r.data) + b * r.stride_b + h * r.stride_h;
  };
  const Rows &rows1 = kKeyRows ? p.k : p.q, &rows2 = kKeyRows ? p.v : p.dout;
  const Rows &pieces1 = kKeyRows ? p.q : p.k, &pieces2 = kKeyRows ? p.dout : p.v;

  // Heads of the queries that are walked; of one query head, or of all of a key head.
  Walk<kKeyRows, kPiece> walk{b, kKeyRows ? line.h * group : line.h, kKeyRows ? line.h * group + group : line.h + 1,
                              line.line};
  walk.start(p);
  int stage = 0;
  const auto fetch = [&] {
    if (!walk.done()) {
      T* const to = ring + stage * 2 * P::kTile;
      const int h = kKeyRows ? walk.h : line.h / group;
      fill<P, kPiece>(to, head_of(pieces1, h), pieces1, walk.begin, walk.limit, p.dim);
      fill<P, kPiece>(to + P::kTile, head_of(pieces2, h), pieces2, walk.begin, walk.limit, p.dim);
    }
    close_copies();
    stage ^= 1;
  };
  fill<P, P::kRows>(x1, head_of(rows1, line.h), rows1, first, row_limit, p.dim);
  fill<P, P::kRows>(x2, head_of(rows2, line.h), rows2, first, row_limit, p.dim);
  fetch();

  Span<kKeyRows> at{b, line.h, first + 16 * warp + lane / 4, 0};
  float row_lse[2] = {}, row_delta[2] = {};
  if constexpr (!kKeyRows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = (int64_t{b} * p.heads + line.h) * params.terms.padded + at.row + 8 * i;
      row_lse[i] = params.terms.lse[row];
      row_delta[i] = params.terms.delta[row];
    }
  }
  const bool added = adds_to_scores(p);
  const float to_log2 = added ? 1.f : p.scale * kLog2e;
  float sum1[1][kValues / 8][4] = {}, sum2[1][kKeyRows ? kValues / 8 : 1][4] = {};

  while (!walk.done()) {
    const auto here = walk;
    walk.next(p);
    wait_copies<0>();
    sync_threads();  // the piece is here, and nobody reads the stage of the one before
    const T *const y1 = ring + (stage ^ 1) * 2 * P::kTile, *const y2 = y1 + P::kTile;
    fetch();

    float weights[1][kPiece / 8][4] = {}, slopes[1][kPiece / 8][4] = {};
    scores_of<T, 1, kPiece, P::kWidth>(weights, my_x1, y1);
    at.h = kKeyRows ? here.h : line.h;
    at.column = here.begin + fresh(lane) % 4 * 2;
    if (added) add_to_scores<T, kKeyRows, 1, kPiece>(weights, p, at);
    if (here.is_partial()) {
      apply_pattern<kKeyRows, 1, kPiece>(weights, p, at, kKeyRows ? here.tile : line.line,
                                         kKeyRows ? line.line : here.tile);
    }
    if (here.is_edge()) apply_limit<1, kPiece>(weights, here.limit - at.column);

    const int64_t column_at = kKeyRows ? (int64_t{b} * p.heads + here.h) * params.terms.padded + at.column : 0;
#pragma unroll
    for (int n = 0; n < kPiece / 8; ++n) {
      float2 lse{};
      if constexpr (kKeyRows) lse = *reinterpret_cast<const float2*>(params.terms.lse + column_at + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[0][n][i] =
            exp2_fast(weights[0][n][i] * to_log2 - (kKeyRows ? (i % 2 ? lse.y : lse.x) : row_lse[i / 2]));
      }
    }
    if constexpr (kKeyRows) weighted_sum<T, 1, kPiece, kValues, kStride>(sum2, weights, y2 + from_column);
    scores_of<T, 1, kPiece, P::kWidth>(slopes, my_x2, y2);
#pragma unroll
    for (int n = 0; n < kPiece / 8; ++n) {
      float2 delta{};
      if constexpr (kKeyRows) delta = *reinterpret_cast<const float2*>(params.terms.delta + column_at + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[0][n][i] *= slopes[0][n][i] - (kKeyRows ? (i % 2 ? delta.y : delta.x) : row_delta[i / 2]);
      }
    }
    if constexpr (!kKeyRows) {
      if (p.ds != nullptr) {
#pragma unroll
        for (int n = 0; n < kPiece / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = at.row + i / 2 * 8, column = at.column + 8 * n + i % 2;
            if (row < row_limit && column < here.limit) {
              p.ds[((int64_t{b} * p.heads + line.h) * p.queries + row) * p.keys + column] = weights[0][n][i];
            }
          }
      }
    }
    weighted_sum<T, 1, kPiece, kValues, kStride>(sum1, weights, y1 + from_column);
  }

  wait_copies<0>();
  sync_threads();
  const int heads = kKeyRows ? p.key_heads : p.heads;
  const int64_t row_stride = int64_t{heads} * p.dim;
  const int64_t start =
      int64_t{b} * (kKeyRows ? p.keys : p.queries) * row_stride + int64_t{line.h} * p.dim + from_column;
  const auto store = [&](void* result, T* tile, const auto& sum, float factor) {
    if (result == nullptr) return;
#pragma unroll
    for (int n = 0; n < kValues / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = pack_pair<T>(sum[0][n][2 * i] * factor, sum[0][n][2 * i + 1] * factor);
        *reinterpret_cast<uint32_t*>(tile + (lane / 4 + 8 * i) * kStride + 8 * n + lane % 4 * 2) = pair;
      }
    sync_warp();
    store_rows<T, kValues, kStride>(static_cast<T*>(result) + start, tile, row_stride, first + 16 * warp, row_limit,
                                    p.dim - from_column);
  };
  store(kKeyRows ? p.dk : p.dq, my_x1, sum1, p.scale);
  if constexpr (kKeyRows) store(p.dv, my_x2, sum2, 1.f);
}

}  // namespace maskaccel::cuda
