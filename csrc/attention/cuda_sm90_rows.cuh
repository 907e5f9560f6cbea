// What the consumer warp groups of the attention on sm_90a do with the registers of a thread: kept elements, softmax,
// keep test, result. See cuda_sm90.cuh.
#pragma once

#include "cuda_sm90.cuh"

namespace maskaccel::cuda::sm90 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNone = -INFINITY;
enum NamedBarrier : int { kTurn = 1, kVote = kTurn + kConsumers };  // of the consumers; kTurn has one for each of them

/// Bits of the elements of a block that are kept, for the two rows of a thread. Bit 8 i + e is of column 8 i + 2 (lane
/// % 4)
/// + e: shifted once, so that a test is of a constant bit.
template <int kKeys>
struct KeptBits {
  static constexpr int kWords = (kKeys + 31) / 32;
  uint32_t words[2][kWords];

  /// `row` is the thread's first row within the mask tile, `pattern` -1 for a full one.
  __device__ __forceinline__ KeptBits(const Params& p, const BlockCard& block, int pattern, int row) {
    const int across = p.bn / 32, shift = threadIdx.x % 4 * 2;
    const int* from = p.a.patterns + (int64_t{pattern} * p.bm + row) * across + (block.begin - block.tile * p.bn) / 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int left = p.a.keys - block.begin - 32 * i;
        const uint32_t inside = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
        words[r][i] = pattern < 0 ? ~0u : static_cast<uint32_t>(read(from + int64_t{8} * r * across + i));
        words[r][i] = (words[r][i] & inside) >> shift;
      }
    }
  }
  template <int kSize>
  __device__ __forceinline__ void apply(float (&scores)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int column = i / 4 * 8 + i % 2;
      if ((words[i / 2 % 2][column / 32] & 1u << column % 32) == 0) scores[i] = kNone;
    }
  }
};

/// 2^x, x <= 0, on the units of multiply-add, whose share of a block's exponentials FlashAttention-4 (Dao-AILab, 2026)
/// takes off the slower special function unit. x is split at the nearest integer n, which is added to the exponent of
/// 2^(x - n). Relative error below 4e-6; results below 2^-127 are 0, and so is that of a NaN.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kToInteger = 12582912.f;  // 1.5 * 2^23: the sum has no bits for fractions
  x = fmaxf(x, -127.f);
  const float shifted = x + kToInteger, f = x - (shifted - kToInteger);
  float y = 0.0095828576f;
  y = fmaf(y, f, 0.0559064373f);
  y = fmaf(y, f, 0.240240991f);
  y = fmaf(y, f, 0.693124175f);
  y = fmaf(y, f, 1.f);
  uint32_t bits, n;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&n, &shifted, sizeof n);
  bits += n << 23;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

/// Online softmax of the two rows of a thread. `most` is of unscaled scores and of the whole row, `sum` of the thread's
/// part.
struct Softmax {
  float most[2] = {kNone, kNone}, sum[2] = {0.f, 0.f};

  template <int kSize>
  static __device__ __forceinline__ void largest(const float (&scores)[kSize], float (&tile)[2]) {
    tile[0] = tile[1] = kNone;
#pragma unroll
    for (int i = 0; i < kSize; ++i) tile[i / 2 % 2] = fmaxf(tile[i / 2 % 2], scores[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tile[r] = fmaxf(tile[r], shuffle_xor(tile[r], 1));
      tile[r] = fmaxf(tile[r], shuffle_xor(tile[r], 2));
    }
  }
  /// Turns scores, whose largest are `tile`, into exponentials. Returns by what earlier results shrink.
  template <int kSize>
  __device__ __forceinline__ void update(float (&scores)[kSize], const float (&tile)[2], float scale_log2,
                                         float (&shrink)[2]) {
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float now = fmaxf(most[r], tile[r]);
      base[r] = now == kNone ? 0.f : now * scale_log2;  // a row with nothing kept yet: exp2(-inf - 0)
      shrink[r] = exp2_of(most[r] * scale_log2 - base[r]);
      most[r] = now;
      sum[r] *= shrink[r];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float x = scores[i] * scale_log2 - base[i / 2 % 2];
      constexpr int kEvery = kTuning.polynomial;
      scores[i] = kEvery != 0 && i % (kEvery != 0 ? kEvery : 1) == 0 ? exp2_polynomial(x) : exp2_of(x);
      sum[i / 2 % 2] += scores[i];
    }
  }
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += shuffle_xor(sum[r], 1);
      sum[r] += shuffle_xor(sum[r], 2);
    }
  }
};

/// The test of LiteAttention for the two rows of a thread, and the bit of the tile.
struct KeepTest {
  bool inside[2];
  float reference[2];
  int* words = nullptr;  // null: pruning alone

  __device__ __forceinline__ void read(const Params& p, const ItemCard& item, int first) {
    const int64_t head = int64_t{item.batch} * p.a.heads + item.head;
    if (p.a.keep != nullptr) words = p.a.keep + (head * p.a.tile_rows + item.tile_row) * p.a.keep_words;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + 8 * r;
      inside[r] = row < p.a.queries;
      reference[r] = p.a.reference_lse != nullptr && inside[r] ? p.a.reference_lse[head * p.a.queries + row] : kNone;
    }
  }
  /// Sets the bit of a tile that a row keeps. Returns false where it is to be pruned; all consumers get the same
  /// answer. `largest` are the largest scores of the thread's rows in this tile, `most` those of the tiles before.
  __device__ __forceinline__ bool keeps(const Params& p, const float (&largest)[2], const float (&most)[2], int tile,
                                        int thread) const {
    bool mine = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float against = p.a.reference_lse != nullptr ? reference[r] : most[r] * p.a.scale;
      const bool above = against == kNone || (largest[r] * p.a.scale - against) * kLog2e > p.a.skip_threshold;
      mine = mine || (inside[r] && largest[r] != kNone && above);
    }
    const bool prune = p.a.flags & kPrune;
    if (prune) mine = named_any(kVote, mine);
    const bool any = warp_ballot(mine) != 0;
    if (any && words != nullptr && thread % (prune ? 2 * kGroup : kWarp) == 0)
      set_bits(words + tile / 32, 1 << tile % 32);
    return any || !prune;
  }
};

/// Writes out and lse of the two rows of a thread: `first` and `first + 8`.
template <typename S>
__device__ __forceinline__ void write(const Params& p, const ItemCard& item, int first, float (&out)[S::kOut],
                                      Softmax& softmax) {
  using T = typename S::T;
  const AttentionArgs& a = p.a;
  softmax.add_up();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + 8 * r;
    const bool inside = row < a.queries;
    const bool nothing = softmax.sum[r] == 0.f;
    float factor = nothing ? 0.f : inverse(softmax.sum[r]);
    if (a.out_scale.data != nullptr && inside) {
      factor *= static_cast<const float*>(
          a.out_scale
              .data)[item.batch * a.out_scale.stride_b + item.head * a.out_scale.stride_h + row * a.out_scale.stride_q];
    }
#pragma unroll
    for (int i = 0; i < S::kOut; ++i) {
      if (i / 2 % 2 == r) out[i] *= factor;
    }
    if (a.out_add.data != nullptr && inside) {
      const int64_t at = item.batch * a.out_add.stride_b + row * a.out_add.stride_s + item.head * a.out_add.stride_h;
#pragma unroll
      for (int i = 0; i < S::kOut; ++i) {
        const int column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (i / 2 % 2 != r || column >= a.dim) continue;
        out[i] += a.out_add.wide ? static_cast<const float*>(a.out_add.data)[at + column]
                                 : static_cast<float>(static_cast<const T*>(a.out_add.data)[at + column]);
      }
    }
    if (inside && threadIdx.x % 4 == 0) {
      a.lse[(int64_t{item.batch} * a.heads + item.head) * a.queries + row] =
          nothing ? kNone : softmax.most[r] * a.scale + logf(softmax.sum[r]);
    }
    T* to = static_cast<T*>(a.out) + ((int64_t{item.batch} * a.queries + row) * a.heads + item.head) * a.dim;
    write_row(out, r, inside, to, a.dim);
  }
}

}  // namespace maskaccel::cuda::sm90
