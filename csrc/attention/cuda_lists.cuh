// Bits of a tile mask to lists of tiles. Integers alone, no atomics.
#pragma once

#include "../common/cuda_common.cuh"

namespace maskaccel::cuda {

constexpr int kListThreads = 128, kOrderThreads = 256;

struct ListParams {
  const unsigned* bits = nullptr;   // (B, H, rows, words)
  const int* pattern_of = nullptr;  // (1|B, 1|H, rows, tiles)
  int64_t pattern_stride_b = 0, pattern_stride_h = 0;
  int *index = nullptr, *count = nullptr, *order = nullptr, *total = nullptr;
  int heads = 1, rows = 0, tiles = 0, words = 0;
  int lines = 0, length = 0, all_lines = 0;  // lines of one head, tiles along a line, lines of all heads
  bool transpose = false;
};

/// One warp is one line: it counts its partial tiles, and then writes partial, full and left-out tiles, each ascending.
static __global__ void __launch_bounds__(kListThreads) tile_lists_kernel(const __grid_constant__ ListParams p) {
  const int at = (blockIdx.x * kListThreads + threadIdx.x) / kWarp, lane = threadIdx.x & 31;
  if (at >= p.all_lines) return;
  const int slab = at / p.lines, line = at % p.lines;
  const unsigned* const bits = p.bits + int64_t{slab} * p.rows * p.words;
  const int* pattern = nullptr;
  if (p.pattern_of != nullptr)
    pattern = p.pattern_of + slab / p.heads * p.pattern_stride_b + slab % p.heads * p.pattern_stride_h;
  // Bits of the 32 tiles from `first` on: kept, and kept in part.
  const auto read = [&](int first, unsigned& kept, unsigned& partial) {
    const int row = p.transpose ? first + lane : line, tile = p.transpose ? line : first + lane;
    const bool inside = first + lane < p.length;
    const bool is_kept = inside && bits[int64_t{row} * p.words + tile / 32] >> tile % 32 & 1u;
    kept = warp_ballot(is_kept);
    partial = warp_ballot(is_kept && pattern != nullptr && pattern[int64_t{row} * p.tiles + tile] >= 0);
  };
  int partials = 0, total = 0;
  for (int first = 0; first < p.length; first += kWarp) {
    unsigned kept, partial;
    read(first, kept, partial);
    partials += count_bits(partial);
    total += count_bits(kept);
  }
  if (lane == 0) {
    p.count[2 * int64_t{at}] = partials;
    p.count[2 * int64_t{at} + 1] = total - partials;
    p.total[at] = total;
  }
  int* const index = p.index + int64_t{at} * p.length;
  int next_partial = 0, next_full = partials, next_out = total;
  for (int first = 0; first < p.length; first += kWarp) {
    unsigned kept, partial;
    read(first, kept, partial);
    const unsigned full = kept & ~partial, out = ~kept, before = (1u << lane) - 1u, mine = 1u << lane;
    const int place = partial & mine ? next_partial + count_bits(partial & before)
                      : full & mine  ? next_full + count_bits(full & before)
                                     : next_out + count_bits(out & before);
    if (first + lane < p.length) index[place] = first + lane;
    next_partial += count_bits(partial);
    next_full += count_bits(full);
    next_out += count_bits(out);
  }
}

/// Adds one to a counter of shared memory.
__device__ __forceinline__ void count_one(int& counter) {
#ifdef MASKACCEL_EMULATE
  ++counter;
#else
  atomicAdd(&counter, 1);
#endif
}

/// Binary digits of a number of tiles.
__device__ __forceinline__ int digits_of(int n) {
#ifdef MASKACCEL_EMULATE
  return n == 0 ? 0 : 32 - __builtin_clz(n);
#else
  return 32 - __clz(n);
#endif
}

/// One thread is one line: its place is the number of lines that go before it. Those of its own slab are compared one
/// by one; of the others it is enough to know how many have how many digits. grid: slabs, parts of their lines.
static __global__ void __launch_bounds__(kOrderThreads) tile_order_kernel(const __grid_constant__ ListParams p) {
  constexpr int kDigits = 32;  // 0 to 31
  // By lane, so that lanes do not collide: of all lines, and of those of earlier slabs.
  __shared__ int all[kDigits][kWarp], earlier[kDigits][kWarp], lines_with[kDigits], before[kDigits];
  __shared__ int totals[kOrderThreads];
  const int first = blockIdx.x * p.lines, lane = threadIdx.x & 31;
  for (int i = threadIdx.x; i < kDigits * kWarp; i += kOrderThreads) all[i / kWarp][lane] = earlier[i / kWarp][lane] = 0;
  sync_threads();
  for (int i = threadIdx.x; i < p.all_lines; i += kOrderThreads) {
    const int digits = digits_of(p.total[i]);
    count_one(all[digits][lane]);
    if (i < first) count_one(earlier[digits][lane]);
  }
  sync_threads();
  if (threadIdx.x < kDigits) {  // thread: a number of digits
    int with = 0, sum = 0;
    for (int i = 0; i < kWarp; ++i) with += all[lane][(lane + i) % kWarp], sum += earlier[lane][(lane + i) % kWarp];
    lines_with[lane] = with;
    before[lane] = sum;
  }
  sync_threads();
  if (threadIdx.x < kDigits) {
    for (int more = lane + 1; more < kDigits; ++more) before[lane] += lines_with[more];
  }
  sync_threads();
  const int line = blockIdx.y * kOrderThreads + threadIdx.x;
  const bool inside = line < p.lines;
  const int mine = inside ? p.total[first + line] : 0, digits = digits_of(mine);
  int place = before[digits];
  for (int begin = 0; begin < p.lines; begin += kOrderThreads) {
    const int other = begin + static_cast<int>(threadIdx.x);
    totals[threadIdx.x] = other < p.lines ? p.total[first + other] : -1;
    sync_threads();
#pragma unroll 8
    for (int i = 0; i < kOrderThreads; ++i) {
      const bool longer = totals[i] > mine || (totals[i] == mine && begin + i < line);
      place += longer && digits_of(totals[i]) == digits;
    }
    sync_threads();
  }
  if (inside) p.order[place] = first + line;
}

}  // namespace maskaccel::cuda
