// Which rows of tiles a persistent CTA of the attention takes, and the keys it walks in each. Free of CUDA and of
// torch.
#pragma once

#include "cuda_grid.h"

namespace maskaccel::cuda {

/// The blocks of `block` keys of one row of tiles, in list order. Blocks past the last key are left out.
struct Walk {
  const int* index;  // null: all tiles
  int partial, total, bn, block, keys;
  int tile = 0, begin, end;
  int at = 0, upcoming;  // the id is read one tile ahead: its latency passes while the tile before is worked on

  MASKACCEL_ANY Walk(const int* index_, int partial_, int total_, int bn_, int block_, int keys_)
      : index(index_), partial(partial_), total(total_), bn(bn_), block(block_), keys(keys_) {
    begin = -block;
    end = 0;
    upcoming = index != nullptr && total > 0 ? index[0] : 0;
  }
  MASKACCEL_ANY bool next() {
    begin += block;
    if (begin < end) return true;
    if (at == total) return false;
    tile = upcoming;
    ++at;
    if (at < total) upcoming = index != nullptr ? index[at] : at;
    begin = tile * bn;
    end = begin + bn < keys ? begin + bn : keys;
    return true;
  }
  /// Of the block that next() came to.
  MASKACCEL_ANY bool last() const { return at == total && begin + block >= end; }
  MASKACCEL_ANY bool is_partial() const { return at <= partial; }
};

}  // namespace maskaccel::cuda
