// QK norm and rotary embedding, forward and backward: one read and one write of q and k.
//
// Per-head norms with heads of at most 256 elements: 8, 16 or 32 lanes own a head; a CTA walks tokens and keeps the
// token's cos and sin and the weights in registers over its heads. Norms across heads, and longer heads: a CTA owns the
// row. q and k are the y index of one grid. Aligned heads of 40 to 128 elements have faster kernels (`cuda_qk_heads.cuh`).
//
// A lane holds 8 elements that contain whole rotation pairs: 8 neighbours for interleaved pairs, 4 neighbours of each
// half for rotate-half. So a rotation needs no exchange between lanes.
#pragma once

#include "cuda_operands.cuh"

namespace maskaccel::cuda {

struct QkSide {
  const void* in = nullptr;
  const void* grad = nullptr;  // backward: gradient of the result
  void* out = nullptr;         // result, or gradient of `in`; null: not wanted
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;
  int64_t grad_b = 0, grad_s = 0, grad_h = 0;
  const void *weight = nullptr, *bias = nullptr;
  int heads = 0, tokens = 0;
  bool vec = false, grad_vec = false, weight_vec = false, bias_vec = false;
};

struct QkParams {
  QkSide side[2];
  int batch = 0, head_dim = 0, flags = 0;
  float eps = 0;
  const void *cos = nullptr, *sin = nullptr;
  int64_t cos_b = 0, cos_s = 0, cos_h = 0, cos_t = 0, sin_b = 0, sin_s = 0, sin_h = 0, sin_t = 0;
  bool table_wide = false, table_full = false, table_per_head = false, weight_wide = false;
  const int32_t* positions = nullptr;
  int64_t positions_b = 0;
  int lanes = 0;               // lanes of a head (a power of two), or vectors of a head where a CTA owns the row
  int64_t run = 1;             // rows of a CTA
  float* workspace = nullptr;  // backward: (2 sides, CTAs, 2, width) partial sums of weight and bias
  int64_t width = 0;           // elements of a weight

  __device__ __forceinline__ bool half() const { return cos != nullptr && flags & kRopeHalf; }
};

/// Which 8 elements of a head a lane holds.
struct LaneMap {
  int low, high, end_low, end_high;  // elements [low, low + 4) and [high, high + 4), up to their ends

  static __device__ __forceinline__ LaneMap of(const QkParams& p, int j) {
    const int dim = p.head_dim;
    if (p.half()) return LaneMap{j * 4, dim / 2 + j * 4, dim / 2, dim};
    return LaneMap{j * 8, j * 8 + 4, dim, dim};
  }
  __device__ __forceinline__ int element(int i) const { return i < 4 ? low + i : high + i - 4; }
  __device__ __forceinline__ bool valid(int i) const { return i < 4 ? low + i < end_low : high + i - 4 < end_high; }
};

template <typename T>
__device__ __forceinline__ Pack<T> load_lane(const T* head, const LaneMap& m, bool vec, bool active) {
  Pack<T> out;
  if (vec && active && m.low < m.end_low) {
    if (m.high == m.low + 4) return load_words(head + m.low);
    using Half = cutlass::AlignedArray<T, 4>;
    reinterpret_cast<Half*>(&out)[0] = *reinterpret_cast<const Half*>(head + m.low);
    reinterpret_cast<Half*>(&out)[1] = *reinterpret_cast<const Half*>(head + m.high);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = !vec && active && m.valid(i) ? head[m.element(i)] : T(0.f);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_lane(T* head, const LaneMap& m, bool vec, bool active, const Pack<T>& pack) {
  if (!active) return;
  if (vec) {
    if (m.low >= m.end_low) return;
    if (m.high == m.low + 4) {
      *reinterpret_cast<Pack<T>*>(head + m.low) = pack;
      return;
    }
    using Half = cutlass::AlignedArray<T, 4>;
    *reinterpret_cast<Half*>(head + m.low) = reinterpret_cast<const Half*>(&pack)[0];
    *reinterpret_cast<Half*>(head + m.high) = reinterpret_cast<const Half*>(&pack)[1];
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (m.valid(i)) head[m.element(i)] = pack[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ Floats load_weight(const QkParams& p, const void* base, int64_t at, const LaneMap& m, bool vec,
                                              bool active) {
  if (sizeof(T) == 4 || p.weight_wide) {
    return to_floats<float>(load_lane(static_cast<const float*>(base) + at, m, vec, active));
  }
  return to_floats<T>(load_lane(static_cast<const T*>(base) + at, m, vec, active));
}

struct Rotation {
  Floats cos, sin;
};

/// From row `at` of the tables.
template <typename T>
__device__ __forceinline__ Rotation load_rotation_at(const QkParams& p, int b, int64_t at, int h, const LaneMap& m,
                                                     bool active) {
  Rotation r{zeros(), zeros()};
  const int64_t cos_at = b * p.cos_b + at * p.cos_s + h * p.cos_h, sin_at = b * p.sin_b + at * p.sin_s + h * p.sin_h;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (!active || !m.valid(i)) continue;
    const int e = m.element(i);
    const int t = p.table_full ? e : (p.half() ? e - (i < 4 ? 0 : p.head_dim / 2) : e / 2);
    r.cos[i] = load_scalar<T>(p.cos, cos_at + t * p.cos_t, p.table_wide);
    r.sin[i] = load_scalar<T>(p.sin, sin_at + t * p.sin_t, p.table_wide);
  }
  return r;
}

template <typename T>
__device__ __forceinline__ Rotation load_rotation(const QkParams& p, int b, int s, int h, const LaneMap& m, bool active) {
  const int64_t at = p.positions != nullptr ? p.positions[b * p.positions_b + s] : s;
  return load_rotation_at<T>(p, b, at, h, m, active);
}

/// Rotates the pairs, or applies the transpose, which is what gradients need.
__device__ __forceinline__ void rotate(Floats& v, const Rotation& r, bool half, bool transpose) {
  auto pair = [&](int i, int j) {
    const float a = v[i], b = v[j];
    v[i] = transpose ? a * r.cos[i] + b * r.sin[j] : a * r.cos[i] - b * r.sin[i];
    v[j] = transpose ? b * r.cos[j] - a * r.sin[i] : b * r.cos[j] + a * r.sin[j];
  };
  if (half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair(i, i + 4);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair(2 * i, 2 * i + 1);
  }
}

__device__ __forceinline__ Law qk_law(const QkParams& p, bool sixteen_bit) {
  const bool narrow = p.flags & kNarrow && sixteen_bit;
  return Law{narrow, narrow, narrow && !p.weight_wide};
}

__device__ __forceinline__ float sum_of(const Floats& v) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum += v[i];
  return sum;
}

__device__ __forceinline__ float square_sum(const Floats& v, const LaneMap& m, float mean, bool active) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float centred = active && m.valid(i) ? v[i] - mean : 0.f;
    sum += centred * centred;
  }
  return sum;
}

__device__ __forceinline__ void normalise_lane(Floats& v, const LaneMap& m, const Stats& stats, bool active) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = active && m.valid(i) ? (v[i] - stats.mean) * stats.rstd : 0.f;
}

constexpr int kQkThreads = 128;     // of a CTA whose warps split heads
constexpr int kQkRowThreads = 384;  // of a CTA that owns a row, at most: leaves a thread 168 registers, so that none spill
constexpr int kQkRowSteps = 2;

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kQkThreads) qk_head_kernel(const __grid_constant__ QkParams p) {
  const QkSide& side = p.side[blockIdx.y];
  const int lanes = p.lanes, groups = kQkThreads / lanes, j = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int norm = p.flags & kNormMask;
  const bool layer = norm == kNormLayer, half = p.half();
  const Law law = qk_law(p, sizeof(T) < 4);
  const float plus = p.flags & kWeightPlusOne ? 1.f : 0.f, inv = 1.f / p.head_dim;
  const LaneMap map = LaneMap::of(p, j);
  const bool lane_active = map.low < map.end_low;
  const int64_t total = int64_t(p.batch) * side.tokens;
  const int64_t begin = blockIdx.x * p.run, end = begin + p.run < total ? begin + p.run : total;

  Floats w = zeros(), bias = zeros(), dw = zeros(), dbias = zeros();
  if (side.weight != nullptr) w = load_weight<T>(p, side.weight, 0, map, side.weight_vec, lane_active);
  if (side.bias != nullptr) bias = load_weight<T>(p, side.bias, 0, map, side.bias_vec, lane_active);

  for (int64_t row = begin; row < end; ++row) {
    const int b = static_cast<int>(row / side.tokens), s = static_cast<int>(row % side.tokens);
    const T* in = static_cast<const T*>(side.in) + b * side.stride_b + s * side.stride_s;
    const T* grad = nullptr;
    if constexpr (kBackward) grad = static_cast<const T*>(side.grad) + b * side.grad_b + s * side.grad_s;
    Rotation rotation{zeros(), zeros()};
    if (p.cos != nullptr && !p.table_per_head) rotation = load_rotation<T>(p, b, s, 0, map, lane_active);

    Pack<T> next, grad_next;
    auto fetch = [&](int h) {
      const bool active = lane_active && h < side.heads;
      next = load_lane(in + h * side.stride_h, map, side.vec, active);
      if constexpr (kBackward) grad_next = load_lane(grad + h * side.grad_h, map, side.grad_vec, active);
    };
    fetch(group);
    for (int h0 = 0; h0 < side.heads; h0 += groups) {  // the same trip count for all lanes: they reduce together
      const int h = h0 + group;
      const bool active = lane_active && h < side.heads;
      Floats v = to_floats<T>(next), g = zeros();
      if constexpr (kBackward) g = to_floats<T>(grad_next);
      if (h0 + groups < side.heads) fetch(h + groups);
      if (p.cos != nullptr && p.table_per_head) rotation = load_rotation<T>(p, b, s, h, map, active);

      Stats stats{0.f, 1.f};
      if (norm != kNormNone) {
        if (layer) stats.mean = warp_sum(sum_of(v), lanes) * inv;
        stats.rstd = inverse_sqrt(warp_sum(square_sum(v, map, stats.mean, active), lanes) * inv + p.eps);
      }
      normalise_lane(v, map, stats, active);
      T* out = static_cast<T*>(side.out) + (row * side.heads + h) * p.head_dim;
      if constexpr (!kBackward) {
        affine_values<T>(side.weight != nullptr, w, side.bias != nullptr, bias, plus, layer, law, v);
        if (p.cos != nullptr) rotate(v, rotation, half, false);
        store_lane(out, map, side.vec, active, to_pack<T>(v));
      } else {
        if (p.cos != nullptr) rotate(g, rotation, half, true);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          dbias[i] += g[i];
          dw[i] += g[i] * v[i];
          if (side.weight != nullptr) g[i] *= w[i] + plus;
        }
        if (norm != kNormNone) {
          Two sums{0.f, 0.f};
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums.a += g[i], sums.b += g[i] * v[i];
          const float mean = layer ? warp_sum(sums.a, lanes) * inv : 0.f, slope = warp_sum(sums.b, lanes) * inv;
#pragma unroll
          for (int i = 0; i < kVec; ++i) g[i] = stats.rstd * (g[i] - mean - v[i] * slope);
        }
        if (side.out != nullptr) store_lane(out, map, side.vec, active, to_pack<T>(g));
      }
    }
  }

  if constexpr (kBackward) {
    if (p.workspace == nullptr) return;
    __shared__ float partial[2][kVec][kQkThreads];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      partial[0][i][threadIdx.x] = dw[i];
      partial[1][i][threadIdx.x] = dbias[i];
    }
    sync_threads();
    if (group == 0) {
      float* slot = p.workspace + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * p.width;
      for (int which = 0; which < 2; ++which)
        for (int i = 0; i < kVec; ++i) {
          float sum = 0.f;
          for (int other = 0; other < groups; ++other) sum += partial[which][i][other * lanes + j];
          if (map.valid(i)) slot[which * p.width + map.element(i)] = sum;
        }
    }
  }
}

/// A CTA owns a row: all heads of a token (across heads), or one long head (then `lanes` covers it and heads follow as rows).
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kQkRowThreads) qk_row_kernel(const __grid_constant__ QkParams p) {
  constexpr int kSteps = kQkRowSteps;
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const QkSide& side = p.side[blockIdx.y];
  const bool across = p.flags & kAcrossHeads, half = p.half();
  const int row_heads = across ? side.heads : 1, norm = p.flags & kNormMask;
  const bool layer = norm == kNormLayer;
  const Law law = qk_law(p, sizeof(T) < 4);
  const float plus = p.flags & kWeightPlusOne ? 1.f : 0.f, inv = 1.f / (float(p.head_dim) * row_heads);
  const int64_t total = int64_t(p.batch) * side.tokens * (across ? 1 : side.heads);
  const int64_t begin = blockIdx.x * p.run, end = begin + p.run < total ? begin + p.run : total;

  Floats dw[kSteps], dbias[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) dw[s] = dbias[s] = zeros();

  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = across ? row : row / side.heads;
    const int base_head = across ? 0 : static_cast<int>(row % side.heads);
    const int b = static_cast<int>(token / side.tokens), at = static_cast<int>(token % side.tokens);
    const int64_t in_row = b * side.stride_b + at * side.stride_s, grad_row = b * side.grad_b + at * side.grad_s;
    auto head_of = [&](int s) { return (s * int(blockDim.x) + int(threadIdx.x)) / p.lanes; };
    auto map_of = [&](int s) { return LaneMap::of(p, (s * int(blockDim.x) + int(threadIdx.x)) % p.lanes); };
    auto active_of = [&](int s) { return head_of(s) < row_heads; };

    Floats v[kSteps];
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const T* in = static_cast<const T*>(side.in) + in_row + (base_head + head_of(s)) * side.stride_h;
      v[s] = to_floats<T>(load_lane(in, map_of(s), side.vec, active_of(s)));
      sum += sum_of(v[s]);
    }
    Stats stats{0.f, 1.f};
    if (norm != kNormNone) {
      if (layer) stats.mean = reduce.sum(sum) * inv;
      sum = 0.f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) sum += square_sum(v[s], map_of(s), stats.mean, active_of(s));
      stats.rstd = inverse_sqrt(reduce.sum(sum) * inv + p.eps);
    }
    Floats g[kSteps];
    Two sums{0.f, 0.f};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int h = head_of(s);
      const LaneMap map = map_of(s);
      const bool active = active_of(s);
      const int64_t weight_at = int64_t(h) * p.head_dim;
      T* out = static_cast<T*>(side.out) + (token * side.heads + base_head + h) * p.head_dim;
      normalise_lane(v[s], map, stats, active);
      Floats w = zeros();
      if (side.weight != nullptr) w = load_weight<T>(p, side.weight, weight_at, map, side.weight_vec, active);
      Rotation rotation;
      if (p.cos != nullptr) rotation = load_rotation<T>(p, b, at, base_head + h, map, active);
      if constexpr (!kBackward) {
        Floats bias = zeros();
        if (side.bias != nullptr) bias = load_weight<T>(p, side.bias, weight_at, map, side.bias_vec, active);
        affine_values<T>(side.weight != nullptr, w, side.bias != nullptr, bias, plus, layer, law, v[s]);
        if (p.cos != nullptr) rotate(v[s], rotation, half, false);
        store_lane(out, map, side.vec, active, to_pack<T>(v[s]));
      } else {
        const T* grad = static_cast<const T*>(side.grad) + grad_row + (base_head + h) * side.grad_h;
        g[s] = to_floats<T>(load_lane(grad, map, side.grad_vec, active));
        if (p.cos != nullptr) rotate(g[s], rotation, half, true);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          dbias[s][i] += g[s][i];
          dw[s][i] += g[s][i] * v[s][i];
          if (side.weight != nullptr) g[s][i] *= w[i] + plus;
          sums.a += g[s][i];
          sums.b += g[s][i] * v[s][i];
        }
      }
    }
    if constexpr (kBackward) {
      if (norm != kNormNone) {
        sums = reduce.sum(sums.a, sums.b);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const float mean = layer ? sums.a * inv : 0.f, slope = sums.b * inv;
#pragma unroll
          for (int i = 0; i < kVec; ++i) g[s][i] = stats.rstd * (g[s][i] - mean - v[s][i] * slope);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (side.out == nullptr) continue;
        T* out = static_cast<T*>(side.out) + (token * side.heads + base_head + head_of(s)) * p.head_dim;
        store_lane(out, map_of(s), side.vec, active_of(s), to_pack<T>(g[s]));
      }
    }
  }

  if constexpr (kBackward) {
    if (p.workspace == nullptr) return;
    float* slot = p.workspace + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * p.width;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int v = s * int(blockDim.x) + int(threadIdx.x), h = v / p.lanes;
      const LaneMap map = LaneMap::of(p, v % p.lanes);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (h >= row_heads || !map.valid(i)) continue;
        slot[int64_t(h) * p.head_dim + map.element(i)] = dw[s][i];
        slot[p.width + int64_t(h) * p.head_dim + map.element(i)] = dbias[s][i];
      }
    }
  }
}

}  // namespace maskaccel::cuda
