// A forecast at a step that computed a few rows: where the rows go, means of clusters, and the forecast in one pass.
#pragma once

#include "cuda_steps.cuh"

namespace maskaccel::cuda {

constexpr int kTokenThreads = 256;

struct ScatterParams : HistoryParams {
  void* value = nullptr;        // the newest entry of history
  const void* fresh = nullptr;  // (B, rows, D)
  const int *index = nullptr, *labels = nullptr;
  int* row_of = nullptr;   // (B, N) fresh row that a token takes, -1: none
  int* first = nullptr;    // (B, N) first fresh row of its cluster, -1: none; null: nothing moves
  float* mean = nullptr;   // (B, rows, D), at the first row of each cluster
  int newest = 0, rows = 0;
  float gamma = 0.f;
  bool fresh_vec = false;
};

/// One thread is one token; the indices pass through shared memory. An index outside is of no token and no cluster.
static __global__ void __launch_bounds__(kTokenThreads) token_rows_kernel(const __grid_constant__ ScatterParams p) {
  __shared__ int tokens[kTokenThreads], clusters[kTokenThreads];
  const int n = blockIdx.x * kTokenThreads + threadIdx.x;
  const int* index = p.index + int64_t(blockIdx.y) * p.rows;
  const int* labels = p.first != nullptr ? p.labels + int64_t(blockIdx.y) * p.tokens : nullptr;
  const int mine = labels != nullptr && n < p.tokens ? labels[n] : 0;
  int row = -1, first = -1;
  for (int start = 0; start < p.rows; start += kTokenThreads) {
    const int m = start + threadIdx.x, count = p.rows - start < kTokenThreads ? p.rows - start : kTokenThreads;
    const int token = m < p.rows ? index[m] : -1;
    const bool inside = token >= 0 && token < p.tokens;
    sync_threads();
    tokens[threadIdx.x] = inside ? token : -1;
    clusters[threadIdx.x] = inside && labels != nullptr ? labels[token] : 0;
    sync_threads();
    for (int i = 0; i < count; ++i) {
      if (tokens[i] == n) row = start + i;
      if (first < 0 && tokens[i] >= 0 && clusters[i] == mine) first = start + i;
    }
  }
  if (n < p.tokens) {
    p.row_of[int64_t(blockIdx.y) * p.tokens + n] = row;
    if (labels != nullptr) p.first[int64_t(blockIdx.y) * p.tokens + n] = first;
  }
}

/// One CTA is one fresh row; that of the first row of a cluster adds the others to it, in their order.
template <typename H>
__global__ void __launch_bounds__(kTokenThreads) cluster_mean_kernel(const __grid_constant__ ScatterParams p) {
  __shared__ int members[kTokenThreads];
  const int m = blockIdx.x;
  const int* index = p.index + int64_t(blockIdx.y) * p.rows;
  const int* first = p.first + int64_t(blockIdx.y) * p.tokens;
  const auto leader = [&](int row) {
    const int token = row < p.rows ? index[row] : -1;
    return token >= 0 && token < p.tokens ? first[token] : -1;
  };
  if (leader(m) != m) return;  // the same for the whole CTA
  const int64_t base = int64_t(blockIdx.y) * p.rows;
  const H* fresh = static_cast<const H*>(p.fresh) + base * p.width;
  float* mean = p.mean + (base + m) * p.width;
  for (int from = 0; from < p.width; from += kTokenThreads * kVec) {
    const int d = from + threadIdx.x * kVec;
    Floats sum = zeros();
    int total = 0;
    for (int start = m; start < p.rows; start += kTokenThreads) {
      sync_threads();
      members[threadIdx.x] = leader(start + threadIdx.x) == m ? 1 : 0;
      sync_threads();
      const int count = p.rows - start < kTokenThreads ? p.rows - start : kTokenThreads;
      for (int i = 0; i < count; ++i) {
        if (members[i] == 0) continue;
        ++total;
        const Floats row = to_floats<H>(load_pack(fresh + int64_t(start + i) * p.width, d, p.width, p.fresh_vec));
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[e] += row[e];
      }
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (d + e < p.width) mean[d + e] = sum[e] / static_cast<float>(total);
    }
  }
}

/// As history_kernel; a thread first brings its vector of the newest value up to date.
template <typename H, typename T, bool kFast>
__global__ void __launch_bounds__(kColumnThreads, 2) scatter_kernel(const __grid_constant__ ScatterParams p) {
  combine_rows<H, T, kFast>(p, p.newest, [&](int b, int n, int row, int d) {
    const int64_t samples = int64_t(b) * p.rows;
    const int mine = p.row_of[row], lead = p.first != nullptr ? p.first[row] : -1;
    H* place = static_cast<H*>(p.value) + b * p.history_b + int64_t(n) * p.width;
    Pack<H> value;
    if (mine >= 0) {
      value = load_pack(static_cast<const H*>(p.fresh) + (samples + mine) * p.width, d, p.width, kFast || p.fresh_vec);
    } else if (kFast || p.history_vec) {
      value = *reinterpret_cast<const Pack<H>*>(place + d);  // not through the read-only path: this kernel writes the entry
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) value[i] = d + i < p.width ? place[d + i] : H(0.f);
    }
    if (mine < 0 && lead >= 0) {
      const bool vec = kFast || p.width % kVec == 0;
      const Floats mu = to_floats<float>(load_pack(p.mean + (samples + lead) * p.width, d, p.width, vec));
      Floats moved = to_floats<H>(value);
#pragma unroll
      for (int i = 0; i < kVec; ++i) moved[i] = p.gamma * mu[i] + (1.f - p.gamma) * moved[i];
      value = to_pack<H>(moved);
    }
    if (mine >= 0 || lead >= 0) store_pack(place, d, p.width, kFast || p.history_vec, value);
    return value;
  });
}

}  // namespace maskaccel::cuda
