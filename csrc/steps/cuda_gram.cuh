// Inner products of remembered features, in one read of them: fp64 products and sums, no atomics.
//
// The products of a tile of four rows with four rows live in the registers of a warp. With more than four rows a warp of
// the CTA takes each pair of tiles: all of them walk the same elements, which come from memory once and then from L1.
// fp32 would be faster where fp64 units are few, and would lose what the op is for: the small eigenvalues of the matrix.
#pragma once

#include "../common/cuda_common.cuh"

namespace maskaccel::cuda {

constexpr int kGramTile = 4;
constexpr int kMaxGram = 16;

struct GramParams {
  const void* history = nullptr;
  int64_t stride_k = 0, stride_b = 0;
  int64_t count = 0;      // elements of a sample
  int64_t per_chunk = 0;  // elements of a CTA, a multiple of 8
  int chunks = 1, terms = 1, pairs = 1;
  int samples = 1;  // that one result sums over
  bool vec = false;
  double* partial = nullptr;  // (B, chunks, pairs, 16)
  double* out = nullptr;      // (B / samples, K, K)
};

/// The pair of tiles (i, j), i <= j, at place `index` of the upper triangle of `tiles` rows.
__host__ __device__ inline void tile_pair(int index, int tiles, int& i, int& j) {
  i = 0;
  while (index >= tiles - i) index -= tiles - i++;
  j = i + index;
}

/// Elements [at, at + 8) of a run, zeros past its end, which may lie past 2^31.
template <typename T>
__device__ __forceinline__ Pack<T> load_of_run(const T* from, int64_t at, int64_t end, bool vec) {
  const int left = end - at < kVec ? static_cast<int>(end - at) : kVec;
  return load_pack(from + at, 0, left, vec && left == kVec);
}

/// One CTA is one chunk of one sample. Warps: `pairs` times as many slices as fit.
template <typename T>
__global__ void __launch_bounds__(320) gram_kernel(const __grid_constant__ GramParams p) {
  __shared__ double buffer[10][kGramTile * kGramTile];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x & 31, warps = blockDim.x / kWarp;
  const int pair = warp % p.pairs, slice = warp / p.pairs, slices = warps / p.pairs;
  int ti, tj;
  tile_pair(pair, (p.terms + kGramTile - 1) / kGramTile, ti, tj);
  const int64_t begin = blockIdx.y * p.per_chunk;
  const int64_t end = begin + p.per_chunk < p.count ? begin + p.per_chunk : p.count;
  const T* sample = static_cast<const T*>(p.history) + blockIdx.x * p.stride_b;
  double sum[kGramTile][kGramTile] = {};
  for (int64_t at = begin + (slice * kWarp + lane) * kVec; at < end; at += slices * kWarp * kVec) {
    Pack<T> a[kGramTile], b[kGramTile];  // converted one element at a time: fp32 copies would take the registers
#pragma unroll
    for (int i = 0; i < kGramTile; ++i) {
      const int row = ti * kGramTile + i, column = tj * kGramTile + i;
      b[i] = load_of_run(sample + column * p.stride_k, at, column < p.terms ? end : at, p.vec);
      a[i] = b[i];
      if (ti != tj) a[i] = load_of_run(sample + row * p.stride_k, at, end, p.vec);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      double left[kGramTile];
#pragma unroll
      for (int i = 0; i < kGramTile; ++i) left[i] = static_cast<double>(static_cast<float>(a[i][e]));
#pragma unroll
      for (int j = 0; j < kGramTile; ++j) {
        const double right = static_cast<double>(static_cast<float>(b[j][e]));
#pragma unroll
        for (int i = 0; i < kGramTile; ++i) sum[i][j] += left[i] * right;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kGramTile; ++i)
#pragma unroll
    for (int j = 0; j < kGramTile; ++j) {
      const double total = warp_sum(sum[i][j]);
      if (lane == 0) buffer[warp][i * kGramTile + j] = total;
    }
  sync_threads();
  const int per = kGramTile * kGramTile;
  double* out = p.partial + (int64_t(blockIdx.x) * p.chunks + blockIdx.y) * p.pairs * per;
  for (int k = threadIdx.x; k < p.pairs * per; k += blockDim.x) {
    double total = 0.0;
    for (int s = 0; s < slices; ++s) total += buffer[s * p.pairs + k / per][k % per];
    out[k] = total;
  }
}

/// One CTA is one element of the result: its partial sums, added in an order that the shape fixes.
static __global__ void __launch_bounds__(128) gram_sum_kernel(const __grid_constant__ GramParams p) {
  __shared__ double buffer[4];
  const int row = blockIdx.x / p.terms, column = blockIdx.x % p.terms;
  const int i = row < column ? row : column, j = row < column ? column : row;
  const int tiles = (p.terms + kGramTile - 1) / kGramTile, ti = i / kGramTile, tj = j / kGramTile;
  const int pair = ti * tiles - ti * (ti - 1) / 2 + tj - ti, per = kGramTile * kGramTile;
  const int64_t rows = int64_t(p.samples) * p.chunks;
  const double* in = p.partial + blockIdx.y * rows * p.pairs * per + pair * per + i % kGramTile * kGramTile + j % kGramTile;
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < rows; k += blockDim.x) sum += in[k * p.pairs * per];
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) buffer[threadIdx.x / kWarp] = sum;
  sync_threads();
  if (threadIdx.x == 0) p.out[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = buffer[0] + buffer[1] + buffer[2] + buffer[3];
}

}  // namespace maskaccel::cuda
