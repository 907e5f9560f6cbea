// The consumer warp groups of the attention on sm_90a, and the kernel. See cuda_sm90.cuh.
#pragma once

#include "cuda_sm90_rows.cuh"

namespace maskaccel::cuda::sm90 {

/// Starts kSteps products of 16 deep; `fresh`: into a cleared accumulator.
template <int kSteps, typename Mma, typename A, typename B, typename C>
__device__ __forceinline__ void start(Mma mma, const A& a, const B& b, C& c, bool fresh) {
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  mma.accumulate_ = fresh ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

/// Waits until at most kPending of the products started are unfinished; `c` is that of the last one finished.
template <int kPending, typename C>
__device__ __forceinline__ void finish(C& c) {
  cute::warpgroup_wait<kPending>();
  cute::warpgroup_fence_operand(c);
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) barrier.arrive();
}

/// A consumer. kKeepBits: with keep bits, and pruning where the flags ask for it.
template <typename S, bool kKeepBits>
__device__ __forceinline__ void consume(const Params& p, Storage<S>& shared, int group) {
  using namespace cute;
  using T = typename S::T;
  constexpr int kKeys = S::kKeys, kSteps = S::kDim / 16;
  constexpr bool kTurns = kKeys == 128;  // with short blocks, waiting costs more than it gains
  typename S::Scores mma_scores;
  typename S::Values mma_values;
  const Tensor query = local_tile(make_tensor(make_smem_ptr(shared.q), typename S::LayoutQ{}), Shape<_64, Int<S::kWide>>{},
                                  make_coord(group, _0{}));
  Tensor q = mma_scores.get_slice(0).partition_fragment_A(query);
  const Tensor k = mma_scores.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(shared.k[0]), typename S::LayoutK{}));
  const Tensor v = mma_values.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(shared.v[0]), typename S::LayoutV{}));
  Tensor out = partition_fragment_C(mma_values, Shape<_64, Int<S::kDim>>{});
  Tensor weights = mma_values.get_slice(0).partition_fragment_A(make_tensor<T>(Shape<_64, Int<kKeys>>{}));

  const int thread = threadIdx.x % kGroup, row_of_group = group * 64 + thread / kWarp * 16 + thread % kWarp / 4;
  Ring<S::kStages> keys, values;
  if (kTurns && group == 1) named_arrive(kTurn);

  for (uint32_t parity = 0;; parity ^= 1) {
    shared.query_full.wait(parity);
    const ItemCard item = shared.item;
    if (item.kind == ItemCard::kEnd) break;
    const int row_of_tile = item.sub * kRows + row_of_group, first = item.tile_row * p.bm + row_of_tile;
    Softmax softmax;
    KeepTest test;
    if constexpr (kKeepBits) test.read(p, item, first);
    BlockCard block;
    float shrink[2];
    bool weighted = true;  // whether the weights of the block before are to be multiplied: it was not pruned
    clear(out);

    // Of the block whose keys have arrived: its card, and the id of its pattern, -1 for a full tile.
    const auto next_pattern = [&] {
      block = shared.blocks[keys.stage];
      if (p.a.pattern_of == nullptr || !block.partial) return -1;
      return __ldg(p.a.pattern_of + item.batch * p.a.pattern_stride_b + item.head * p.a.pattern_stride_h +
                   int64_t{item.tile_row} * p.a.tile_columns + block.tile);
    };
    const auto start_scores = [&](auto& scores) {
      asm volatile("" : "+r"(q.data().desc_.reg32_[0]));  // else the descriptors of all steps live in registers
      if (kTurns) named_wait(kTurn + group);
      start<kSteps>(mma_scores, q, k(_, _, _, keys.stage), scores, true);
    };
    const auto start_values = [&] {
      shared.value_full[values.stage].wait(values.parity);
      start<kKeys / 16>(mma_values, weights, v(_, _, _, values.stage), out, false);
    };
    const auto pass_turn = [&] {
      if (kTurns) named_arrive(kTurn + 1 - group);
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
    // From scores to weights, still fp32. Waits for the next keys at its end: what follows waits for the product with the
    // values, and ptxas moves that wait in front of the exponentials unless they lie in another basic block.
    const auto soften = [&](auto& scores, int pattern) {
      if (pattern >= 0 || block.begin + kKeys > p.a.keys) KeptBits<kKeys>(p, block, pattern, row_of_tile).apply(scores);
      float tile[2];
      Softmax::largest(scores, tile);
      if constexpr (kKeepBits) weighted = test.keeps(p, tile, softmax.most, block.tile, group * kGroup + thread);
      if (!kKeepBits || weighted) softmax.update(scores, tile, p.scale_log2, shrink);
      warpgroup_fence_operand(scores);
      if (!block.last) shared.key_full[keys.stage].wait(keys.parity);
    };
    const auto round = [&](const auto& scores) {
      constexpr int kSize = decltype(size(scores))::value;
      cutlass::NumericArrayConverter<T, float, kSize> convert;
      *reinterpret_cast<cutlass::Array<T, kSize>*>(weights.data()) =
          convert(*reinterpret_cast<const cutlass::Array<float, kSize>*>(scores.data()));
    };
    const auto shrink_out = [&] {
#pragma unroll
      for (int i = 0; i < size(out); ++i) out(i) *= shrink[i / 2 % 2];
    };

    if (item.kind == ItemCard::kNoBlocks) {
      arrive(shared.query_empty);
    } else {
      {
        shared.key_full[keys.stage].wait(keys.parity);
        const int pattern = next_pattern();
        Tensor scores = partition_fragment_C(mma_scores, Shape<_64, Int<kKeys>>{});
        start_scores(scores);
        pass_turn();
        finish<0>(scores);
        release_keys();
        soften(scores, pattern);
        round(scores);
      }
      while (!block.last) {
        const int pattern = next_pattern();
        Tensor scores = partition_fragment_C(mma_scores, Shape<_64, Int<kKeys>>{});
        if (!kKeepBits || weighted) {
          start_scores(scores);
          start_values();
          pass_turn();
          finish<1>(scores);
          release_keys();
          soften(scores, pattern);
          finish<0>(out);
          release_values();
          if (!kKeepBits || weighted) {
            round(scores);
            shrink_out();
          }
        } else {
          shared.value_full[values.stage].wait(values.parity);
          release_values();
          start_scores(scores);
          pass_turn();
          finish<0>(scores);
          release_keys();
          soften(scores, pattern);
          if (weighted) {
            round(scores);
            shrink_out();
          }
        }
      }
      if (!kKeepBits || weighted) {
        start_values();
        finish<0>(out);
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
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint32_t base = cute::cast_smem_ptr_to_uint(dynamic_shared());
  auto& shared = *reinterpret_cast<Storage<S>*>(reinterpret_cast<char*>(dynamic_shared()) + (1024 - base % 1024) % 1024);
  if (threadIdx.x == 0) shared.start_barriers();
  __syncthreads();
  const int group = cutlass::canonical_warp_group_idx();
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 0) Producer<S>{p, shared}.run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    consume<S, kKeepBits>(p, shared, group - 1);
  }
#endif
}

}  // namespace maskaccel::cuda::sm90
