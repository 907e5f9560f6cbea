// For each source row the destination row of largest cosine similarity. Scores stay in registers.
//
// A CTA holds 128 source rows against 64 destination rows at a time; both come through shared memory in slabs of 64
// bytes, the next slab while this one is used. Products of 16-bit rows are m16n8k16, those of fp32 rows are FMA.
// Lengths are found once by a pass of their own and divide the finished sums, so that 16-bit products are exact. Where
// source rows are few, CTAs share the destination rows. A last kernel joins what they found and forms the similarity of
// the pair that was chosen in fp32, which the sums of matrix instructions are not quite.
#pragma once

#include "../attention/cuda_mma.cuh"
#include "cuda_rows.cuh"

namespace maskaccel::cuda {

constexpr int kMatchThreads = 256;
constexpr int kMatchSources = 128, kMatchTargets = 64;
constexpr int kMatchTile = kMatchSources + kMatchTargets;
constexpr int kSlabBytes = 64, kSlabPitch = 80;  // an odd number of 16-byte chunks: no bank conflicts

/// The destination row of the largest score so far: the sum divided by its length. Ties go to the lowest.
struct Matched {
  float score;
  int at;

  __device__ __forceinline__ void offer(float value, int place) {
    if (value > score || (value == score && place < at)) score = value, at = place;
  }
};

struct MatchParams {
  Activation metric;  // (B, N, C)
  Index source, target;
  float* scale = nullptr;    // (B, N): 1 / length, 0 for zeros
  Matched* found = nullptr;  // (B, sources, splits)
  int* best = nullptr;
  float* similarity = nullptr;
  int tokens = 0, width = 0;
  int splits = 1, per_split = 1;  // tiles of destination rows of a CTA
};

/// A warp takes one row.
template <typename T>
__global__ void __launch_bounds__(kMatchThreads) match_length_kernel(const __grid_constant__ MatchParams p) {
  const int n = blockIdx.x * (kMatchThreads / kWarp) + threadIdx.x / kWarp, b = blockIdx.y;
  if (n >= p.tokens) return;  // whole warps
  const T* row = static_cast<const T*>(p.metric.data) + b * p.metric.stride_b + n * p.metric.stride_n;
  float sum = 0.f;
  for (int d = (threadIdx.x & 31) * kVec; d < p.width; d += kWarp * kVec) {
    const Floats v = to_floats<T>(load_pack(row, d, p.width, p.metric.vec));
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += v[i] * v[i];
  }
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) p.scale[int64_t(b) * p.tokens + n] = sum > 0.f ? 1.f / sqrtf(sum) : 0.f;
}

/// Starts the copies of a slab of the rows named in `ids` (-1: zeros).
template <typename T>
__device__ __forceinline__ void fill_slab(char* slab, const MatchParams& p, const T* metric, const int* ids,
                                          int first) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = kSlabBytes / 16;
#pragma unroll
  for (int i = 0; i < kMatchTile * kChunks / kMatchThreads; ++i) {
    const int load = i * kMatchThreads + threadIdx.x, row = load / kChunks, d = first + load % kChunks * kChunk;
    char* to = slab + row * kSlabPitch + load % kChunks * 16;
    const int id = ids[row];
    const T* from = metric + (id < 0 ? 0 : id) * p.metric.stride_n + d;
    if (p.metric.vec) {
      copy_async(to, from, id >= 0 && d < p.width);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) reinterpret_cast<T*>(to)[e] = id >= 0 && d + e < p.width ? from[e] : T(0.f);
  }
}

/// What a thread sums of a tile: which rows and columns, and the products of a slab.
template <typename T>
struct MatchTile {  // 16 rows of a warp, all 64 columns
  static constexpr int kRows = 2, kColumns = 16;
  float sums[kMatchTargets / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& four : sums) four[0] = four[1] = four[2] = four[3] = 0.f;
  }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kWarp * 16 + (threadIdx.x & 31) / 4 + 8 * i; }
  static __device__ __forceinline__ int column(int j) { return j / 2 * 8 + (threadIdx.x & 3) * 2 + j % 2; }
  __device__ __forceinline__ float value(int i, int j) const { return sums[j / 2][i * 2 + j % 2]; }
  static __device__ __forceinline__ int lanes() { return 4; }  // that share a row

  __device__ __forceinline__ void multiply(const char* slab) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int k = 0; k < kSlabBytes; k += 32) {  // 16 elements
      uint32_t a[4];
      load_matrices<false>(a, slab + (warp * 16 + lane % 16) * kSlabPitch + k + lane / 16 * 16);
#pragma unroll
      for (int tile = 0; tile < kMatchTargets / 8; tile += 2) {
        uint32_t b[4];
        const int at = kMatchSources + tile * 8 + lane % 8 + lane / 16 * 8;
        load_matrices<false>(b, slab + at * kSlabPitch + k + lane / 8 % 2 * 16);
        multiply_add<T>(sums[tile], a, b[0], b[1]);
        multiply_add<T>(sums[tile + 1], a, b[2], b[3]);
      }
    }
  }
};

template <>
struct MatchTile<float> {  // 4 rows by 8 columns
  static constexpr int kRows = 4, kColumns = 8;
  float sums[kRows][kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0.f;
  }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / 8 + 32 * i; }
  static __device__ __forceinline__ int column(int j) { return threadIdx.x % 8 + 8 * j; }
  __device__ __forceinline__ float value(int i, int j) const { return sums[i][j]; }
  static __device__ __forceinline__ int lanes() { return 8; }

  __device__ __forceinline__ void multiply(const char* slab) {
    using Four = cutlass::AlignedArray<float, 4, 16>;
#pragma unroll
    for (int k = 0; k < kSlabBytes; k += 16) {
      Four a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const Four*>(slab + row(i) * kSlabPitch + k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Four b = *reinterpret_cast<const Four*>(slab + (kMatchSources + column(j)) * kSlabPitch + k);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j] += a[i][e] * b[e];
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kMatchThreads) match_tokens_kernel(const __grid_constant__ MatchParams p) {
  __shared__ __align__(16) char slabs[2][kMatchTile * kSlabPitch];
  __shared__ int ids[2][kMatchTile];          // rows of the metric, -1: none
  __shared__ float scales[2][kMatchTargets];  // of the destination rows
  using Tile = MatchTile<T>;
  constexpr int kSlab = kSlabBytes / sizeof(T);
  const int b = blockIdx.z, first_source = blockIdx.x * kMatchSources;
  const int first_tile = blockIdx.y * p.per_split, tiles = (p.target.count + kMatchTargets - 1) / kMatchTargets;
  const int end_tile = first_tile + p.per_split < tiles ? first_tile + p.per_split : tiles;
  const int slabs_of_row = (p.width + kSlab - 1) / kSlab, steps = (end_tile - first_tile) * slabs_of_row;
  const T* metric = static_cast<const T*>(p.metric.data) + b * p.metric.stride_b;
  const float* scale = p.scale + int64_t(b) * p.tokens;
  const auto inside = [&](int id) { return id >= 0 && id < p.tokens ? id : -1; };
  // The ids of a tile go to the buffer of its parity, a step before its first slab is asked for.
  const auto read_ids = [&](int tile) {
    int* to = ids[tile & 1];
    if (threadIdx.x < kMatchSources) {
      const int at = first_source + threadIdx.x;
      to[threadIdx.x] = at < p.source.count ? inside(p.source.at(b, at)) : -1;
    } else if (threadIdx.x < kMatchTile) {
      const int at = tile * kMatchTargets + threadIdx.x - kMatchSources;
      const int id = at < p.target.count ? inside(p.target.at(b, at)) : -1;
      to[threadIdx.x] = id;
      scales[tile & 1][threadIdx.x - kMatchSources] = id < 0 ? 0.f : scale[id];
    }
  };
  const auto fill = [&](int step) {
    const int tile = first_tile + step / slabs_of_row;
    fill_slab(slabs[step & 1], p, metric, ids[tile & 1], step % slabs_of_row * kSlab);
    close_copies();
  };

  Tile sums;
  Matched found[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) found[i] = Matched{-INFINITY, first_tile * kMatchTargets};
  sums.clear();
  read_ids(first_tile);
  sync_threads();
  fill(0);
  for (int step = 0, slab = 0, tile = first_tile; step < steps; ++step) {
    if (slab == 0 && tile + 1 < end_tile) read_ids(tile + 1);
    wait_copies<0>();
    sync_threads();  // this slab is there, the other one is free, and so are the ids of the next tile
    if (step + 1 < steps) fill(step + 1);
    sums.multiply(slabs[step & 1]);
    if (++slab < slabs_of_row) continue;
    slab = 0;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int column = Tile::column(j), at = tile * kMatchTargets + column;
      if (at >= p.target.count) continue;
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) found[i].offer(sums.value(i, j) * scales[tile & 1][column], at);
    }
    sums.clear();
    ++tile;
    sync_threads();  // the ids and scales of this tile are read before those of the tile after the next come
  }
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    for (int mask = Tile::lanes() / 2; mask > 0; mask /= 2) {
      found[i].offer(shuffle_xor(found[i].score, mask), shuffle_xor(found[i].at, mask));
    }
    const int at = first_source + Tile::row(i);
    if (threadIdx.x % Tile::lanes() != 0 || at >= p.source.count) continue;
    const int64_t to = (int64_t(b) * p.source.count + at) * p.splits + blockIdx.y;
    p.found[to] = found[i];
  }
}

/// Joins what the CTAs found of a source row, and forms its similarity anew: a warp for each row.
template <typename T>
__global__ void __launch_bounds__(kMatchThreads) match_similarity_kernel(const __grid_constant__ MatchParams p) {
  const int at = blockIdx.x * (kMatchThreads / kWarp) + threadIdx.x / kWarp, b = blockIdx.y, lane = threadIdx.x & 31;
  if (at >= p.source.count) return;  // whole warps
  const int64_t to = int64_t(b) * p.source.count + at;
  const Matched* parts = p.found + to * p.splits;
  Matched found = parts[lane < p.splits ? lane : 0];
  for (int i = lane + kWarp; i < p.splits; i += kWarp) found.offer(parts[i].score, parts[i].at);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    found.offer(shuffle_xor(found.score, mask), shuffle_xor(found.at, mask));
  const auto row_of = [&](int id) {
    const bool inside = id >= 0 && id < p.tokens;
    return inside ? static_cast<const T*>(p.metric.data) + b * p.metric.stride_b + id * p.metric.stride_n : nullptr;
  };
  const T *source = row_of(p.source.at(b, at)), *target = row_of(p.target.at(b, found.at));
  float product = 0.f, left = 0.f, right = 0.f;
  for (int d = lane * kVec; d < p.width && source != nullptr && target != nullptr; d += kWarp * kVec) {
    const Floats x = to_floats<T>(load_pack(source, d, p.width, p.metric.vec));
    const Floats y = to_floats<T>(load_pack(target, d, p.width, p.metric.vec));
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      product += x[i] * y[i];
      left += x[i] * x[i];
      right += y[i] * y[i];
    }
  }
  product = warp_sum(product);
  left = warp_sum(left);
  right = warp_sum(right);
  if (lane != 0) return;
  p.best[to] = found.at;
  p.similarity[to] = left == 0.f || right == 0.f ? 0.f : product / (sqrtf(left) * sqrtf(right));
}

}  // namespace maskaccel::cuda
