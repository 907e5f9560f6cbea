// The consumer warp groups of the attention on sm_90a, and the kernel. See cuda_sm90.cuh.
#pragma once

#include "cuda_sm90_rows.cuh"

namespace maskaccel::cuda::sm90 {

/// A consumer. kKeepBits: with keep bits, and pruning where the flags ask for it.
template <typename S, bool kKeepBits>
__device__ __forceinline__ void consume(const Params& p, Storage<S>& shared, int group) {
  constexpr int kKeys = S::kKeys;
  // With short blocks, waiting costs more than it gains.
  constexpr bool kTurns = kTuning.turns < 0 ? kKeys >= 128 : kTuning.turns != 0;
  float out[S::kOut];
  alignas(4) typename S::T weights[S::kScores];
  const int thread = threadIdx.x % kGroup, row_of_group = group * 64 + fragment_row(thread, 0);
  Ring<S::kStages> keys, values;
  if (kTurns && group == kConsumers - 1) named_arrive(kTurn);

  for (uint32_t parity = 0;; parity ^= 1) {
    shared.query_full.wait(parity);
    const ItemCard item = get(shared.item);
    if (item.kind == ItemCard::kEnd) break;
    const int row_of_tile = item.sub * kRows + row_of_group, first = item.tile_row * p.bm + row_of_tile;
    Softmax softmax;
    KeepTest test;
    if constexpr (kKeepBits) test.read(p, item, first);
    BlockCard block;
    float shrink[2];
    bool weighted = true;  // whether the weights of the block before are to be multiplied: it was not pruned
#pragma unroll
    for (float& o : out) o = 0.f;

    // Of the block whose keys have arrived: its card, and the id of its pattern, -1 for a full tile.
    const auto next_pattern = [&] {
      block = get(shared.blocks[keys.stage]);
      if (p.a.pattern_of == nullptr || !block.partial) return -1;
      return read(p.a.pattern_of + item.batch * p.a.pattern_stride_b + item.head * p.a.pattern_stride_h +
                  int64_t{item.tile_row} * p.a.tile_columns + block.tile);
    };
    const auto begin_scores = [&](auto& scores) {
      if (kTurns) named_wait(kTurn + group);
      start_scores<S>(shared.q, shared.k[keys.stage], group, scores);
    };
    const auto begin_values = [&] {
      shared.value_full[values.stage].wait(values.parity);
      start_values<S>(weights, shared.v[values.stage], out);
    };
    const auto pass_turn = [&] {
      if (kTurns) named_arrive(kTurn + (group + 1) % kConsumers);
    };
    const auto release_keys = [&] {
      arrive(shared.key_empty[keys.stage]);
      if (block.last) arrive(shared.query_empty);
      keys.advance();
    };
    const auto release_values = [&] {
      arrive(shared.value_empty[values.stage]);
      values.advance();
    };
    // From scores to weights, still fp32. Waits for the next keys at its end: what follows waits for the product with
    // the values, and ptxas moves that wait in front of the exponentials unless they lie in another basic block.
    const auto soften = [&](auto& scores, int pattern) {
      if (pattern >= 0 || block.begin + kKeys > p.a.keys) KeptBits<kKeys>(p, block, pattern, row_of_tile).apply(scores);
      float tile[2];
      Softmax::largest(scores, tile);
      if constexpr (kKeepBits) weighted = test.keeps(p, tile, softmax.most, block.tile, group * kGroup + thread);
      if (!kKeepBits || weighted) softmax.update(scores, tile, p.scale_log2, shrink);
      pin(scores);
      if (!block.last) shared.key_full[keys.stage].wait(keys.parity);
    };
    const auto shrink_out = [&] {
#pragma unroll
      for (int i = 0; i < S::kOut; ++i) out[i] *= shrink[i / 2 % 2];
    };

    if (item.kind == ItemCard::kNoBlocks) {
      arrive(shared.query_empty);
    } else {
      {
        shared.key_full[keys.stage].wait(keys.parity);
        const int pattern = next_pattern();
        float scores[S::kScores];
        begin_scores(scores);
        pass_turn();
        finish<0>(scores);
        release_keys();
        soften(scores, pattern);
        round_all(scores, weights);
      }
      while (!block.last) {
        const int pattern = next_pattern();
        float scores[S::kScores];
        if (!kKeepBits || weighted) {
          begin_scores(scores);
          begin_values();
          pass_turn();
          finish<1>(scores);
          release_keys();
          soften(scores, pattern);
          finish<0>(out);
          pin(weights);
          release_values();
          if (!kKeepBits || weighted) {
            round_all(scores, weights);
            shrink_out();
          }
        } else {
          shared.value_full[values.stage].wait(values.parity);
          release_values();
          begin_scores(scores);
          pass_turn();
          finish<0>(scores);
          release_keys();
          soften(scores, pattern);
          if (weighted) {
            round_all(scores, weights);
            shrink_out();
          }
        }
      }
      if (!kKeepBits || weighted) {
        begin_values();
        finish<0>(out);
        pin(weights);
      } else {
        shared.value_full[values.stage].wait(values.parity);
      }
      release_values();
    }
    write<S>(p, item, first, out, softmax);
  }
}

template <typename S, bool kKeepBits>
__global__ void __launch_bounds__(kThreads, 1) sm90_forward_kernel(const __grid_constant__ Params p) {
#if defined(MASKACCEL_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = storage<Storage<S>>();
  if (threadIdx.x == 0) {
    prefetch(p.q), prefetch(p.k), prefetch(p.v);
    shared.start_barriers();
  }
  sync_threads();
  const int group = warp_group();
  if (group == 0) {
    give_registers<kConsumers == 2 ? 40 : 32>();
    if (threadIdx.x == 0) Producer<S>{p, shared}.run();
  } else {
    take_registers<kConsumers == 2 ? 232 : 160>();
    consume<S, kKeepBits>(p, shared, group - 1);
  }
#endif
}

}  // namespace maskaccel::cuda::sm90
