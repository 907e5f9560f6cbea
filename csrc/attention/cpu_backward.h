// Gradients of tiled attention and the column sums of its probabilities: what the CPU kernels are told. Free of torch.
//
// One pass over blocks of keys forms scores and probabilities once for all gradients. An item is a block of keys of one
// key head: its dk and dv stay with the thread. dq is summed over the items of a head, and each block of queries takes
// its contributions in ascending order of keys: an item waits for its turn. Items are handed out in that order, so the
// lowest one that runs never waits, and sums do not depend on the number of threads.
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
  int64_t padded_rows = 0, padded_dim = 0;   // of a head in the workspace
  float *q_rows = nullptr, *q_stacked = nullptr;  // packed as left and as right operands; the same where they agree
  float *minus_shift = nullptr, *share = nullptr;  // (B, H, padded_rows): 1 / exp(lse) = share * 2^minus_shift
  int64_t heads_at_once = 1;                      // heads whose items alternate
  std::atomic<int64_t>* next_item = nullptr;
  int64_t key_blocks = 0;  // of a head

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
  std::atomic<int32_t>* turn = nullptr;
  const int32_t *turn_of = nullptr, *turns = nullptr;
  int64_t turns_b = 0, turns_h = 0;  // strides of `turns`
  int64_t query_blocks = 0;          // of a head
  int64_t turn_row(int64_t b, int64_t h, int64_t m) const { return b * turns_b + h * turns_h + m; }
};

struct AttentionColumnSums : AttentionPass {
  float* sums = nullptr;  // (B, H, Sk)
};

struct AttentionBackwardKernels {
  int64_t (*depth)(Dtype);  // numbers in a word of the operands
  void (*prepare)(const AttentionBackward&, int64_t begin, int64_t end);  // blocks of queries of all heads
  void (*run)(const AttentionBackward&);                                  // items until there are none left
  void (*prepare_sums)(const AttentionColumnSums&, int64_t begin, int64_t end);
  void (*run_sums)(const AttentionColumnSums&);
};

MASKACCEL_DISPATCH(AttentionBackwardKernels, attention_backward_kernels)

}  // namespace maskaccel
