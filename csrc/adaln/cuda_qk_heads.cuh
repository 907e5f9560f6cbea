// Norm per head and rotary embedding of whole, aligned heads: the fast kernels of qk_norm_rope.
//
// A warp takes a token, heads side by side over its lanes. The vectors of several heads are under way at any time: as
// soon as one is used, that of a later head is asked for in its place. Cos and sin are read once for a token, by whole
// vectors, and so is the weight; both stay in registers over the heads. What is the same for a whole launch is a
// template argument, or tested where no load waits behind the test.
#pragma once

#include "cuda_qk.cuh"

namespace maskaccel::cuda {

// Small CTAs: what the end of a grid and the last registers of a multiprocessor waste comes in small pieces.
constexpr int kHeadWarps = 2, kHeadThreads = kHeadWarps * kWarp;

/// Heads of a lane under way, at 16 bytes each.
template <typename T>
constexpr int kHeadsAhead = sizeof(T) < 4 ? 4 : 2;
/// Of these, heads that a lane works on at a time: their chains of sums overlap.
constexpr int kTogether = 2;

/// Four neighbours.
template <typename E>
using Quad = cutlass::AlignedArray<E, 4>;

template <typename E>
__device__ __forceinline__ Quad<E> load_quad(const void* base, int64_t at) {
  const E* from = static_cast<const E*>(base) + at;
#ifdef MASKACCEL_EMULATE
  return *reinterpret_cast<const Quad<E>*>(from);
#else
  using Word = std::conditional_t<sizeof(E) == 4, uint4, uint2>;
  union {
    Word word;
    Quad<E> quad;
  };
  word = __ldg(reinterpret_cast<const Word*>(from));
  return quad;
#endif
}

/// The 8 elements of a lane; `apart` is the distance of the second four from the first: 4, or with kHalf half a head.
/// Zeros where they are not `inside`.
template <bool kHalf, typename T>
__device__ __forceinline__ Pack<T> load_head(const T* at, int apart, bool inside) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = T(0.f);
  if (!inside) return out;
  if constexpr (kHalf) {
    reinterpret_cast<Quad<T>*>(&out)[0] = load_quad<T>(at, 0);
    reinterpret_cast<Quad<T>*>(&out)[1] = load_quad<T>(at, apart);
    return out;
  } else {
    return load_words(at);
  }
}

template <bool kHalf, typename T>
__device__ __forceinline__ void store_head(T* at, int apart, bool inside, const Pack<T>& pack) {
  if (!inside) return;
  if constexpr (kHalf) {
    *reinterpret_cast<Quad<T>*>(at) = reinterpret_cast<const Quad<T>*>(&pack)[0];
    *reinterpret_cast<Quad<T>*>(at + apart) = reinterpret_cast<const Quad<T>*>(&pack)[1];
  } else {
    *reinterpret_cast<Pack<T>*>(at) = pack;
  }
}

/// Cos and sin of a lane, by whole vectors: those of all elements, or of pairs.
template <typename E, bool kHalf>
__device__ __forceinline__ Rotation load_quads(const QkParams& p, int64_t cos_at, int64_t sin_at, const LaneMap& m) {
  Rotation r;
  if (p.table_full) {
    const Quad<E> c0 = load_quad<E>(p.cos, cos_at + m.low), c1 = load_quad<E>(p.cos, cos_at + m.high);
    const Quad<E> s0 = load_quad<E>(p.sin, sin_at + m.low), s1 = load_quad<E>(p.sin, sin_at + m.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r.cos[i] = static_cast<float>(c0[i]), r.cos[i + 4] = static_cast<float>(c1[i]);
      r.sin[i] = static_cast<float>(s0[i]), r.sin[i + 4] = static_cast<float>(s1[i]);
    }
  } else {
    const int first = kHalf ? m.low : m.low / 2;
    const Quad<E> c = load_quad<E>(p.cos, cos_at + first), s = load_quad<E>(p.sin, sin_at + first);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      r.cos[i] = static_cast<float>(c[kHalf ? i % 4 : i / 2]);
      r.sin[i] = static_cast<float>(s[kHalf ? i % 4 : i / 2]);
    }
  }
  return r;
}

/// From row `at` of tables whose rows are aligned (`tables_aligned`).
template <typename T, bool kHalf>
__device__ __forceinline__ Rotation load_rotation_vectors(const QkParams& p, int b, int64_t at, const LaneMap& m,
                                                          bool active) {
  Rotation r{zeros(), zeros()};
  if (!active) return r;
  const int64_t cos_at = b * p.cos_b + at * p.cos_s, sin_at = b * p.sin_b + at * p.sin_s;
  if (sizeof(T) == 4 || p.table_wide) return load_quads<float, kHalf>(p, cos_at, sin_at, m);
  return load_quads<T, kHalf>(p, cos_at, sin_at, m);
}

/// Whether `load_rotation_vectors` can read the tables: `size` bytes an element.
inline bool tables_aligned(const QkParams& p, int size) {
  if (p.cos == nullptr) return true;
  const auto rows = [&](const void* data, int64_t b, int64_t s, int64_t t) {
    return reinterpret_cast<uintptr_t>(data) % (4 * size) == 0 && b % 4 == 0 && s % 4 == 0 && t == 1;
  };
  return !p.table_per_head && rows(p.cos, p.cos_b, p.cos_s, p.cos_t) && rows(p.sin, p.sin_b, p.sin_s, p.sin_t);
}

/// What the lanes of a head have in common.
template <typename T, int kLanes, bool kHalf, bool kNarrow>
struct HeadNorm {
  const QkParams& p;
  int norm;
  bool active;    // the lane has elements of a head
  float inv;      // 1 / head dim
  Floats factor;  // weight, plus 1 where the flags ask for it; 1 without a weight

  __device__ __forceinline__ HeadNorm(const QkParams& p_, int norm_, const LaneMap& map)
      : p(p_), norm(norm_), active(map.low < map.end_low), inv(1.f / p_.head_dim) {}

  __device__ __forceinline__ void load_factor(const void* weight, const LaneMap& map) {
    if (weight == nullptr) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) factor[i] = 1.f;
      return;
    }
    const float plus = p.flags & kWeightPlusOne ? 1.f : 0.f;
    const bool round_sum = kNarrow && !p.weight_wide && norm != kNormLayer && plus != 0.f;
    factor = vector(weight, map);
#pragma unroll
    for (int i = 0; i < kVec; ++i) factor[i] = round_if<T>(factor[i] + plus, round_sum);
  }
  __device__ __forceinline__ Floats vector(const void* from, const LaneMap& map) const {
    const int apart = map.high - map.low;
    if (sizeof(T) == 4 || p.weight_wide) {
      return to_floats<float>(load_head<kHalf>(static_cast<const float*>(from) + map.low, apart, active));
    }
    return to_floats<T>(load_head<kHalf>(static_cast<const T*>(from) + map.low, apart, active));
  }
  /// Normalises heads, whose sums go through the lanes together.
  template <int kCount>
  __device__ __forceinline__ void normalise(Floats (&v)[kCount]) const {
    if (norm == kNormNone) return;
    float sum[kCount];
    if (norm == kNormLayer) {
#pragma unroll
      for (int t = 0; t < kCount; ++t) sum[t] = sum_of(v[t]);
      over_lanes(sum);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        const float centre = active ? sum[t] * inv : 0.f;  // lanes without elements keep their zeros
#pragma unroll
        for (int i = 0; i < kVec; ++i) v[t][i] -= centre;
      }
    }
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      sum[t] = 0.f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[t] += v[t][i] * v[t][i];
    }
    over_lanes(sum);
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const float rstd = inverse_sqrt(sum[t] * inv + p.eps);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[t][i] *= rstd;
    }
  }
  template <int kCount>
  __device__ __forceinline__ void over_lanes(float (&sum)[kCount]) const {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int t = 0; t < kCount; ++t) sum[t] += shuffle_xor(sum[t], mask);
    }
  }
  /// Weight and bias, with the roundings of `affine_values`.
  __device__ __forceinline__ void affine(const void* bias, const LaneMap& map, Floats& v) const {
    const bool late = kNarrow && norm != kNormLayer;  // LayerNorm applies its affine before it rounds
    round_all<T>(v, late);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] *= factor[i];
    round_all<T>(v, late);
    if (bias != nullptr) {
      const Floats b = vector(bias, map);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] += b[i];
      round_all<T>(v, late);
    }
    round_all<T>(v, kNarrow && !late);
  }
};

template <typename T, int kLanes, bool kHalf, bool kNarrow>
__global__ void __launch_bounds__(kHeadThreads, 10) qk_heads_kernel(const __grid_constant__ QkParams p) {
  constexpr int kAhead = kHeadsAhead<T>, kBeside = kWarp / kLanes;
  const QkSide& side = p.side[blockIdx.y];
  const int row = static_cast<int>(blockIdx.x) * kHeadWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= p.batch * side.tokens) return;  // whole warps
  const int lane = threadIdx.x % kWarp;
  const LaneMap map = LaneMap::of(p, lane % kLanes);
  const int apart = map.high - map.low, dim = p.head_dim, heads = side.heads;
  HeadNorm<T, kLanes, kHalf, kNarrow> norm(p, p.flags & kNormMask, map);
  const int b = row / side.tokens, s = row % side.tokens;

  int h = lane / kLanes;  // the head whose turn it is
  const int64_t step = kBeside * side.stride_h;
  const T* in = static_cast<const T*>(side.in) + b * side.stride_b + s * side.stride_s + h * side.stride_h + map.low;
  T* out = static_cast<T*>(side.out) + (int64_t{row} * heads + h) * dim + map.low;
  Pack<T> ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    ahead[i] = load_head<kHalf>(in + i * step, apart, norm.active && h + i * kBeside < heads);
  }
  in += kAhead * step;

  norm.load_factor(side.weight, map);
  Rotation rotation;
  if (p.cos != nullptr) {
    const int64_t at = p.positions != nullptr ? p.positions[b * p.positions_b + s] : s;
    rotation = load_rotation_vectors<T, kHalf>(p, b, at, map, norm.active);
  }
  for (int h0 = 0; h0 < heads; h0 += kAhead * kBeside) {  // the same trip count for all lanes: they reduce together
#pragma unroll
    for (int i = 0; i < kAhead; i += kTogether) {
      if (h0 + i * kBeside >= heads) break;
      Floats v[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        v[t] = to_floats<T>(ahead[i + t]);
        ahead[i + t] = load_head<kHalf>(in + t * step, apart, norm.active && h + (t + kAhead) * kBeside < heads);
      }
      in += kTogether * step;
      norm.normalise(v);
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        norm.affine(side.bias, map, v[t]);
        if (p.cos != nullptr) rotate(v[t], rotation, kHalf, false);
        store_head<kHalf>(out + t * kBeside * dim, apart, norm.active && h + t * kBeside < heads, to_pack<T>(v[t]));
      }
      out += kTogether * kBeside * dim;
      h += kTogether * kBeside;
    }
  }
}

/// Runs `run` with the kernel's template arguments as tags.
template <typename T, typename F>
void by_heads(const QkParams& p, F&& run) {
  const auto lanes = [&](auto half, auto narrow) {
    if (p.lanes == 8) return run(std::integral_constant<int, 8>{}, half, narrow);
    run(std::integral_constant<int, 16>{}, half, narrow);
  };
  const auto law = [&](auto half) {
    if constexpr (sizeof(T) < 4) {
      if (p.flags & kNarrow) return lanes(half, std::true_type{});
    }
    lanes(half, std::false_type{});
  };
  return p.cos != nullptr && p.flags & kRopeHalf ? law(std::true_type{}) : law(std::false_type{});
}

}  // namespace maskaccel::cuda
