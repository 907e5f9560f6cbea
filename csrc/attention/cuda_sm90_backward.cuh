// Backward of tile_attention on sm_90a: wgmma, TMA, one CTA for kRows keys of a key head, all gradients in one walk.
//
// A CTA walks the queries that see its keys, of one query head of the key head after the other, in blocks of kRows,
// each in kParts steps of kStep queries. Group 0's first thread, the producer, loads them; groups 1 and 2, the
// consumers, own 64 keys each. With s and dP turned around, keys along rows, they come out of the products laid out as
// their next factor:
//   s^T = k q^T,  P^T = exp(s^T - lse),  dP^T = v dout^T,  dS^T = P^T (dP^T - delta),  dv += P^T dout,  dk += dS^T q.
// For dq = dS k both consumers write dS^T to shared memory; of the block's queries each then takes half. As other CTAs
// own other keys, dq is summed in memory, by atomic additions: two runs do not give the same bits. Where that is asked
// for, the kernels of sm_80 serve.
//
// Barriers (mbarrier; a pass is one completed phase):
//
//   barrier         arrives                                                     waits            passes
//   keys            producer, + bytes of K and V                                both consumers   one
//   query_full[s]   producer, after the card, + bytes of q and lse              both consumers   one a step in stage s
//   dout_full[s]    producer, + bytes of dout and delta                         both consumers   the same
//   empty[s]        each consumer warp, after the step's products               producer         the same
//
// * Counts, phases and the empty first round are as in cuda_sm90.cuh. The last pass of query_full carries a card that
//   is of no block, and no bytes.
// * Products of a warp group finish in order, so a consumer waits for all but the latest of them. Narrow heads leave
//   registers to start the scores and dP of both steps of a block at once (kAhead). Otherwise a step starts its scores
//   before the products of the step before it are waited for.
// * No deadlock. The producer loads q(0), dout(0), q(1), ... A consumer lets go of step n with loads up to those of step
//   n + 1, at the end of a block without them: with two stages or more, loading step n + 2 needs no more.
// * dS^T has two buffers, used by blocks in turn, and a named barrier of both consumers passes once a block between
//   writing and reading. A consumer that has passed it in block n has finished its dq of block n - 1, and so has the
//   other one: the buffer of n - 1 is free for n + 1. The fence before it makes what was written visible to wgmma.
// * Registers at most: dk, dv, two score tiles for each step ahead and weights; or dk, dv, dq and slopes.
#pragma once

#include "cuda_sm90_backward_products.cuh"
#include "cuda_sm90_ring.cuh"
#include "cuda_tiles.cuh"

namespace maskaccel::cuda::sm90 {

/// Of each query: lse in log2 units, +inf where a row keeps nothing and past the last, and delta. (B, H, padded) each.
struct BackwardParams {
  TensorMap q, k, v, dout;
  AttentionArgs a;  // with the kernel's own tiles where there is no mask
  const float *lse, *delta;
  float* dq;   // sums: see `query_sums`
  int padded;  // a multiple of kRows
};

/// Where the sums of a thread for 64 queries lie: those of elements [4 i, 4 i + 4) at [kGroup * 4 * i]. So a warp adds
/// to 512 bytes side by side; a kernel puts them in order in the end.
template <typename S>
__host__ __device__ __forceinline__ int64_t query_sums(int64_t batch_head, int padded, int query, int thread) {
  return (batch_head * padded + query) * S::kDim + thread * 4;
}

/// One block of queries, for the consumers.
struct alignas(16) QueryCard {
  int head, begin, tile;  // query head, first query, tile of the mask
  enum Kind : int { kFull, kPartial, kEnd };
  int kind;
};

template <typename S>
struct alignas(1024) BackwardStorage {
  using T = typename S::T;
  struct alignas(1024) Step {
    T q[S::kStep * S::kDim], dout[S::kStep * S::kDim];
  };
  T k[kRows * S::kDim], v[kRows * S::kDim];
  T slopes[2][kRows * kRows];
  Step steps[S::kStages];
  float lse[S::kStages][S::kStep], delta[S::kStages][S::kStep];
  QueryCard cards[S::kStages];
  Barrier keys, query_full[S::kStages], dout_full[S::kStages], empty[S::kStages];

  /// By one thread, before all others use any of them.
  __device__ __forceinline__ void start_barriers() {
    keys.init(1);
    for (int s = 0; s < S::kStages; ++s) {
      query_full[s].init(1);
      dout_full[s].init(1);
      empty[s].init(kConsumerWarps);
    }
    publish_barriers();
  }
};

/// The thread that loads, for the CTA of keys from `first` on.
template <typename S>
__device__ __forceinline__ void produce(const BackwardParams& p, BackwardStorage<S>& shared, const Line& line,
                                        int first) {
  constexpr auto load_keys = load<kRows, S::kSlab, S::kDim, typename S::T>;
  constexpr auto load_queries = load<S::kStep, S::kSlab, S::kDim, typename S::T>;
  const int group = p.a.heads / p.a.key_heads;
  shared.keys.arrive_and_expect_tx(2 * S::kBytesK);
  load_keys(p.k, shared.keys, true, shared.k, first, line.h, line.b);
  load_keys(p.v, shared.keys, true, shared.v, first, line.h, line.b);

  Ring<S::kStages> ring;
  cuda::Walk<true, kRows> walk{line.b, line.h * group, line.h * group + group, line.line};
  for (walk.start(p.a); !walk.done(); walk.next(p.a)) {
    const int64_t terms = (int64_t{line.b} * p.a.heads + walk.h) * p.padded + walk.begin;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      const int query = walk.begin + part * S::kStep, stage = ring.stage;
      Barrier &query_full = shared.query_full[stage], &dout_full = shared.dout_full[stage];
      shared.empty[stage].wait(ring.parity ^ 1);
      put(shared.cards[stage],
          QueryCard{walk.h, walk.begin, walk.tile, walk.is_partial() ? QueryCard::kPartial : QueryCard::kFull});
      query_full.arrive_and_expect_tx(S::kBytesQ + S::kBytesTerm);
      load_queries(p.q, query_full, false, shared.steps[stage].q, query, walk.h, line.b);
      load_plain(p.lse + terms + part * S::kStep, query_full, shared.lse[stage], S::kBytesTerm);
      dout_full.arrive_and_expect_tx(S::kBytesQ + S::kBytesTerm);
      load_queries(p.dout, dout_full, false, shared.steps[stage].dout, query, walk.h, line.b);
      load_plain(p.delta + terms + part * S::kStep, dout_full, shared.delta[stage], S::kBytesTerm);
      ring.advance();
    }
  }
  shared.empty[ring.stage].wait(ring.parity ^ 1);
  put(shared.cards[ring.stage], QueryCard{0, 0, 0, QueryCard::kEnd});
  shared.query_full[ring.stage].arrive();
}

}  // namespace maskaccel::cuda::sm90
