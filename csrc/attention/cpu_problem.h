// What all CPU kernels of tiled attention are told: the tensors' layout, which tiles and elements count, and what is
// added to the scores. The contract is in maskaccel/ops/attention/schema.py. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace maskaccel {

// A (B, S, H, D) tensor with a dense last dim; strides in elements.
struct HeadRows {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;
  int64_t offset(int64_t b, int64_t s, int64_t h) const { return b * stride_b + s * stride_s + h * stride_h; }
};

// For each row of tiles the tiles that count, the partial ones first. Without a mask `index` is null: all of them do,
// and all are full.
struct TileLists {
  const int32_t *index = nullptr, *count = nullptr, *order = nullptr;
  int64_t rows = 0, others = 0;  // tiles along this side and along the other one
  int64_t length = 0;            // of a list
  int64_t step_b = 0, step_h = 0;  // rows from one sample's lists to the next one's, and from head to head
  int64_t row(int64_t b, int64_t h, int64_t m) const { return b * step_b + h * step_h + m; }
};

// Which elements of partial tiles count.
struct TileElements {
  const int32_t *pattern_of = nullptr, *patterns = nullptr;
  int64_t tiles = 0;               // along the keys
  int64_t step_b = 0, step_h = 0;  // of pattern_of
  int64_t bm = 0, words = 0;       // of a pattern
  // Bits of the tile, `words` a row; null if it is full.
  const int32_t* of(int64_t b, int64_t h, int64_t m, int64_t n) const {
    if (pattern_of == nullptr) return nullptr;
    const int64_t pattern = pattern_of[b * step_b + h * step_h + m * tiles + n];
    return pattern < 0 ? nullptr : patterns + pattern * bm * words;
  }
};

// What is added to scale * q . k.
struct ScoreTerms {
  const void* bias = nullptr;
  Dtype bias_dtype = Dtype::f32;
  int64_t bias_b = 0, bias_h = 0, bias_i = 0, bias_j = 0;
  const float* table = nullptr;
  const int32_t *relpos_q = nullptr, *relpos_k = nullptr;
  int64_t table_h = 0, relpos_q_b = 0, relpos_k_b = 0;
  bool any() const { return bias != nullptr || table != nullptr; }
};

struct AttentionProblem {
  int64_t B = 0, Sq = 0, Sk = 0, H = 0, Hk = 0, D = 0;
  int64_t bm = 0, bn = 0, Mq = 0, Nk = 0;
  Dtype dtype = Dtype::f32;
  float scale = 0;
  HeadRows q, k, v;
  TileLists lists, lists_t;  // of the query tiles, and of the key tiles
  TileElements elements;
  ScoreTerms terms;
  int64_t key_head(int64_t h) const { return h / (H / Hk); }
};

}  // namespace maskaccel
