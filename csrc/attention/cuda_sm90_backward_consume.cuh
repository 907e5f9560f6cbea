// The consumer warp groups of the backward on sm_90a, and the kernel. See cuda_sm90_backward.cuh.
#pragma once

#include "cuda_sm90_backward.cuh"

namespace maskaccel::cuda::sm90 {

constexpr int kSlopesWritten = 1;  // named barrier of both consumers

/// Clears the weights of pairs that are not kept. `tile` is of the score matrix turned around: element i is of key
/// `key` + 8 (i / 2 % 2) and query `query` + i / 4 * 8 + i % 2, both counted within the mask tile; `pattern` -1 for a
/// full one.
template <int kSize>
__device__ __forceinline__ void clear_skipped(float (&tile)[kSize], const AttentionArgs& a, int pattern, int key,
                                              int query) {
  const int across = a.bn / 32;  // both keys lie in one word
  const int* from = a.patterns + (int64_t{pattern} * a.bm + query) * across + key / 32;
#pragma unroll
  for (int n = 0; n < kSize / 4; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t bits = static_cast<uint32_t>(read(from + int64_t{8 * n + e} * across)) >> key % 32;
      if ((bits & 1u) == 0) tile[4 * n + e] = 0.f;
      if ((bits & 256u) == 0) tile[4 * n + 2 + e] = 0.f;
    }
  }
}

/// A consumer of the CTA of keys from `first` on.
template <typename S>
__device__ __forceinline__ void consume(const BackwardParams& p, BackwardStorage<S>& shared, const Line& line,
                                        int first, int group) {
  using T = typename S::T;
  const AttentionArgs& a = p.a;
  const int thread = threadIdx.x % kGroup, row = group * 64 + thread / kWarp * 16;  // first of the warp's keys
  const int key = first + row + thread % kWarp / 4, column = thread % 4 * 2;
  const float scale_log2 = a.scale * kLog2e;
  float dk[S::kOut], dv[S::kOut];
#pragma unroll
  for (int i = 0; i < S::kOut; ++i) dk[i] = dv[i] = 0.f;
  alignas(4) T weights[S::kAhead][S::kScores], slopes[S::kAhead][S::kScores];
  Ring<S::kStages> loaded, used;
  const auto release = [&] {
    arrive(shared.empty[used.stage]);
    used.advance();
  };

  shared.keys.wait(0);
  for (int buffer = 0;; buffer ^= 1) {
    // Of the steps begun. New in each block: older values must not live on in registers.
    float scores[S::kAhead][S::kScores], rises[S::kAhead][S::kScores];
    int stages[S::kAhead];
    const auto begin = [&](int part) {
      const int at = part % S::kAhead, stage = stages[at] = loaded.stage;
      if (part > 0) shared.query_full[stage].wait(loaded.parity);
      start_turned_scores<S>(shared.k, shared.steps[stage].q, group, scores[at]);
      if (S::kAhead == 1 && part > 0) {
        finish<1>(dk);
        pin(dv);
        release();
      }
      shared.dout_full[stage].wait(loaded.parity);
      start_turned_scores<S>(shared.v, shared.steps[stage].dout, group, rises[at]);
      loaded.advance();
    };

    shared.query_full[loaded.stage].wait(loaded.parity);
    const QueryCard card = get(shared.cards[loaded.stage]);
    if (card.kind == QueryCard::kEnd) break;
    int pattern = -1;
    if (card.kind == QueryCard::kPartial && a.pattern_of != nullptr) {
      pattern = read(a.pattern_of + line.b * a.pattern_stride_b + card.head * a.pattern_stride_h +
                     int64_t{card.tile} * a.tile_columns + line.line);
    }
#pragma unroll
    for (int part = 0; part < S::kAhead; ++part) begin(part);
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      constexpr int kOpen = 2 * S::kAhead - 1;  // products that may run on
      const int at = part % S::kAhead;
      if (part >= S::kAhead) begin(part);
      const int stage = stages[at];
      const auto& step = shared.steps[stage];
      auto &values = scores[at], &dp = rises[at];  // s, then P, then dS
      finish<kOpen>(values);
#pragma unroll
      for (int n = 0; n < S::kScores / 4; ++n) {
        const float2 lse = get(*reinterpret_cast<const float2*>(shared.lse[stage] + column + 8 * n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[4 * n + i] = exp2_of(values[4 * n + i] * scale_log2 - (i % 2 ? lse.y : lse.x));
        }
      }
      if (pattern >= 0) {
        clear_skipped(values, a, pattern, key - line.line * a.bn,
                      card.begin - card.tile * a.bm + part * S::kStep + column);
      }
      if (first + kRows > a.keys) {
#pragma unroll
        for (int i = 0; i < S::kScores; ++i) {
          if (key + i / 2 % 2 * 8 >= a.keys) values[i] = 0.f;
        }
      }
      round_all(values, weights[at]);
      start_sum<S>(weights[at], step.dout, dv);
      finish<kOpen>(dp);
#pragma unroll
      for (int n = 0; n < S::kScores / 4; ++n) {
        const float2 delta = get(*reinterpret_cast<const float2*>(shared.delta[stage] + column + 8 * n));
#pragma unroll
        for (int i = 0; i < 4; ++i) values[4 * n + i] *= dp[4 * n + i] - (i % 2 ? delta.y : delta.x);
      }
      round_all(values, slopes[at]);
      store_slopes<S>(slopes[at], shared.slopes[buffer] + part * S::kStep * kRows, row);
      if (part + 1 < S::kParts) {
        start_sum<S>(slopes[at], step.q, dk);
      } else {
        publish_to_products();
        named_wait(kSlopesWritten);
        finish<0>(dv);  // its factors would not fit beside dq
        if (S::kAhead > 1) release();
        float dq[S::kOut];
        start_queries<S>(shared.slopes[buffer] + group * 64 * kRows, shared.k, dq);
        start_sum<S>(slopes[at], step.q, dk);
        finish<1>(dq);
        const int64_t batch_head = int64_t{line.b} * a.heads + card.head;
        float* const to = p.dq + query_sums<S>(batch_head, p.padded, card.begin + group * 64, thread);
#pragma unroll
        for (int i = 0; i < S::kOut; i += 4) add_to_global(to + i * kGroup, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
        finish<0>(dk);
        release();
      }
    }
  }
#pragma unroll
  for (int i = 0; i < S::kOut; ++i) dk[i] *= a.scale;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool inside = key + 8 * r < a.keys;
    const int64_t at = ((int64_t{line.b} * a.keys + key + 8 * r) * a.key_heads + line.h) * a.dim;
    write_row(dk, r, inside, static_cast<T*>(a.dk) + at, a.dim);
    write_row(dv, r, inside, static_cast<T*>(a.dv) + at, a.dim);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1) sm90_backward_kernel(const __grid_constant__ BackwardParams p) {
#if defined(MASKACCEL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = storage<BackwardStorage<S>>();
  const int pieces = p.a.bn / kRows;
  const Line line = locate<true>(p.a, p.a.key_heads, blockIdx.x / pieces);
  const int first = line.line * p.a.bn + blockIdx.x % pieces * kRows;
  if (first >= p.a.keys) return;
  if (threadIdx.x == 0) shared.start_barriers();
  sync_threads();
  const int group = warp_group();
  if (group == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) produce<S>(p, shared, line, first);
  } else {
    take_registers<240>();
    consume<S>(p, shared, line, first, group - 1);
  }
#endif
}

}  // namespace maskaccel::cuda::sm90
