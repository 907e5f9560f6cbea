// In which order rows of tiles are begun: by CTAs of a grid, or by persistent ones. Free of CUDA and of torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MASKACCEL_ANY __host__ __device__ __forceinline__
#else
#define MASKACCEL_ANY inline
#endif

namespace maskaccel::cuda {

constexpr int kWindow = 16;  // rows of a mask that heads share, before the next head takes its turn

/// One query tile of the kernel: of one sample and head, `sub`-th of mask row `tile_row`.
struct Item {
  int batch, head, tile_row, sub;
  int line;  // of the lists: (mask_batch, mask_heads, tile_rows), flat
};

/// All items in one sequence, longest first as `order` gives them. A CTA begins with the item at its own number; with a
/// mask it then takes the next that nobody took, from a counter in memory, and without one, where all items are as
/// long, every ctas-th. Dealing out in turns with a mask too would save the claims, and leave CTAs idle where
/// few rows are long (docs/cuda-kernels.md).
///
/// Samples and heads that share a mask are copies of its rows. They take turns after `window` rows: neighbours in the
/// sequence, which run at the same time, then read the keys of a few heads only, which L2 holds, and the order is still
/// longest first to within a window.
///
/// Places in the sequence are of 32 bits: items() + ctas has to be below 2^31.
struct Schedule {
  const int* order = nullptr;  // null: as they lie
  int tile_rows = 0, subs = 1, batch = 1, heads = 1, mask_batch = 1, mask_heads = 1, window = 1;

  MASKACCEL_ANY int lines() const { return mask_batch * mask_heads * tile_rows; }
  MASKACCEL_ANY int copies() const { return batch / mask_batch * (heads / mask_heads); }
  MASKACCEL_ANY int64_t items() const { return int64_t{lines()} * copies() * subs; }

  MASKACCEL_ANY Item item(int place) const {
    const int per_window = window * copies() * subs;
    const int first = place / per_window * window;
    const int rows = lines() - first < window ? lines() - first : window;
    const int within = place % per_window, copy = within / (rows * subs), rank = within % (rows * subs);
    const int at = first + rank / subs;
    Item i;
    i.sub = rank % subs;
    i.line = order != nullptr ? order[at] : at;
    i.tile_row = i.line % tile_rows;
    const int mask = i.line / tile_rows, head_copies = heads / mask_heads;
    i.head = mask_heads == 1 ? copy % head_copies : mask % mask_heads;
    i.batch = mask_batch == 1 ? copy / head_copies : mask / mask_heads;
    return i;
  }
};

}  // namespace maskaccel::cuda
