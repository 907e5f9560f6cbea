// How much attention each key receives: the backward's walk along a column of tiles, with one product and no gradient.
#pragma once

#include "cuda_tiles.cuh"

namespace maskaccel::cuda {

struct SumParams {
  AttentionArgs a;        // q, k, lse, the mask and what is added to the scores
  float* sums = nullptr;  // (B, H, Sk)
};

template <typename I>
struct SumPlan : I {
  using I::kWidth;
  static constexpr bool kGeneral = true;
  static constexpr int kThreads = 4 * kWarp, kRows = 64, kPiece = kWidth <= 128 ? 64 : 32;
  static constexpr int kTile = kPiece * kStep<kWidth>;
  static constexpr int kShared = (kRows * kStep<kWidth> + 2 * kTile) * 2;
};

template <typename P>
__global__ void __launch_bounds__(P::kThreads) attention_sums_kernel(const __grid_constant__ SumParams params) {
  using T = typename P::T;
  constexpr int kPiece = P::kPiece, kStride = kStep<P::kWidth>;
  const AttentionArgs& p = params.a;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & 31, blocks = (p.bn + P::kRows - 1) / P::kRows;
  const Line line = locate<true>(p, p.heads, blockIdx.x / blocks);
  const int b = line.b, h = line.h, first = line.line * p.bn + blockIdx.x % blocks * P::kRows;
  const int row_limit = smaller((line.line + 1) * p.bn, p.keys);
  if (first >= row_limit) return;

  T* const keys = reinterpret_cast<T*>(dynamic_shared());
  T* const ring = keys + P::kRows * kStride;
  const T* const queries = static_cast<const T*>(p.q.data) + b * p.q.stride_b + h * p.q.stride_h;
  Walk<true, kPiece> walk{b, h, h + 1, line.line};
  walk.start(p);
  int stage = 0;
  const auto fetch = [&] {
    if (!walk.done()) fill<P, kPiece>(ring + stage * P::kTile, queries, p.q, walk.begin, walk.limit, p.dim);
    close_copies();
    stage ^= 1;
  };
  const int64_t keys_at = b * p.k.stride_b + h / (p.heads / p.key_heads) * p.k.stride_h;
  fill<P, P::kRows>(keys, static_cast<const T*>(p.k.data) + keys_at, p.k, first, row_limit, p.dim);
  fetch();

  const bool added = adds_to_scores(p);
  const float to_log2 = added ? 1.f : p.scale * kLog2e;
  const float* const lse = p.lse + (int64_t{b} * p.heads + h) * p.queries;
  Span<true> at{b, h, first + 16 * warp + lane / 4, 0};
  float sum[2] = {};
  while (!walk.done()) {
    const auto here = walk;
    walk.next(p);
    wait_copies<0>();
    sync_threads();
    const T* const piece = ring + (stage ^ 1) * P::kTile;
    fetch();
    float scores[1][kPiece / 8][4] = {};
    scores_of<T, 1, kPiece, P::kWidth>(scores, keys + 16 * warp * kStride, piece);
    at.column = here.begin + fresh(lane) % 4 * 2;
    if (added) add_to_scores<T, true, 1, kPiece>(scores, p, at);
    if (here.is_partial()) apply_pattern<true, 1, kPiece>(scores, p, at, here.tile, line.line);
#pragma unroll
    for (int n = 0; n < kPiece / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = at.column + 8 * n + e;
        const float of_query = query < here.limit ? lse[query] : -kInfinity;
        const float shift = of_query == -kInfinity ? kInfinity : of_query * kLog2e;  // nothing is kept: exp2(-inf)
        sum[0] += exp2_fast(scores[0][n][e] * to_log2 - shift);
        sum[1] += exp2_fast(scores[0][n][2 + e] * to_log2 - shift);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = quad_sum(sum[i]);
    const int key = at.row + 8 * i;
    if (lane % 4 == 0 && key < row_limit) params.sums[(int64_t{b} * p.heads + h) * p.keys + key] = total;
  }
}

}  // namespace maskaccel::cuda
