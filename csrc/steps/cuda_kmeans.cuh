// Clusters of tokens: distances in registers of a tile, means without atomics, representatives.
//
// fp32 on the plain cores: with 16 clusters that keeps pace with memory, the distance may be L1, and no digits are lost
// to |x|^2 - 2 x c + |c|^2.
#pragma once

#include "../common/cuda_common.cuh"

namespace maskaccel::cuda {

constexpr int kTileTokens = 32, kTileClusters = 16, kTileDepth = 64, kTilePitch = kTileDepth + 4;
constexpr int kAssignThreads = 128, kClusterThreads = 256, kMaxClusters = 1024;
constexpr int kL2 = 0, kL1 = 1, kCosine = 2;
constexpr float kFar = 3.402823466e38f;

struct ClusterParams {
  const void* x = nullptr;
  int64_t x_b = 0, x_n = 0;
  int tokens = 0, width = 0, clusters = 0;
  bool x_vec = false, centroids_vec = false;
  const float* start = nullptr;               // (B, k, D) or null: evenly spaced tokens
  float* centroids = nullptr;                 // (B, k, D)
  float *x_scale = nullptr, *scale = nullptr;  // one over the length of each token and centroid; null unless cosine
  int *labels = nullptr, *chosen = nullptr;
  float* distance = nullptr;  // (B, N, k) or null
};

/// One CTA is one centroid.
template <typename T>
__global__ void __launch_bounds__(kClusterThreads) start_kernel(const __grid_constant__ ClusterParams p) {
  const int64_t at = (int64_t(blockIdx.y) * p.clusters + blockIdx.x) * p.width;
  const int64_t token = (2 * int64_t(blockIdx.x) + 1) * p.tokens / (2 * p.clusters);
  const T* row = static_cast<const T*>(p.x) + blockIdx.y * p.x_b + token * p.x_n;
  for (int d = threadIdx.x; d < p.width; d += kClusterThreads) {
    p.centroids[at + d] = p.start != nullptr ? p.start[at + d] : static_cast<float>(row[d]);
  }
}

/// One warp is one row: one over its length, 0 for a row of zeros.
template <typename T>
__device__ __forceinline__ void row_scale(const T* row, int width, bool vec, float* out) {
  const int lane = threadIdx.x & 31;
  float sum = 0.f;
  for (int d = lane * kVec; d < width; d += kWarp * kVec) {
    const Floats v = to_floats<T>(load_pack(row, d, width, vec));
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += v[i] * v[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) *out = sum > 0.f ? 1.f / sqrtf(sum) : 0.f;
}

template <typename T>
__global__ void __launch_bounds__(kClusterThreads) token_scale_kernel(const __grid_constant__ ClusterParams p) {
  const int n = blockIdx.x * (kClusterThreads / kWarp) + threadIdx.x / kWarp;
  if (n >= p.tokens) return;
  const T* row = static_cast<const T*>(p.x) + blockIdx.y * p.x_b + n * p.x_n;
  row_scale(row, p.width, p.x_vec, p.x_scale + int64_t(blockIdx.y) * p.tokens + n);
}

static __global__ void __launch_bounds__(kClusterThreads) centroid_scale_kernel(const __grid_constant__ ClusterParams p) {
  const int c = blockIdx.x * (kClusterThreads / kWarp) + threadIdx.x / kWarp;
  if (c >= p.clusters) return;
  const int64_t at = int64_t(blockIdx.y) * p.clusters + c;
  row_scale(p.centroids + at * p.width, p.width, p.centroids_vec, p.scale + at);
}

using Four = cutlass::AlignedArray<float, 4, 16>;

/// The nearest centroid of 32 tokens. A thread sums 2 tokens by 2 centroids; both come through shared memory in pieces of
/// 64 elements, and the next piece is loaded while this one is used.
template <typename T, int METRIC>
__global__ void __launch_bounds__(kAssignThreads) assign_kernel(const __grid_constant__ ClusterParams p) {
  __shared__ __align__(16) float xs[kTileTokens * kTilePitch];
  __shared__ __align__(16) float cs[kTileClusters * kTilePitch];
  __shared__ float found[kTileTokens][kTileClusters + 1];
  const int tid = threadIdx.x, tr = tid / 8, tc = tid % 8, n0 = blockIdx.x * kTileTokens;
  const int row = tid / 8, column = tid % 8 * kVec;  // of the vectors that the thread loads
  const T* x = static_cast<const T*>(p.x) + blockIdx.y * p.x_b;
  const float* centroids = p.centroids + int64_t(blockIdx.y) * p.clusters * p.width;
  const int64_t samples = int64_t(blockIdx.y) * p.tokens;
  float best = kFar;
  int label = 0;
  const auto clamped = [](int i, int count) { return i < count ? i : count - 1; };
  const T* x0 = x + clamped(n0 + row, p.tokens) * p.x_n;
  const T* x1 = x + clamped(n0 + row + 16, p.tokens) * p.x_n;
  for (int first = 0; first < p.clusters; first += kTileClusters) {
    const float* c0 = centroids + int64_t(clamped(first + row, p.clusters)) * p.width;
    float sum[2][2] = {};
    Pack<T> next0 = load_pack(x0, column, p.width, p.x_vec), next1 = load_pack(x1, column, p.width, p.x_vec);
    Pack<float> next2 = load_pack(c0, column, p.width, p.centroids_vec);
    for (int d = 0; d < p.width; d += kTileDepth) {
      sync_threads();
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        xs[row * kTilePitch + column + i] = static_cast<float>(next0[i]);
        xs[(row + 16) * kTilePitch + column + i] = static_cast<float>(next1[i]);
        cs[row * kTilePitch + column + i] = next2[i];
      }
      sync_threads();
      if (d + kTileDepth < p.width) {
        next0 = load_pack(x0, d + kTileDepth + column, p.width, p.x_vec);
        next1 = load_pack(x1, d + kTileDepth + column, p.width, p.x_vec);
        // Written by an earlier kernel, never by this one.
        next2 = load_pack(c0, d + kTileDepth + column, p.width, p.centroids_vec);
      }
      float part[2][2] = {};  // short sums first: less rounding
#pragma unroll 2
      for (int e = 0; e < kTileDepth; e += 4) {
        Four a[2], c[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = *reinterpret_cast<const Four*>(xs + (tr + 16 * i) * kTilePitch + e);
          c[i] = *reinterpret_cast<const Four*>(cs + (tc + 8 * i) * kTilePitch + e);
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float apart = a[i][q] - c[j][q];
              part[i][j] += METRIC == kCosine ? a[i][q] * c[j][q] : METRIC == kL1 ? fabsf(apart) : apart * apart;
            }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) sum[i][j] += part[i][j];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = n0 + tr + 16 * i, c = first + tc + 8 * j;
        float v = sum[i][j];
        if (n < p.tokens && c < p.clusters) {
          if constexpr (METRIC == kCosine) v = 1.f - v * p.x_scale[samples + n] * p.scale[int64_t(blockIdx.y) * p.clusters + c];
          if (p.distance != nullptr) p.distance[(samples + n) * p.clusters + c] = v;
        }
        found[tr + 16 * i][tc + 8 * j] = v;
      }
    sync_threads();
    if (tid < kTileTokens) {
      for (int c = 0; c < kTileClusters && first + c < p.clusters; ++c) {
        if (found[tid][c] < best) {
          best = found[tid][c];
          label = first + c;
        }
      }
    }
    sync_threads();
  }
  if (tid < kTileTokens && n0 + tid < p.tokens) p.labels[samples + n0 + tid] = label;
}

/// The mean of the tokens of one cluster over 256 channels. The warps take runs of 32 labels; only members are loaded.
template <typename T>
__global__ void __launch_bounds__(kClusterThreads) center_kernel(const __grid_constant__ ClusterParams p) {
  constexpr int kWarps = kClusterThreads / kWarp;
  __shared__ float sums[kWarps][kWarp * kVec];
  __shared__ int counts[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & 31, cluster = blockIdx.y;
  const int from = blockIdx.x * kWarp * kVec, d = from + lane * kVec;
  const int64_t samples = int64_t(blockIdx.z) * p.tokens;
  const T* x = static_cast<const T*>(p.x) + blockIdx.z * p.x_b;
  Floats sum = zeros();
  int count = 0;
  const auto load = [&](int n) { return to_floats<T>(load_pack(x + n * p.x_n, d, p.width, p.x_vec)); };
  const auto weight = [&](int n) { return p.x_scale != nullptr ? p.x_scale[samples + n] : 1.f; };
  for (int start = warp * kWarp; start < p.tokens; start += kWarps * kWarp) {
    const int n = start + lane;
    unsigned members = warp_ballot(n < p.tokens && p.labels[samples + (n < p.tokens ? n : 0)] == cluster);
    count += count_bits(members);
    while (members != 0) {  // two rows are on their way at a time
      const int a = start + lowest_bit(members);
      members &= members - 1;
      const bool two = members != 0;
      const int b = two ? start + lowest_bit(members) : a;
      if (two) members &= members - 1;
      const Floats left = load(a), right = load(b);
      const float wa = weight(a), wb = two ? weight(b) : 0.f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum[i] += wa * left[i];
        if (two) sum[i] += wb * right[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[warp][lane * kVec + i] = sum[i];
  if (lane == 0) counts[warp] = count;
  sync_threads();
  float total = 0.f;
  int members = 0;
  for (int w = 0; w < kWarps; ++w) {
    total += sums[w][threadIdx.x];
    members += counts[w];
  }
  const int at = from + threadIdx.x;
  if (members > 0 && at < p.width) {
    p.centroids[(int64_t(blockIdx.z) * p.clusters + cluster) * p.width + at] = total / static_cast<float>(members);
  }
}

/// The nearest of the candidates that the threads of a CTA hold (-1: none); of equal ones the lowest. All threads get it.
__device__ __forceinline__ int nearest(float distance, int token, float* distances, int* tokens) {
  sync_threads();
  distances[threadIdx.x] = distance;
  tokens[threadIdx.x] = token;
  for (int step = kClusterThreads / 2; step > 0; step /= 2) {
    sync_threads();
    if (threadIdx.x < step) {
      const float other = distances[threadIdx.x + step], mine = distances[threadIdx.x];
      const int that = tokens[threadIdx.x + step], self = tokens[threadIdx.x];
      if (that >= 0 && (self < 0 || other < mine || (other == mine && that < self))) {
        distances[threadIdx.x] = other;
        tokens[threadIdx.x] = that;
      }
    }
  }
  sync_threads();
  return tokens[0];
}

/// One CTA is one cluster: its member nearest to the centroid, -1 if it is empty.
static __global__ void __launch_bounds__(kClusterThreads) member_kernel(const __grid_constant__ ClusterParams p) {
  __shared__ float distances[kClusterThreads];
  __shared__ int tokens[kClusterThreads];
  const int cluster = blockIdx.x;
  const int64_t samples = int64_t(blockIdx.y) * p.tokens;
  float best = kFar;
  int at = -1;
  for (int n = threadIdx.x; n < p.tokens; n += kClusterThreads) {
    if (p.labels[samples + n] != cluster) continue;
    const float v = p.distance[(samples + n) * p.clusters + cluster];
    if (at < 0 || v < best) {
      best = v;
      at = n;
    }
  }
  at = nearest(best, at, distances, tokens);
  if (threadIdx.x == 0) p.chosen[int64_t(blockIdx.y) * p.clusters + cluster] = at;
}

/// One CTA is one sample: for one empty cluster after the other the nearest token that represents none yet.
static __global__ void __launch_bounds__(kClusterThreads) free_kernel(const __grid_constant__ ClusterParams p) {
  __shared__ float distances[kClusterThreads];
  __shared__ int tokens[kClusterThreads], chosen[kMaxClusters];
  const int64_t samples = int64_t(blockIdx.x) * p.tokens;
  int* out = p.chosen + int64_t(blockIdx.x) * p.clusters;
  for (int c = threadIdx.x; c < p.clusters; c += kClusterThreads) chosen[c] = out[c];
  sync_threads();
  for (int cluster = 0; cluster < p.clusters; ++cluster) {
    if (chosen[cluster] >= 0) continue;  // the same for the whole CTA
    float best = kFar;
    int at = -1;
    for (int n = threadIdx.x; n < p.tokens; n += kClusterThreads) {
      const float v = p.distance[(samples + n) * p.clusters + cluster];
      if (at >= 0 && !(v < best)) continue;
      bool taken = false;
      for (int c = 0; c < p.clusters; ++c) taken = taken || chosen[c] == n;
      if (taken) continue;
      best = v;
      at = n;
    }
    at = nearest(best, at, distances, tokens);
    if (threadIdx.x == 0) chosen[cluster] = out[cluster] = at;
    sync_threads();
  }
}

}  // namespace maskaccel::cuda
