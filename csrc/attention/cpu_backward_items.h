// The items of a pass over blocks of keys, and the blocks of queries that they meet. For kernel sources only.
#pragma once

#include <sched.h>

#include "../common/vec.h"
#include "cpu_backward.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

MASKACCEL_INLINE int64_t even(int64_t n) { return n + (n & 1); }

inline void wait_for(const std::atomic<int64_t>& count, int64_t value) {
  for (int64_t tries = 0; count.load(std::memory_order_acquire) != value; ++tries)
    if (tries > 64) sched_yield();
}

// A chunk of rows to pack, or a block of keys.
struct Item {
  bool pack;
  int64_t b, hk, group;
  int64_t h, first;       // to pack: query head and first row; else only first, the first key
  int64_t n, part, keys;  // key tile, block of it, keys of the block
};

template <class S>
bool next_item(const S& s, Item& item) {
  const int64_t chunks = s.queries_per_key() * s.row_chunks, of_head = chunks + s.key_blocks;
  const int64_t id = s.next_item->fetch_add(1, std::memory_order_relaxed), at_once = s.heads_at_once;
  if (id >= s.B * s.Hk * of_head) return false;
  item.group = id / (at_once * of_head);
  const int64_t left = s.B * s.Hk - item.group * at_once, size = left < at_once ? left : at_once;
  int64_t at = id % (at_once * of_head);
  item.pack = at < size * chunks;
  if (!item.pack) at -= size * chunks;
  const int64_t head = item.group * at_once + at % size;
  at /= size;
  item.b = head / s.Hk;
  item.hk = head % s.Hk;
  if (item.pack) {
    item.h = item.hk * s.queries_per_key() + at / s.row_chunks;
    item.first = at % s.row_chunks * AttentionBlocks::kTile;
    // Two groups ago the rows of the workspace were another head's.
    if (item.group >= 2) wait_for(s.done[item.group - 2], at_once * s.key_blocks);
    return true;
  }
  const int64_t per_tile = (s.bn + s.blocks.keys - 1) / s.blocks.keys;
  item.n = at / per_tile;
  item.part = at % per_tile;
  item.first = item.n * s.bn + item.part * s.blocks.keys;
  const int64_t tile_end = (item.n + 1) * s.bn < s.Sk ? (item.n + 1) * s.bn : s.Sk;
  item.keys = tile_end - item.first < s.blocks.keys ? tile_end - item.first : s.blocks.keys;
  wait_for(s.packed[head], chunks);
  return true;
}

template <class S>
void item_done(const S& s, const Item& item) {
  std::atomic<int64_t>& count = item.pack ? s.packed[item.b * s.Hk + item.hk] : s.done[item.group];
  count.fetch_add(1, std::memory_order_acq_rel);
}

// A block of queries that an item meets.
struct Meeting {
  int64_t b, h, entry;  // of index_t, counted over all rows; without a mask not used
  int64_t m, part;      // query tile, block of it
  int64_t first, rows;  // rows are even, those past Sq are zero in the workspace
  const int32_t* kept;  // bits of the first row; null: all elements are kept
  int64_t words;        // from row to row of `kept`
};

template <class F>
MASKACCEL_INLINE void each_meeting(const AttentionPass& s, const Item& item, int64_t h, F&& f) {
  const TileLists& lists = s.lists_t;
  const bool dense = lists.index == nullptr;
  const int64_t row = dense ? 0 : lists.row(item.b, h, item.n);
  const int64_t partial = dense ? 0 : lists.count[2 * row];
  const int64_t entries = dense ? s.Mq : partial + lists.count[2 * row + 1];
  for (int64_t e = 0; e < entries; ++e) {
    Meeting at;
    at.b = item.b;
    at.h = h;
    at.entry = row * lists.length + e;
    at.m = dense ? e : lists.index[at.entry];
    at.words = s.elements.words;
    const int32_t* const pattern = e < partial ? s.elements.of(item.b, h, at.m, item.n) : nullptr;
    const int64_t begin = at.m * s.bm, end = begin + s.bm < s.Sq ? begin + s.bm : s.Sq;
    at.part = 0;
    for (at.first = begin; at.first < end; at.first += s.blocks.queries, ++at.part) {
      at.rows = even(end - at.first < s.blocks.queries ? end - at.first : s.blocks.queries);
      at.kept = pattern == nullptr ? nullptr : pattern + (at.first - begin) * at.words + item.part * s.blocks.keys / 32;
      f(at);
    }
  }
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
