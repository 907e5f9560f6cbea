// Gradients of tiled attention and the column sums of its probabilities: what the CPU kernels are told. Free of torch.
//
// One pass over blocks of keys forms scores and probabilities once for all gradients. An item is a block of keys of one
// key head: its dk and dv stay with the thread. dq is summed over the items of a head, and each block of queries takes
// its contributions in ascending order of keys: an item waits for its turn. So sums do not depend on the number of
// threads.
//
// Heads are worked on in groups. The queries of a group are packed by items of their own, before its blocks of keys;
// two groups fit the workspace, which does not grow with the number of heads. Items are handed out in order and wait
// for earlier ones only, so the lowest one that runs never waits.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu_problem.h"

namespace maskaccel {

enum AttentionNeeds : int { kNeedQ = 1, kNeedK = 2, kNeedV = 4, kNeedS = 8 };

// Queries and keys that are multiplied at a time: never across a mask tile. Both divide 128, so that tiles of multiples
// of 128 are cut as the matrix is without a mask.
struct AttentionBlocks {
  static constexpr int64_t kTile = 128;
  int64_t queries = 64, keys = 128;
};

// Workspace that all threads share, and the order of the items.
struct AttentionPass : AttentionProblem {
  AttentionBlocks blocks;
  const float* lse = nullptr;
  int64_t padded_rows = 0, padded_dim = 0;         // of a head in the workspace
  float *q_rows = nullptr, *q_stacked = nullptr;   // packed as left and as right operands; the same where they agree
  float *minus_shift = nullptr, *share = nullptr;  // of a row: 1 / exp(lse) = share * 2^minus_shift
  int64_t heads_at_once = 1;                       // key heads of a group; their items alternate
  int64_t key_blocks = 0, row_chunks = 0;          // of a head; chunks of kTile rows
  std::atomic<int64_t>* next_item = nullptr;
  std::atomic<int64_t>*packed = nullptr, *done = nullptr;  // chunks of each key head, blocks of keys of each group

  int64_t queries_per_key() const { return H / Hk; }
  int64_t groups() const { return (B * Hk + heads_at_once - 1) / heads_at_once; }
  int64_t slots() const { return (groups() > 1 ? 2 : 1) * heads_at_once * queries_per_key(); }
  // First row of a head in the workspace.
  int64_t slot_row(int64_t b, int64_t h) const {
    const int64_t of_key = queries_per_key();
    return ((b * Hk + h / of_key) % (2 * heads_at_once) * of_key + h % of_key) * padded_rows;
  }
  int64_t row_words(int64_t depth) const { return depth == 1 ? padded_dim : D / depth; }
};

struct AttentionBackward : AttentionPass {
  HeadRows out, dout;
  const float* dlse = nullptr;
  int needs = 0;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  float* ds = nullptr;
  float *dout_rows = nullptr, *dout_stacked = nullptr, *delta = nullptr, *dq_sum = nullptr;
  // Contributions to dq in units of key blocks: how many each block of queries has had; how many come before those of
  // each entry of index_t, and how many there are for a row of tiles (without a mask both follow from the shape).
  std::atomic<int64_t>* turn = nullptr;
  const int32_t *turn_of = nullptr, *turns = nullptr;
  int64_t turns_b = 0, turns_h = 0;  // strides of `turns`
  int64_t query_blocks = 0;          // of a head
  int64_t turns_of(int64_t b, int64_t h, int64_t m) const {
    return turns == nullptr ? key_blocks : turns[b * turns_b + h * turns_h + m];
  }
};

struct AttentionColumnSums : AttentionPass {
  float* sums = nullptr;  // (B, H, Sk)
};

struct AttentionBackwardKernels {
  int64_t (*depth)(Dtype);                // numbers in a word of the operands
  void (*run)(const AttentionBackward&);  // items until there are none left
  void (*run_sums)(const AttentionColumnSums&);
};

MASKACCEL_DISPATCH(AttentionBackwardKernels, attention_backward_kernels)

}  // namespace maskaccel
