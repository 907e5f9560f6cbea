// K and V rows into a cache by row id, with QK norm and RoPE on the way, in one pass over q, k and v.
//
// The lanes of a head are those of qk_norm_rope. Each row has three CTAs, one each for q, k and v, that take
// neighbouring rows in turns. Of rows with the same id the last is written: a small kernel first notes the largest row
// number of each id (a maximum of integers has no order), and the others are left out.
#pragma once

#include "../adaln/cuda_qk.cuh"
#include "cuda_rows.cuh"
#include "flags.h"

namespace maskaccel::cuda {

// ------------------------------------------------------------------------------------------------------------------
// fp8
/// The bits of |v| or v as e4m3fn, rounded to nearest even; v is at most 448 in magnitude, or a NaN.
__device__ __forceinline__ uint32_t to_fp8(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7fu;
  float magnitude;
  memcpy(&magnitude, &size, sizeof magnitude);
  // Below 2^-6 in steps of 2^-9, where the sum has its last bit; else three bits of the mantissa, whose carry goes on.
  constexpr float kSteps = 16384.f;  // 2^23 * 2^-9
  if (magnitude < 0x1p-6f) {
    const float moved = magnitude + kSteps;
    memcpy(&bits, &moved, sizeof bits);
    return sign | (bits & 0xfu);
  }
  return sign | ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
}

__device__ __forceinline__ float of_fp8(uint32_t bits) {
  const uint32_t wide = (bits & 0x7fu) << 20;  // the exponent of a float that is 2^120 smaller
  float v;
  memcpy(&v, &wide, sizeof v);
  v *= 0x1p120f;
  if ((bits & 0x7fu) == 0x7fu) v = NAN;
  return bits & 0x80u ? -v : v;
}

/// |v| as an integer that orders as magnitudes do, a NaN above all.
__device__ __forceinline__ uint32_t magnitude_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits & 0x7fffffffu;
}

__device__ __forceinline__ uint32_t warp_largest(uint32_t v, int width) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    if (mask >= width) continue;
    const uint32_t other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

/// The scale of a row and head, and quotients by it as a division rounds them, at three instructions each.
struct Fp8Scale {
  float scale, lifted, inverse, lift;

  static __device__ __forceinline__ Fp8Scale of(uint32_t largest) {
    Fp8Scale s;
    float most;
    memcpy(&most, &largest, sizeof most);
    s.scale = most == 0.f ? 1.f : most / kFp8Most;
    s.lift = s.scale < 0x1p-100f ? 0x1p100f : 1.f;  // the inverse of the least numbers is none
    s.lifted = s.scale * s.lift;
    s.inverse = 1.f / s.lifted;
    if (s.scale == INFINITY) s.lifted = 0.f;  // nothing remains of x / inf
    return s;
  }
  __device__ __forceinline__ float divided(float v) const {
    v *= lift;
    const float first = v * inverse, second = fmaf(fmaf(-first, lifted, v), inverse, first);
    const float exact = copysignf(second, v);  // -0 / x is -0
    return exact > kFp8Most ? kFp8Most : (exact < -kFp8Most ? -kFp8Most : exact);
  }
};

// -----------------------------------------------------------------------------------------------------------------
// rows
enum KvWhich : int { kQ = 0, kK = 1, kV = 2 };

struct KvSide {
  const void* in = nullptr;
  int64_t in_b = 0, in_s = 0, in_h = 0;
  void* out = nullptr;
  int64_t out_b = 0, out_s = 0, out_h = 0;
  float* scale = nullptr;  // (B, S, H) of an fp8 cache
  const void* weight = nullptr;
  int heads = 0;
  bool vec = false, out_vec = false, weight_vec = false;
  bool norm = false, rope = false;
};

struct KvParams {
  QkParams qk;  // head dim, lanes, flags, tables; `positions` null: the ids
  KvSide side[3];
  Index ids;
  const int* last = nullptr;  // (B|1, S) 1 + the largest row number of each id; null: ids are no two alike
  int first_side = 0;
  int64_t total = 0;  // B * M
  int slots = 0, table_rows = 1;
};

struct LastRowParams {
  Index ids;
  int64_t total = 0;  // ids
  int slots = 0;
  int* last = nullptr;
};

__device__ __forceinline__ void raise_to(int* place, int value) {
#ifdef MASKACCEL_EMULATE
  *place = *place > value ? *place : value;
#else
  atomicMax(place, value);
#endif
}

/// `last` holds zeros before.
static __global__ void __launch_bounds__(kRowThreads) last_rows_kernel(const __grid_constant__ LastRowParams p) {
  const int64_t at = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (at >= p.total) return;
  const int id = p.ids.data[at];
  if (id >= 0 && id < p.slots)
    raise_to(p.last + at / p.ids.count * p.slots + id, static_cast<int>(at % p.ids.count) + 1);
}

/// Where row m of sample b goes, and the row of the tables that it reads. A negative place: nowhere.
struct KvPlace {
  int64_t out;
  int slot;
  int64_t table;
};

__device__ __forceinline__ KvPlace place_of(const KvParams& p, int which, int b, int m) {
  const int id = p.ids.at(b, m);
  int64_t table = p.qk.positions != nullptr ? p.qk.positions[b * p.qk.positions_b + m] : id;
  table = table < 0 ? 0 : (table < p.table_rows ? table : p.table_rows - 1);
  if (which == kQ) return KvPlace{m, m, table};
  const bool inside = id >= 0 && id < p.slots;
  const int64_t first = p.ids.stride_b > 0 ? int64_t(b) * p.slots : 0;
  const bool mine = inside && (p.last == nullptr || p.last[first + id] == m + 1);
  return KvPlace{id, mine ? id : -1, table};
}

__device__ __forceinline__ LaneMap kv_lane(const KvParams& p, const KvSide& side, int j) {
  if (side.rope) return LaneMap::of(p.qk, j);
  return LaneMap{j * 8, j * 8 + 4, p.qk.head_dim, p.qk.head_dim};
}

__device__ __forceinline__ void store_fp8(uint8_t* head, const LaneMap& m, bool vec, bool active, const Floats& v,
                                          const Fp8Scale& scale) {
  using Bytes = cutlass::AlignedArray<uint8_t, 4>;
  Bytes low, high;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low[i] = static_cast<uint8_t>(to_fp8(scale.divided(v[i])));
    high[i] = static_cast<uint8_t>(to_fp8(scale.divided(v[i + 4])));
  }
  if (vec) {
    if (!active || m.low >= m.end_low) return;
    *reinterpret_cast<Bytes*>(head + m.low) = low;
    *reinterpret_cast<Bytes*>(head + m.high) = high;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (active && m.valid(i)) head[m.element(i)] = i < 4 ? low[i % 4] : high[i % 4];
  }
}

/// Largest magnitude of the valid elements of a lane.
__device__ __forceinline__ uint32_t largest_of(const Floats& v) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const uint32_t bits = magnitude_bits(v[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

/// Norm per head, heads of at most 256 elements: as qk_head_kernel.
template <typename T>
__global__ void __launch_bounds__(kQkThreads, 4) kv_head_kernel(const __grid_constant__ KvParams p) {
  const int which = p.first_side + blockIdx.y;
  const KvSide& side = p.side[which];
  const int lanes = p.qk.lanes, groups = kQkThreads / lanes, j = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int norm = side.norm ? p.qk.flags & kNormMask : int(kNormNone);
  const bool layer = norm == kNormLayer, half = p.qk.half();
  const Law law = qk_law(p.qk, sizeof(T) < 4);
  const float plus = p.qk.flags & kWeightPlusOne ? 1.f : 0.f, inv = 1.f / p.qk.head_dim;
  const LaneMap map = kv_lane(p, side, j);
  const bool lane_active = map.low < map.end_low;
  const int64_t begin = blockIdx.x * p.qk.run, end = begin + p.qk.run < p.total ? begin + p.qk.run : p.total;
  Floats w = zeros();
  if (side.weight != nullptr) w = load_weight<T>(p.qk, side.weight, 0, map, side.weight_vec, lane_active);

  for (int64_t row = begin; row < end; ++row) {
    const int b = static_cast<int>(row / p.ids.count), m = static_cast<int>(row % p.ids.count);
    const KvPlace place = place_of(p, which, b, m);
    if (place.slot < 0) continue;  // the whole CTA
    const T* in = static_cast<const T*>(side.in) + b * side.in_b + m * side.in_s;
    Rotation rotation{zeros(), zeros()};
    if (side.rope) rotation = load_rotation_at<T>(p.qk, b, place.table, 0, map, lane_active);
    Pack<T> next = load_lane(in + group * side.in_h, map, side.vec, lane_active && group < side.heads);
    for (int h0 = 0; h0 < side.heads; h0 += groups) {  // the same trip count for all lanes: they reduce together
      const int h = h0 + group;
      const bool active = lane_active && h < side.heads;
      Floats v = to_floats<T>(next);
      if (h0 + groups < side.heads) {
        next = load_lane(in + (h + groups) * side.in_h, map, side.vec, lane_active && h + groups < side.heads);
      }
      if (side.norm) {
        Stats stats{0.f, 1.f};
        if (norm != kNormNone) {
          if (layer) stats.mean = warp_sum(sum_of(v), lanes) * inv;
          stats.rstd = inverse_sqrt(warp_sum(square_sum(v, map, stats.mean, active), lanes) * inv + p.qk.eps);
        }
        normalise_lane(v, map, stats, active);
        affine_values<T>(side.weight != nullptr, w, false, zeros(), plus, layer, law, v);
      }
      if (side.rope) rotate(v, rotation, half, false);
      const Pack<T> pack = to_pack<T>(v);
      const int64_t at = b * side.out_b + place.out * side.out_s + h * side.out_h;
      if (side.scale == nullptr) {
        store_lane(static_cast<T*>(side.out) + at, map, side.out_vec, active, pack);
        continue;
      }
      v = to_floats<T>(pack);  // the cache takes what a plain one would hold
      const auto scale = Fp8Scale::of(warp_largest(largest_of(v), lanes));
      store_fp8(static_cast<uint8_t*>(side.out) + at, map, side.out_vec, active, v, scale);
      if (active && j == 0) side.scale[(int64_t(b) * p.slots + place.out) * side.heads + h] = scale.scale;
    }
  }
}

/// Norms across heads, and heads of any length: a CTA takes a row, and reads it again for each pass.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) kv_any_kernel(const __grid_constant__ KvParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const int which = p.first_side + blockIdx.y;
  const KvSide& side = p.side[which];
  const bool across = p.qk.flags & kAcrossHeads, half = p.qk.half();
  const int norm = side.norm ? p.qk.flags & kNormMask : int(kNormNone);
  const bool layer = norm == kNormLayer;
  const Law law = qk_law(p.qk, sizeof(T) < 4);
  const float plus = p.qk.flags & kWeightPlusOne ? 1.f : 0.f;
  const float inv = 1.f / (float(p.qk.head_dim) * (across ? side.heads : 1));
  const int vectors = (p.qk.head_dim + kVec - 1) / kVec, lanes = p.qk.lanes;
  const int j = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kRowThreads / lanes;
  const int64_t row = blockIdx.x;
  const int b = static_cast<int>(row / p.ids.count), m = static_cast<int>(row % p.ids.count);
  const KvPlace place = place_of(p, which, b, m);
  if (place.slot < 0) return;  // the whole CTA
  const T* in = static_cast<const T*>(side.in) + b * side.in_b + m * side.in_s;
  const auto load = [&](int h, const LaneMap& map) {
    return to_floats<T>(load_lane(in + h * side.in_h, map, side.vec, h < side.heads));
  };
  // f(values, map) of what this thread has of head h.
  const auto walk = [&](int h, auto&& f) {
    for (int at = j; at < vectors; at += lanes) {
      const LaneMap map = kv_lane(p, side, at);
      f(load(h, map), map);
    }
  };
  const auto head_sum = [&](int h, bool squares, float mean) {
    float sum = 0.f;
    walk(h, [&](const Floats& v, const LaneMap& map) {
      sum += squares ? square_sum(v, map, mean, h < side.heads) : sum_of(v);
    });
    return sum;
  };
  const auto row_sum = [&](bool squares, float mean) {
    float sum = 0.f;
    for (int h = group; h < side.heads; h += groups) sum += head_sum(h, squares, mean);
    return reduce.sum(sum);
  };
  Stats stats{0.f, 1.f};
  if (across && norm != kNormNone) {
    if (layer) stats.mean = row_sum(false, 0.f) * inv;
    stats.rstd = inverse_sqrt(row_sum(true, stats.mean) * inv + p.qk.eps);
  }
  for (int h0 = 0; h0 < side.heads; h0 += groups) {
    const int h = h0 + group;
    const bool active = h < side.heads;
    if (!across && norm != kNormNone) {
      if (layer) stats.mean = warp_sum(head_sum(h, false, 0.f), lanes) * inv;
      stats.rstd = inverse_sqrt(warp_sum(head_sum(h, true, stats.mean), lanes) * inv + p.qk.eps);
    }
    const auto finish = [&](Floats v, const LaneMap& map) {
      if (side.norm) {
        normalise_lane(v, map, stats, active);
        Floats w = zeros();
        if (side.weight != nullptr) {
          const int64_t at = across ? int64_t(h) * p.qk.head_dim : 0;
          w = load_weight<T>(p.qk, side.weight, at, map, side.weight_vec, active);
        }
        affine_values<T>(side.weight != nullptr, w, false, zeros(), plus, layer, law, v);
      }
      if (side.rope) rotate(v, load_rotation_at<T>(p.qk, b, place.table, h, map, active), half, false);
      return to_pack<T>(v);
    };
    const int64_t at = b * side.out_b + place.out * side.out_s + h * side.out_h;
    Fp8Scale scale{};
    if (side.scale != nullptr) {
      uint32_t largest = 0;
      walk(h, [&](const Floats& v, const LaneMap& map) {
        const uint32_t mine = largest_of(to_floats<T>(finish(v, map)));
        largest = mine > largest ? mine : largest;
      });
      scale = Fp8Scale::of(warp_largest(largest, lanes));
      if (active && j == 0) side.scale[(int64_t(b) * p.slots + place.out) * side.heads + h] = scale.scale;
    }
    walk(h, [&](const Floats& v, const LaneMap& map) {
      const Pack<T> pack = finish(v, map);
      if (side.scale == nullptr) {
        store_lane(static_cast<T*>(side.out) + at, map, side.out_vec, active, pack);
      } else {
        store_fp8(static_cast<uint8_t*>(side.out) + at, map, side.out_vec, active, to_floats<T>(pack), scale);
      }
    });
  }
}

struct ReadKvParams {
  const uint8_t* cache = nullptr;
  const float* scale = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;
  void* out = nullptr;
  int64_t total = 0;  // B * S * H
  int slots = 0, heads = 0, head_dim = 0, lanes = 1;
  bool vec = false, out_vec = false;
};

/// An fp8 cache as real numbers: a group of lanes takes a head of a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) read_kv_kernel(const __grid_constant__ ReadKvParams p) {
  using Bytes = cutlass::AlignedArray<uint8_t, kVec, 8>;
  const int64_t row = int64_t(blockIdx.x) * (kRowThreads / p.lanes) + threadIdx.x / p.lanes;
  if (row >= p.total) return;
  const int h = static_cast<int>(row % p.heads);
  const int64_t token = row / p.heads;
  const uint8_t* in = p.cache + token / p.slots * p.stride_b + token % p.slots * p.stride_s + h * p.stride_h;
  const float scale = p.scale[row];
  for (int d = threadIdx.x % p.lanes * kVec; d < p.head_dim; d += p.lanes * kVec) {
    Bytes bytes;
    if (p.vec) {
      bytes = *reinterpret_cast<const Bytes*>(in + d);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) bytes[i] = d + i < p.head_dim ? in[d + i] : uint8_t{0};
    }
    Floats v;
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = of_fp8(bytes[i]) * scale;
    store_pack(static_cast<T*>(p.out) + row * p.head_dim, d, p.head_dim, p.out_vec, to_pack<T>(v));
  }
}

}  // namespace maskaccel::cuda
