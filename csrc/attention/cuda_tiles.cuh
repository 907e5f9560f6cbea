// What the kernels of the sm_80 path share: which tiles, tiles in shared memory, products of them, scores.
#pragma once

#include "cuda_args.h"
#include "cuda_grid.h"
#include "cuda_mma.cuh"

namespace maskaccel::cuda {

/// A kernel's element type, head dim in its tiles (a multiple of 16) and in its results (72 needs no padding there).
template <typename T_, int kWidth_, int kValues_ = kWidth_>
struct Instance {
  using T = T_;
  static constexpr int kWidth = kWidth_, kValues = kValues_;
};

/// f of the narrowest instance that holds the head.
template <typename T, typename F>
void by_dim(int dim, F&& f) {
  if (dim <= 32) return f(Instance<T, 32>{});
  if (dim <= 64) return f(Instance<T, 64>{});
  if (dim == 72) return f(Instance<T, 80, 72>{});
  if (dim == 80) return f(Instance<T, 80>{});
  if (dim <= 96) return f(Instance<T, 96>{});
  if (dim <= 128) return f(Instance<T, 128>{});
  if (dim <= 160) return f(Instance<T, 160>{});
  f(Instance<T, 256>{});
}
template <typename F>
void by_instance(const AttentionArgs& a, F&& f) {
  if (a.dtype == Dtype::bf16) return by_dim<bf16>(a.dim, f);
  by_dim<fp16>(a.dim, f);
}

/// Of a kernel that walks rows of tiles, over keys, or (kKeyRows) columns of tiles, over queries.
template <bool kKeyRows>
struct Axis {
  static __device__ __forceinline__ const TileLists& lists(const AttentionArgs& p) {
    return kKeyRows ? p.lists_t : p.lists;
  }
  static __device__ __forceinline__ int lines(const AttentionArgs& p) {
    return kKeyRows ? p.tile_columns : p.tile_rows;
  }
  static __device__ __forceinline__ int tiles(const AttentionArgs& p) {
    return kKeyRows ? p.tile_rows : p.tile_columns;
  }
  static __device__ __forceinline__ int size(const AttentionArgs& p) { return kKeyRows ? p.bm : p.bn; }  // of a tile
  static __device__ __forceinline__ int end(const AttentionArgs& p) { return kKeyRows ? p.queries : p.keys; }
};

/// A line of tiles: a row of them, or a column.
struct Line {
  int b, h, line;
};

/// The line that the CTA of this number works on, of `heads` heads.
template <bool kKeyRows>
__device__ __forceinline__ Line locate(const AttentionArgs& p, int heads, int item) {
  const TileLists& lists = Axis<kKeyRows>::lists(p);
  // The lists of a key head whose query heads have one each are several lines of it: they have no order here.
  const bool several = lists.heads != 1 && lists.heads != heads;
  Schedule s;
  s.order = several ? nullptr : lists.order;
  s.tile_rows = Axis<kKeyRows>::lines(p);
  s.batch = p.batch, s.heads = heads;
  s.mask_batch = lists.batch, s.mask_heads = several ? heads : lists.heads;
  s.window = s.order != nullptr ? smaller(kWindow, s.lines()) : s.tile_rows;
  const Item i = s.item(item);
  return Line{i.batch, i.head, i.tile_row};
}

/// Walks the pieces, `kPiece` wide, of the tiles of a line, of head h and then of the further heads before h_end.
template <bool kKeyRows, int kPiece>
struct Walk {
  using Along = Axis<kKeyRows>;
  int b, h, h_end, line;
  const int* index = nullptr;  // null: all tiles
  int at = 0, partial = 0, total = 0;
  int tile = 0, begin = 0, limit = 0;  // the piece is [begin, min(begin + kPiece, limit)), in elements

  __device__ __forceinline__ bool done() const { return at >= total; }
  __device__ __forceinline__ bool is_partial() const { return at < partial; }
  __device__ __forceinline__ bool is_edge() const { return begin + kPiece > limit; }

  /// To the first piece of the first head that has any.
  __device__ __forceinline__ void start(const AttentionArgs& p) {
    for (;; ++h) {
      const TileLists& lists = Along::lists(p);
      at = 0, total = Along::tiles(p);
      if (lists.index != nullptr) {
        const int64_t bh = int64_t{lists.batch == 1 ? 0 : b} * lists.heads + (lists.heads == 1 ? 0 : h);
        const int64_t id = bh * Along::lines(p) + line;
        index = lists.index + id * lists.width;
        partial = lists.count[2 * id];
        total = partial + lists.count[2 * id + 1];
      }
      if (total > 0) return enter(p);
      if (h + 1 >= h_end) return;
    }
  }
  __device__ __forceinline__ void next(const AttentionArgs& p) {
    begin += kPiece;
    if (begin < limit) return;
    if (++at < total) return enter(p);
    if (h + 1 < h_end) {
      ++h;
      start(p);
    }
  }
  __device__ __forceinline__ void enter(const AttentionArgs& p) {
    tile = index != nullptr ? index[at] : at;
    begin = tile * Along::size(p);
    limit = smaller(begin + Along::size(p), Along::end(p));
  }
};

/// A tile of `kRows` rows of `kWidth` elements in shared memory. An odd number of 16-byte chunks between rows lets
/// eight rows of one chunk lie in eight different banks, at fixed offsets.
template <int kWidth>
constexpr int kStep = (kWidth / 8 | 1) * 8;

/// Starts the copy of rows [first, first + kRows) of one head to shared memory: zeros from `limit` on and past `width`.
template <typename T, int kThreads, int kRows, int kWidth, bool kAligned>
__device__ __forceinline__ void fill_tile(T* tile, const T* source, int64_t stride, int first, int limit, int width) {
  constexpr int kChunks = kWidth / 8, kLoads = kRows * kChunks;
  const int thread = fresh(threadIdx.x);
  if constexpr (kAligned && kThreads % kChunks == 0) {  // a thread keeps its column
    constexpr int kApart = kThreads / kChunks;
    const int row = thread / kChunks, d = thread % kChunks * 8;
    const T* from = source + (first + row) * stride + d;
    T* const to = tile + row * kStep<kWidth> + d;
    const int rows = d < width ? limit - first - row : 0;
#pragma unroll
    for (int i = 0; i < kRows; i += kApart, from += kApart * stride) copy_async(to + i * kStep<kWidth>, from, i < rows);
  } else if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < (kLoads + kThreads - 1) / kThreads; ++i) {
      const int at = i * kThreads + thread, row = at / kChunks, d = at % kChunks * 8;
      if (kLoads % kThreads != 0 && at >= kLoads) break;
      copy_async(tile + row * kStep<kWidth> + d, source + (first + row) * stride + d, first + row < limit && d < width);
    }
  } else {
#pragma unroll 1
    for (int at = thread; at < kLoads; at += kThreads) {
      const int row = at / kChunks, d = at % kChunks * 8;
      const T* const from = source + (first + row) * stride + d;
      const bool valid = first + row < limit && d < width;
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < 8; ++e) pack[e] = valid ? from[e] : T(0.f);
      *reinterpret_cast<Pack<T>*>(tile + row * kStep<kWidth> + d) = pack;
    }
  }
}

/// The same as plan P does it; rows that lie on no 16 bytes are for general kernels.
template <typename P, int kRows>
__device__ __forceinline__ void fill(typename P::T* tile, const typename P::T* source, const Rows& rows, int first,
                                     int limit, int width) {
  if (P::kGeneral && !rows.vec) {
    fill_tile<typename P::T, P::kThreads, kRows, P::kWidth, false>(tile, source, rows.stride_s, first, limit, width);
  } else {
    fill_tile<typename P::T, P::kThreads, kRows, P::kWidth, true>(tile, source, rows.stride_s, first, limit, width);
  }
}

/// scores += x y^T: x are `kBlocks` times 16 rows of this warp, y `kColumns` rows; both of kWidth elements.
template <typename T, int kBlocks, int kColumns, int kWidth>
__device__ __forceinline__ void scores_of(float (&scores)[kBlocks][kColumns / 8][4], const T* x, const T* y) {
  const int lane = threadIdx.x & 31;
  x += lane % 16 * kStep<kWidth> + lane / 16 * 8;
  y += (lane % 8 + lane / 16 * 8) * kStep<kWidth> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kWidth; k += 16) {
    uint32_t left[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) load_matrices<false>(left[m], x + 16 * m * kStep<kWidth> + k);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t right[4];
      load_matrices<false>(right, y + 16 * n * kStep<kWidth> + k);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        multiply_add<T>(scores[m][2 * n], left[m], right[0], right[1]);
        multiply_add<T>(scores[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// sum += weights y: weights of 16 kBlocks x kColumns, rounded to T, y of kColumns rows, of which kWidth elements are
/// taken.
template <typename T, int kBlocks, int kColumns, int kWidth, int kStride>
__device__ __forceinline__ void weighted_sum(float (&sum)[kBlocks][kWidth / 8][4],
                                             const float (&weights)[kBlocks][kColumns / 8][4], const T* y) {
  const int lane = threadIdx.x & 31;
  y += lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t left[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &weights[m][2 * k + i / 2][i % 2 * 2];
        left[m][i] = pack_pair<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      uint32_t right[4];
      // An odd last block also loads the eight zeros past it, and does not use them.
      load_matrices<true>(right, y + 16 * k * kStride + 8 * n);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        multiply_add<T>(sum[m][n], left[m], right[0], right[1]);
        if (n + 1 < kWidth / 8) multiply_add<T>(sum[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// Which elements of the score matrix the registers of a warp hold. `kKeyRows`: its rows are keys and its columns
/// queries.
template <bool kKeyRows>
struct Span {
  int b, h;
  int row;     // of this lane's first register: the warp's first row + lane / 4
  int column;  // of this lane's first register: the first of the piece + lane % 4 * 2
};

/// Scores to log2 units with what is added to them.
template <typename T, bool kKeyRows, int kBlocks, int kColumns>
__device__ __forceinline__ void add_to_scores(float (&scores)[kBlocks][kColumns / 8][4], const AttentionArgs& p,
                                              const Span<kKeyRows>& at) {
  const float* table = p.relpos_table == nullptr ? nullptr : p.relpos_table + at.h * p.relpos_stride_h;
  const int64_t bias_at = at.b * p.bias.stride_b + at.h * p.bias.stride_h;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row + 16 * m + 8 * half;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = at.column + 8 * n + e, query = kKeyRows ? column : row, key = kKeyRows ? row : column;
          float& s = scores[m][n][2 * half + e];
          float value = s * p.scale;
          if (query < p.queries && key < p.keys) {
            if (p.bias.data != nullptr) {
              value +=
                  load_scalar<T>(p.bias.data, bias_at + query * p.bias.stride_q + key * p.bias.stride_k, p.bias.wide);
            }
            if (table != nullptr) {
              value += table[p.relpos_q[at.b * p.relpos_stride_q + query] - p.relpos_k[at.b * p.relpos_stride_k + key]];
            }
          }
          s = value * kLog2e;
        }
    }
}

/// -inf where the pattern of tile (tile_row, tile_column) has no bit.
template <bool kKeyRows, int kBlocks, int kColumns>
__device__ __forceinline__ void apply_pattern(float (&scores)[kBlocks][kColumns / 8][4], const AttentionArgs& p,
                                              const Span<kKeyRows>& at, int tile_row, int tile_column) {
  if (p.pattern_of == nullptr) return;
  const int id = p.pattern_of[at.b * p.pattern_stride_b + at.h * p.pattern_stride_h +
                              int64_t{tile_row} * p.tile_columns + tile_column];
  if (id < 0) return;
  const int words = p.bn / 32;
  const int* pattern = p.patterns + int64_t{id} * p.bm * words;
  // Places within the tile. A lane's elements of eight neighbouring columns, or rows, lie in one word.
  const int row = at.row - (kKeyRows ? tile_column * p.bn : tile_row * p.bm);
  const int column = at.column - (kKeyRows ? tile_row * p.bm : tile_column * p.bn);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    if constexpr (kKeyRows) {
      const int key = row + 16 * m, word = key / 32;  // the warp's 16 keys start at a multiple of 16
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int query = column + 8 * n + e;
          const unsigned bits =
              query < p.bm && word < words ? static_cast<unsigned>(pattern[query * words + word]) >> key % 32 : 0u;
          if (!(bits & 1u)) scores[m][n][e] = -kInfinity;
          if (!(bits & 256u)) scores[m][n][2 + e] = -kInfinity;
        }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + 16 * m + 8 * half;
#pragma unroll
        for (int block = 0; block < (kColumns + 31) / 32; ++block) {
          const int key = column + 32 * block, word = key / 32;
          unsigned bits =
              query < p.bm && word < words ? static_cast<unsigned>(pattern[query * words + word]) >> key % 32 : 0u;
#pragma unroll
          for (int n = 4 * block; n < 4 * block + 4 && n < kColumns / 8; ++n, bits >>= 8)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (!(bits >> e & 1u)) scores[m][n][2 * half + e] = -kInfinity;
            }
        }
      }
    }
  }
}

/// -inf in all but the first `left` columns from this lane's first.
template <int kBlocks, int kColumns>
__device__ __forceinline__ void apply_limit(float (&scores)[kBlocks][kColumns / 8][4], int left) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool outside = 8 * n + e >= left;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (outside) scores[m][n][2 * half + e] = -kInfinity;
        }
    }
}

/// Whether scores must be brought to log2 units before their maximum is taken.
__host__ __device__ __forceinline__ bool adds_to_scores(const AttentionArgs& p) {
  return p.bias.data != nullptr || p.relpos_table != nullptr || !(p.scale > 0.f);
}

/// The largest of a value over the four lanes of a row, and its sum.
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, shuffle_xor(v, 1));
  return fmaxf(v, shuffle_xor(v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

/// Writes 16 rows of a warp, which lie in shared memory, to rows [first, limit) of a contiguous (B, S, H, D) result.
template <typename T, int kWidth, int kStride>
__device__ __forceinline__ void store_rows(T* result, const T* tile, int64_t row_stride, int first, int limit,
                                           int width) {
  constexpr int kChunks = kWidth / 8;
  for (int at = threadIdx.x & 31; at < 16 * kChunks; at += kWarp) {
    const int row = at / kChunks, d = at % kChunks * 8;
    if (first + row < limit && d < width) {
      *reinterpret_cast<uint4*>(result + (first + row) * row_stride + d) =
          *reinterpret_cast<const uint4*>(tile + row * kStride + d);
    }
  }
}

}  // namespace maskaccel::cuda
