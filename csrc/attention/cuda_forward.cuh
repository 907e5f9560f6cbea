// Attention over lists of tiles on mma.sync: sm_80 and everything later.
//
// A CTA of four warps owns kRows query rows of one row of mask tiles; a warp owns kRows / 4 of them with their result,
// their scores and their softmax statistics in registers. Keys and values come in pieces of 64 or 32 through a ring of
// kSlots tiles in shared memory, K and V in turn, so that each copy has the products of the tiles before it to hide
// behind. One loop serves partial and full tiles: patterns, edges, added scores and skip tests are branches that the
// whole CTA takes or not.
#pragma once

#include "cuda_tiles.cuh"

namespace maskaccel::cuda {

/// kGeneral: with what few calls ask for, added scores, skip tests and rows that lie on no 16 bytes; it takes the
/// registers of half the rows of a warp.
template <typename I, bool kGeneral_>
struct ForwardPlan : I {
  using I::kWidth;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kBlocks =
      kGeneral || kWidth > 128 ? 1 : 2;  // of 16 rows a warp: every key fragment serves them all
  static constexpr int kWarps = kGeneral && kWidth <= 128 ? 8 : 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kBlocks * kWarps;
  static constexpr int kPiece =
      kBlocks * kWidth == 256 && (kBlocks == 2 || kGeneral) ? 32 : 64;  // what registers leave for scores
  static constexpr int kSlots = kPiece * kWidth <= 64 * 96 ? 3 : 2;
  static constexpr int kTile = kPiece * kStep<kWidth>;
  static_assert(!kGeneral || kRows == most_pruned_rows(kWidth));
  static constexpr int kShared = (kRows * kStep<kWidth> + kSlots * kTile) * 2;
};

template <typename P>
__global__ void __launch_bounds__(P::kThreads) attention_forward_kernel(const __grid_constant__ AttentionArgs p) {
  using T = typename P::T;
  constexpr int kBlocks = P::kBlocks, kPiece = P::kPiece, kWidth = P::kWidth, kStride = kStep<kWidth>,
                kSlots = P::kSlots;
  constexpr int kValues = P::kValues;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & 31;
  const int pieces = (p.bm + P::kRows - 1) / P::kRows;
  const Line line = locate<false>(p, p.heads, blockIdx.x / pieces);
  const int b = line.b, h = line.h, first = line.line * p.bm + blockIdx.x % pieces * P::kRows;
  const int row_limit = smaller((line.line + 1) * p.bm, p.queries);
  if (first >= row_limit) return;

  T* const query_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const ring = query_tile + P::kRows * kStride;
  const T* const keys = static_cast<const T*>(p.k.data) + b * p.k.stride_b + h / (p.heads / p.key_heads) * p.k.stride_h;
  const T* const values =
      static_cast<const T*>(p.v.data) + b * p.v.stride_b + h / (p.heads / p.key_heads) * p.v.stride_h;
  T* const my_queries = query_tile + 16 * kBlocks * warp * kStride;
  const int my_first = first + 16 * kBlocks * warp;

  Walk<false, kPiece> walk{b, h, h + 1, line.line};  // at the piece after the one in work
  walk.start(p);
  int slot = 0;  // of the next tile to be filled
  // Starts the copy of the keys or values of a piece. A group is closed even where there is none.
  const auto fetch = [&](bool of_values, int begin, int limit, bool any) {
    if (any) {
      const Rows& source = of_values ? p.v : p.k;
      fill<P, kPiece>(ring + slot * P::kTile, of_values ? values : keys, source, begin, limit, p.dim);
    }
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    close_copies();
  };
  // The ring holds kSlots - 1 tiles: the keys of the next piece, and with three slots its values.
  const auto prime = [&] {
    slot = 0;
    fetch(false, walk.begin, walk.limit, !walk.done());
    if constexpr (kSlots == 3) fetch(true, walk.begin, walk.limit, !walk.done());
  };
  // The keys or the values of piece `here`. The tile used before is free now and is filled.
  const auto arrive = [&](bool of_values, int begin, int limit) {
    wait_copies<kSlots - 2>();
    sync_threads();
    const T* tile = ring + (slot + 1 == kSlots ? 0 : slot + 1) * P::kTile;
    if (kSlots == 2 && !of_values) {
      fetch(true, begin, limit, true);
    } else {
      fetch(of_values == (kSlots == 3), walk.begin, walk.limit, !walk.done());
    }
    return tile;
  };
  fill<P, P::kRows>(query_tile, static_cast<const T*>(p.q.data) + b * p.q.stride_b + h * p.q.stride_h, p.q, first,
                    row_limit, p.dim);
  prime();

  float sum[kBlocks][kValues / 8][4] = {}, largest[kBlocks][2], total[kBlocks][2] = {}, reference[kBlocks][2];
  const bool added = P::kGeneral && adds_to_scores(p), tests = P::kGeneral && p.flags != 0,
             prunes = P::kGeneral && (p.flags & kPrune);
  const float to_log2 = added ? 1.f : p.scale * kLog2e;
  Span<false> at{b, h, my_first + lane / 4, 0};
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[m][i] = -kInfinity;
      reference[m][i] = -kInfinity;
      const int row = at.row + 16 * m + 8 * i;
      if (tests && p.reference_lse != nullptr && row < row_limit) {
        reference[m][i] = p.reference_lse[(int64_t{b} * p.heads + h) * p.queries + row] * kLog2e;
      }
    }

  int decided = -1;  // place in the list of the last tile that is known to be kept
  while (!walk.done()) {
    const auto here = walk;
    walk.next(p);
    const T* const key_tile = arrive(false, here.begin, here.limit);
    float scores[kBlocks][kPiece / 8][4] = {};
    scores_of<T, kBlocks, kPiece, kWidth>(scores, my_queries, key_tile);
    at.column = here.begin + fresh(lane) % 4 * 2;
    if (added) add_to_scores<T, false, kBlocks, kPiece>(scores, p, at);
    if (here.is_partial()) apply_pattern<false, kBlocks, kPiece>(scores, p, at, line.line, here.tile);
    if (here.is_edge()) apply_limit<kBlocks, kPiece>(scores, here.limit - at.column);

    bool keeps = false;
    float top[kBlocks][2];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v = -kInfinity;
#pragma unroll
        for (int n = 0; n < kPiece / 8; ++n) v = fmaxf(v, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        top[m][i] = quad_max(v);
      }
    if (tests) {
      const bool enters = here.begin == here.tile * p.bn && decided != here.at;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (enters && p.reference_lse == nullptr) reference[m][i] = largest[m][i] * to_log2;
          const float rise = reference[m][i] == -kInfinity ? kInfinity : top[m][i] * to_log2 - reference[m][i];
          const bool passes = rise > p.skip_threshold || reference[m][i] == -kInfinity;
          keeps = keeps || (at.row + 16 * m + 8 * i < row_limit && top[m][i] > -kInfinity && passes);
        }
      keeps = prunes ? sync_threads_or(keeps) : warp_ballot(keeps) != 0;
      if (keeps && p.keep != nullptr && lane == 0 && (warp == 0 || !prunes)) {
        const int64_t word = ((int64_t{b} * p.heads + h) * p.tile_rows + line.line) * p.keep_words + here.tile / 32;
        or_to_global(p.keep + word, static_cast<int>(1u << here.tile % 32));
      }
      if (prunes && decided != here.at) {
        if (keeps && !enters) {
          // Kept by a later piece, so the earlier ones, passed over till now, count too: back to the first.
          wait_copies<0>();
          sync_threads();
          decided = here.at;
          walk = here;
          walk.enter(p);
          prime();
          continue;
        }
        if (!keeps) {
          arrive(true, here.begin, here.limit);
          continue;
        }
        decided = here.at;
      }
    }

#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float before = largest[m][i];
        largest[m][i] = fmaxf(before, top[m][i]);
        const float shift = largest[m][i] == -kInfinity ? 0.f : largest[m][i] * to_log2;
        const float shrink = exp2_fast(before * to_log2 - shift);
        float part = 0.f;
#pragma unroll
        for (int n = 0; n < kPiece / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = scores[m][n][2 * i + e];
            s = exp2_fast(s * to_log2 - shift);
            part += s;
          }
        total[m][i] = total[m][i] * shrink + part;
#pragma unroll
        for (int n = 0; n < kValues / 8; ++n) {
          sum[m][n][2 * i] *= shrink;
          sum[m][n][2 * i + 1] *= shrink;
        }
      }
    const T* const value_tile = arrive(true, here.begin, here.limit);
    weighted_sum<T, kBlocks, kPiece, kValues, kStride>(sum, scores, value_tile);
  }

  wait_copies<0>();
  sync_threads();  // the queries of a warp are its own, but the copies that brought them are everybody's
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = at.row + 16 * m + 8 * i;
      const float mass = quad_sum(total[m][i]);
      const bool inside = row < row_limit;
      float factor = mass == 0.f ? 0.f : 1.f / mass;
      if (inside && lane % 4 == 0) {
        const float lse = mass == 0.f ? -kInfinity : largest[m][i] * to_log2 * kLn2 + logf(mass);
        p.lse[(int64_t{b} * p.heads + h) * p.queries + row] = lse;
      }
      if (p.out_scale.data != nullptr && inside) {
        const Broadcast& by = p.out_scale;
        factor *= static_cast<const float*>(by.data)[b * by.stride_b + h * by.stride_h + row * by.stride_q];
      }
      const int64_t added_at = b * p.out_add.stride_b + row * p.out_add.stride_s + h * p.out_add.stride_h;
      T* const to = my_queries + (16 * m + 8 * i + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kValues / 8; ++n) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = 8 * n + lane % 4 * 2 + e;
          pair[e] = sum[m][n][2 * i + e] * factor;
          if (p.out_add.data != nullptr && inside && d < p.dim) {
            pair[e] += load_scalar<T>(p.out_add.data, added_at + d, p.out_add.wide);
          }
        }
        *reinterpret_cast<uint32_t*>(to + 8 * n) = pack_pair<T>(pair[0], pair[1]);
      }
    }
  sync_warp();
  const int64_t row_stride = int64_t{p.heads} * p.dim;
  T* const out = static_cast<T*>(p.out) + int64_t{b} * p.queries * row_stride + int64_t{h} * p.dim;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    store_rows<T, kValues, kStride>(out, my_queries + 16 * m * kStride, row_stride, my_first + 16 * m, row_limit,
                                    p.dim);
  }
}

}  // namespace maskaccel::cuda
