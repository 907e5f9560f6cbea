// Forward of tile_attention on sm_90a: wgmma, TMA, one persistent CTA for each multiprocessor.
//
// A CTA has three warp groups. Group 0 gives its registers away; one of its threads, the producer, decides what comes
// next and loads it: the queries of an item, then keys and values of one block after the other into rings of kStages
// stages. Groups 1 and 2, the consumers, own 64 of the 128 query rows each: scores, softmax and result stay in their
// registers. They read what an item or a block is from cards in shared memory, so that the latency of the lists is the
// producer's, which runs ahead.
//
// Barriers (mbarrier; a pass is one completed phase):
//
//   barrier         arrives                                              waits             passes
//   query.full      producer, after the item's card, + bytes of Q        both consumers    one an item, one for the end
//   query.empty     each consumer warp, after the item's last scores     producer          one an item
//   key.full[s]     producer, after the block's card, + bytes of K       both consumers    one a block in stage s
//   key.empty[s]    each consumer warp, after the block's scores         producer          the same
//   value.full[s], value.empty[s]: as for keys; empty after the product with the values
//
// * Counts. A full barrier expects one arrival and the bytes of its loads (none for an item without blocks), an empty
//   one eight arrivals: one lane of each consumer warp, after the warp has waited for the wgmma that reads the buffer
//   and __syncwarp has put its reads of the card before. wgmma reads and TMA writes are of one proxy: no fence needed.
// * Phases. All sides count blocks alike, over all items: block n is in stage n % kStages, and its passes there have
//   parity n / kStages % 2. A consumer waits for that parity. The producer waits for the pass before it, of the other
//   parity; a barrier that never passed answers to parity 1 at once, so the first round does not wait. Items: as one
//   stage.
// * An item without blocks has a card and both its passes, and neither loads nor blocks.
// * No deadlock. The producer's order is K(0), Q, then K(n+1) before V(n), then the next item's K(0). The consumer's is
//   K(0), then for each n: scores(n), K(n+1) awaited, V(n-1) released. To load K(n+1) the producer needs the stage that
//   K(n+1-kStages) left, and before it V(n-1) that of V(n-1-kStages): with two stages or more both consumers have left
//   them, or get there without K(n+1). Q of the next item needs the last scores of this one, and they nothing after it.
// * A pruned block has its values loaded, waited for and released, but not multiplied.
// * Named barriers. turn[g]: the consumers start their products in turns, so that the softmax of one runs beside the
//   products of the other. Each waits for its turn and passes it on once a block, so arrivals pair up over all items;
//   group 1 passes once in advance, for group 0 to begin. vote: joins both once a block when pruning.
// * Shared memory is not used for the result: it goes from registers to memory in 16-byte pieces, so Q of the next item
//   is loaded meanwhile.
#pragma once

#include "cuda_schedule.h"
#include "cuda_sm90_products.cuh"
#include "cuda_sm90_ring.cuh"

namespace maskaccel::cuda::sm90 {

struct Params {
  TensorMap q, k, v;
  AttentionArgs a;
  Schedule schedule;
  float scale_log2;  // scores are kept unscaled; exponentials are powers of two
  int bm, bn;        // of the mask, or the kernel's own without one
};

/// One query tile, for the consumers.
struct alignas(16) ItemCard {
  enum Kind : int { kBlocks, kNoBlocks, kEnd };
  int kind, batch, head, tile_row, sub;
};

/// One block of keys, for the consumers.
struct alignas(16) BlockCard {
  int begin, tile;  // first key, tile of the mask
  int partial, last;
};

template <typename S>
struct alignas(1024) Storage {
  typename S::T q[kRows * S::kWide];
  typename S::T k[S::kStages][S::kKeys * S::kWide];
  typename S::T v[S::kStages][S::kKeys * S::kDim];
  ItemCard item;
  BlockCard blocks[S::kStages];
  Barrier query_full, query_empty;
  Barrier key_full[S::kStages], key_empty[S::kStages], value_full[S::kStages], value_empty[S::kStages];

  /// By one thread, before all others use any of them.
  __device__ __forceinline__ void start_barriers() {
    query_full.init(1);
    query_empty.init(kConsumerWarps);
    for (int s = 0; s < S::kStages; ++s) {
      key_full[s].init(1);
      value_full[s].init(1);
      key_empty[s].init(kConsumerWarps);
      value_empty[s].init(kConsumerWarps);
    }
    publish_barriers();
  }
};

/// The thread that loads.
template <typename S>
struct Producer {
  const Params& p;
  Storage<S>& shared;
  Ring<S::kStages> keys, values;
  uint32_t parity = 0;  // of the present item
  Item item;
  int key_head;

  __device__ __forceinline__ Walk walk() const {
    const TileLists& lists = p.a.lists;
    if (lists.index == nullptr) return Walk(nullptr, 0, (p.a.keys + p.bn - 1) / p.bn, p.bn, S::kKeys, p.a.keys);
    const int* const count = lists.count + int64_t{2} * item.line;
    const int partial = read(count), full = read(count + 1);
    return Walk(lists.index + item.line * lists.width, partial, partial + full, p.bn, S::kKeys, p.a.keys);
  }
  __device__ __forceinline__ void load_keys(const Walk& walk) {
    Barrier& full = shared.key_full[keys.stage];
    shared.key_empty[keys.stage].wait(keys.parity ^ 1);
    put(shared.blocks[keys.stage], BlockCard{walk.begin, walk.tile, walk.is_partial(), walk.last()});
    full.arrive_and_expect_tx(S::kBytesK);
    load<S::kKeys, S::kSlab, S::kWide>(p.k, full, false, shared.k[keys.stage], walk.begin, key_head, item.batch);
    keys.advance();
  }
  __device__ __forceinline__ void load_values(int first) {
    Barrier& full = shared.value_full[values.stage];
    shared.value_empty[values.stage].wait(values.parity ^ 1);
    full.arrive_and_expect_tx(S::kBytesV);
    load<S::kKeys, S::kSlabV, S::kDim>(p.v, full, false, shared.v[values.stage], first, key_head, item.batch);
    values.advance();
  }
  __device__ __forceinline__ void present(ItemCard::Kind kind) {
    shared.query_empty.wait(parity ^ 1);
    put(shared.item, ItemCard{kind, item.batch, item.head, item.tile_row, item.sub});
    parity ^= 1;
    if (kind != ItemCard::kBlocks) return shared.query_full.arrive();
    shared.query_full.arrive_and_expect_tx(S::kBytesQ);
    load<kRows, S::kSlab, S::kWide>(p.q, shared.query_full, true, shared.q, item.tile_row * p.bm + item.sub * kRows,
                                    item.head, item.batch);
  }
  /// The place after this one. Every CTA claims once in vain: the claims number as many as the items, and whoever makes
  /// the last of them leaves the counter as it was found.
  __device__ __forceinline__ int next(int place, int total) const {
    const int ctas = gridDim.x;
    if (p.a.counter == nullptr) return place + ctas;
    const int claim = count_up(p.a.counter);
    if (claim == total - 1) *p.a.counter = 0;
    return ctas + claim;
  }
  __device__ __forceinline__ void run() {
    const int total = static_cast<int>(p.schedule.items());
    int place = blockIdx.x;
    for (; place < total; place = next(place, total)) {
      item = p.schedule.item(place);
      if (item.tile_row * p.bm + item.sub * kRows >= p.a.queries) continue;
      key_head = item.head / (p.a.heads / p.a.key_heads);
      Walk blocks = walk();
      if (!blocks.next()) {
        present(ItemCard::kNoBlocks);
        continue;
      }
      load_keys(blocks);
      present(ItemCard::kBlocks);
      for (bool more = true; more;) {
        const int first = blocks.begin;
        more = blocks.next();
        if (more) load_keys(blocks);
        load_values(first);
      }
    }
    present(ItemCard::kEnd);
  }
};

}  // namespace maskaccel::cuda::sm90
