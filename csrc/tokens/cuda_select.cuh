// Choosing the smallest of integer keys, and compaction: what random_keep, select_active and unmask_select share.
//
// A CTA owns a sample. Radix select: a histogram of eight bits of the keys at a time, from the top, until the wanted
// key is known or a whole bin is taken. Histograms count with integer atomics, whose sums have no order; results are
// placed by prefix sums, so that they come out ascending. Keys are unique, hence exact.
#pragma once

#include "../common/cuda_common.cuh"
#include "philox.h"

namespace maskaccel::cuda {

constexpr int kSelectThreads = 1024;  // at most
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSharedWords = 8192;        // words of a sample that fit in shared memory on every device
constexpr uint32_t kNoKey = 0xffffffffu;  // of no number: `falling_key` takes no NaN
constexpr int kTokenBits = 31;

struct SelectShared {
  int digits[kDigits];
  int digit, below, inside;
  int totals[2][kWarp];
};

__device__ __forceinline__ void add_one(int* counter) {
#ifdef MASKACCEL_EMULATE
  ++*counter;
#else
  atomicAdd(counter, 1);
#endif
}

/// The value of the lane `distance` below; of lanes that have none, their own.
__device__ __forceinline__ int shuffle_up(int v, int distance) {
#ifdef MASKACCEL_EMULATE
  const int lane = threadIdx.x & 31;
  return emulation::shuffle(v, lane < distance ? lane : lane - distance);
#else
  return __shfl_up_sync(0xffffffffu, v, distance);
#endif
}

/// Sum over the lanes up to this one.
__device__ __forceinline__ int warp_prefix_sum(int v) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = shuffle_up(v, distance);
    if (lane >= distance) v += below;
  }
  return v;
}

/// How many of `count` items hold, for every thread.
template <typename Holds>
__device__ __forceinline__ int count_of(Holds&& holds, int count, SelectShared& s) {
  int mine = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) mine += holds(i) ? 1 : 0;
  mine = warp_sum(mine);
  const int lane = threadIdx.x & 31, warps = blockDim.x / kWarp;
  sync_threads();  // the last call's readers
  if (lane == 0) s.totals[0][threadIdx.x / kWarp] = mine;
  sync_threads();
  return warp_sum(lane < warps ? s.totals[0][lane] : 0);
}

/// A key such that `wanted` keys of `count` items are not above it; wanted is from 1 to the number of keys below
/// 2^bits. Items whose key is 2^bits or more do not take part. bits < 64.
template <typename Key>
__device__ __forceinline__ uint64_t smallest_keys(Key&& key, int count, int wanted, int bits, SelectShared& s) {
  uint64_t prefix = 0;
  for (int known = bits; known > 0;) {
    const int shift = known > kDigitBits ? known - kDigitBits : 0, digits = 1 << (known - shift);
    sync_threads();  // the last round's readers
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) s.digits[i] = 0;
    sync_threads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const uint64_t k = key(i);
      if (k >> known == prefix >> known) add_one(&s.digits[k >> shift & (digits - 1)]);
    }
    sync_threads();
    if (threadIdx.x < kWarp) {
      constexpr int kPer = kDigits / kWarp;
      const int* mine = s.digits + threadIdx.x * kPer;
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum += mine[i];
      int below = warp_prefix_sum(sum) - sum;
      if (below < wanted && wanted <= below + sum) {  // one lane alone
        int i = 0;
        while (below + mine[i] < wanted) below += mine[i++];
        s.digit = threadIdx.x * kPer + i;
        s.below = below;
        s.inside = mine[i];
      }
    }
    sync_threads();
    prefix |= static_cast<uint64_t>(s.digit) << shift;
    wanted -= s.below;
    if (s.inside == wanted) return prefix | ((uint64_t{1} << shift) - 1);
    known = shift;
  }
  return prefix;
}

/// Where the tokens go that `kept` holds for: their slots in order, the first `slots` of them. Returns how many there
/// are. `kept` may read what `inverse` held for its token before.
template <typename Kept>
__device__ __forceinline__ int place_tokens(Kept&& kept, int tokens, int slots, int* ids, int* inverse,
                                            SelectShared& s) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int placed = 0, turn = 0;
  sync_threads();  // the last readers of `totals`
  for (int start = 0; start < tokens; start += blockDim.x, turn ^= 1) {
    const int t = start + threadIdx.x;
    const bool mine = t < tokens && kept(t);
    const unsigned votes = warp_ballot(mine);
    if (lane == 0) s.totals[turn][warp] = count_bits(votes);
    sync_threads();
    const int in_warp = lane < warps ? s.totals[turn][lane] : 0;
    const int before = warp_sum(lane < warp ? in_warp : 0), all = warp_sum(in_warp);
    const int slot = placed + before + count_bits(votes & ((1u << lane) - 1));
    if (mine && slot < slots) ids[slot] = t;
    if (t < tokens) inverse[t] = mine && slot < slots ? slot : -1;
    placed += all;
  }
  for (int slot = placed + threadIdx.x; slot < slots; slot += blockDim.x) ids[slot] = tokens;
  return placed;
}

/// Threads of a CTA that owns `items`.
inline int select_threads(int64_t items) { return items <= 1024 ? 256 : items <= 4096 ? 512 : kSelectThreads; }

}  // namespace maskaccel::cuda
