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
//   key.full[s]     producer, after the block's card, + bytes of K       both consumers    one for each block in stage s
//   key.empty[s]    each consumer warp, after the block's scores         producer          the same
//   value.full[s], value.empty[s]: as for keys; empty after the product with the values
//
// * Counts. A full barrier expects one arrival and the bytes of its loads (none for an item without blocks), an empty one
//   eight arrivals: one lane of each consumer warp, after the warp has waited for the wgmma that reads the buffer and
//   __syncwarp has put its reads of the card before. wgmma reads and TMA writes are of one proxy: no fence between them.
// * Phases. All sides count blocks alike, over all items: block n is in stage n % kStages, and its passes there have
//   parity n / kStages % 2. A consumer waits for that parity. The producer waits for the pass before it, of the other
//   parity; a barrier that never passed answers to parity 1 at once, so the first round does not wait. Items: as one stage.
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

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "cuda_args.h"
#include "cuda_schedule.h"

namespace maskaccel::cuda::sm90 {

constexpr int kRows = 128;     // of a query tile
constexpr int kGroup = 128;    // threads of a warp group
constexpr int kThreads = 384;  // producer, two consumers
constexpr int kConsumerWarps = 8;

struct Params {
  CUtensorMap q, k, v;
  AttentionArgs a;
  Schedule schedule;
  float scale_log2;  // scores are kept unscaled; exponentials are powers of two
  int bm, bn;        // of the mask, or the kernel's own without one
};

/// Whether TMA writes rows of `kColumns` elements where wgmma reads them: in slabs of kSlab columns, one after the other,
/// each of `kRowsOfSlab` dense rows. `place(row, column)` is the offset in elements, before the swizzle.
template <int kRowsOfSlab, int kSlab, int kColumns, typename Place>
constexpr bool in_slabs(Place place) {
  for (int row : {0, 1, 7, 8, kRowsOfSlab / 2 + 3, kRowsOfSlab - 1}) {
    for (int column = 0; column < kColumns; column += 8) {
      if (place(row, column) != column / kSlab * kSlab * kRowsOfSlab + row * kSlab + column % kSlab) return false;
    }
  }
  return true;
}

/// Shapes and layouts for heads of up to kDim elements. TMA fills what a head does not have with zeros.
///
/// Q and K lie in slabs of 64 columns with the 128-byte swizzle. V is read across its rows, and its slabs have the widest
/// swizzle that divides kDim: wgmma documents only whole swizzle atoms in that direction, so heads of 72 take 80 columns.
template <typename T_, int kDim_>
struct Shapes {
  using T = T_;
  static constexpr int kDim = kDim_, kWide = (kDim + 63) / 64 * 64;
  static constexpr int kKeys = kDim > 128 ? 64 : 128;  // of a block
  static constexpr int kStages = kDim > 128 ? 2 : kDim > 64 ? 3 : 4;
  static constexpr int kSlab = 64, kSlabV = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;

  template <int... kSizes>
  using Sizes = cute::Shape<cute::Int<kSizes>...>;
  using AtomK = cute::GMMA::Layout_K_SW128_Atom<T>;
  using AtomV = std::conditional_t<
      kSlabV == 64, cute::GMMA::Layout_MN_SW128_Atom<T>,
      std::conditional_t<kSlabV == 32, cute::GMMA::Layout_MN_SW64_Atom<T>, cute::GMMA::Layout_MN_SW32_Atom<T>>>;
  using LayoutQ = decltype(cute::tile_to_shape(AtomK{}, Sizes<kRows, kWide>{}));
  using LayoutK = decltype(cute::tile_to_shape(AtomK{}, Sizes<kKeys, kWide, kStages>{}));
  using LayoutV = decltype(cute::tile_to_shape(AtomV{}, Sizes<kDim, kKeys, kStages>{},
                                               cute::Step<cute::_2, cute::_1, cute::_3>{}));  // (column, key, stage)
  static_assert(in_slabs<kRows, kSlab, kWide>([](int r, int c) { return int(LayoutQ{}.layout_b()(r, c)); }));
  static_assert(in_slabs<kKeys, kSlab, kWide>([](int r, int c) { return int(LayoutK{}.layout_b()(r, c, 0)); }));
  static_assert(in_slabs<kKeys, kSlabV, kDim>([](int r, int c) { return int(LayoutV{}.layout_b()(c, r, 0)); }));

  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, Sizes<64, kKeys, 16>, cute::GMMA::Major::K, cute::GMMA::Major::K>()));
  using Values = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, Sizes<64, kDim, 16>, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  static constexpr int kBytesQ = kRows * kWide * 2, kBytesK = kKeys * kWide * 2, kBytesV = kKeys * kDim * 2;
};

using Barrier = cutlass::arch::ClusterTransactionBarrier;

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
    cutlass::arch::fence_barrier_init();
  }
};

/// Bytes to ask for: the start of dynamic shared memory is only known to lie on 16 bytes.
template <typename S>
constexpr int kSharedBytes = sizeof(Storage<S>) + 1024;

/// A place in a ring of stages, and the parity of its present round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Loads a slab-wise tile: rows from `first` on of one head.
template <int kRowsOfSlab, int kSlab, int kColumns, typename T>
__device__ __forceinline__ void load(const CUtensorMap& map, Barrier& full, cute::TMA::CacheHintSm90 hint, T* to,
                                     int first, int head, int batch) {
#pragma unroll
  for (int c = 0; c < kColumns; c += kSlab) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), static_cast<uint64_t>(hint),
                                 to + c * kRowsOfSlab, c, first, head, batch);
  }
}

/// The thread that loads.
template <typename S>
struct Producer {
  static constexpr auto kOnce = cute::TMA::CacheHintSm90::EVICT_FIRST, kAgain = cute::TMA::CacheHintSm90::EVICT_LAST;
  const Params& p;
  Storage<S>& shared;
  Ring<S::kStages> keys, values;
  uint32_t parity = 0;  // of the present item
  Item item;
  int key_head;

  __device__ __forceinline__ Walk walk() const {
    const TileLists& lists = p.a.lists;
    if (lists.index == nullptr) return Walk(nullptr, 0, (p.a.keys + p.bn - 1) / p.bn, p.bn, S::kKeys, p.a.keys);
    const int2 count = __ldg(reinterpret_cast<const int2*>(lists.count) + item.line);
    return Walk(lists.index + item.line * lists.width, count.x, count.x + count.y, p.bn, S::kKeys, p.a.keys);
  }
  __device__ __forceinline__ void load_keys(const Walk& walk) {
    Barrier& full = shared.key_full[keys.stage];
    shared.key_empty[keys.stage].wait(keys.parity ^ 1);
    shared.blocks[keys.stage] = BlockCard{walk.begin, walk.tile, walk.is_partial(), walk.last()};
    full.arrive_and_expect_tx(S::kBytesK);
    load<S::kKeys, S::kSlab, S::kWide>(p.k, full, kAgain, shared.k[keys.stage], walk.begin, key_head, item.batch);
    keys.advance();
  }
  __device__ __forceinline__ void load_values(int first) {
    Barrier& full = shared.value_full[values.stage];
    shared.value_empty[values.stage].wait(values.parity ^ 1);
    full.arrive_and_expect_tx(S::kBytesV);
    load<S::kKeys, S::kSlabV, S::kDim>(p.v, full, kAgain, shared.v[values.stage], first, key_head, item.batch);
    values.advance();
  }
  __device__ __forceinline__ void present(ItemCard::Kind kind) {
    shared.query_empty.wait(parity ^ 1);
    shared.item = ItemCard{kind, item.batch, item.head, item.tile_row, item.sub};
    parity ^= 1;
    if (kind != ItemCard::kBlocks) return shared.query_full.arrive();
    shared.query_full.arrive_and_expect_tx(S::kBytesQ);
    load<kRows, S::kSlab, S::kWide>(p.q, shared.query_full, kOnce, shared.q, item.tile_row * p.bm + item.sub * kRows,
                                    item.head, item.batch);
  }
  __device__ __forceinline__ void run() {
    const int total = static_cast<int>(p.schedule.items()), ctas = gridDim.x;
    for (int turn = 0; turn * ctas < total; ++turn) {
      const int place = Schedule::place(turn, blockIdx.x, ctas);
      if (place >= total) break;  // of the last turn
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
