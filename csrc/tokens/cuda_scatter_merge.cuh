// Kept rows among the others, where that takes arithmetic, and the gradients.
//
// What only moves rows is `copy_rows_kernel`. A group of lanes takes one row of the result, so every operand is read
// once. Gradients of what rows share (a gate, the mask token) are sums of a CTA over a chunk of rows in registers;
// `reduce_kernel` of the adaLN ops adds the chunks in a fixed order.
#pragma once

#include "../adaln/cuda_reduce.cuh"
#include "cuda_rows.cuh"
#include "flags.h"

namespace maskaccel::cuda {

struct ScatterMergeParams {
  Merge mode = Merge::replace;
  Index inverse;
  Activation full, rows, gate, pos;
  Vector token;
  bool gate_wide = false, pos_wide = false, token_wide = false, out_vec = false;
  void* out = nullptr;
  int64_t total = 0;  // B * N
  int kept = 0, width = 0, lanes = 1;
  float lam = 0.f;
};

template <typename T>
__device__ __forceinline__ Floats load_at(const Activation& a, bool wide, int b, int n, int d, int width) {
  return load_operand<T>(a.data, b * a.stride_b + n * a.stride_n, wide, d, width, a.vec);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) scatter_merge_kernel(const __grid_constant__ ScatterMergeParams p) {
  const int lane = threadIdx.x % p.lanes;
  const int64_t row = int64_t(blockIdx.x) * (kRowThreads / p.lanes) + threadIdx.x / p.lanes;
  if (row >= p.total) return;
  const int b = static_cast<int>(row) / p.inverse.count, n = static_cast<int>(row) % p.inverse.count;
  const int slot = p.inverse.at(b, n);
  const bool kept = slot >= 0, there = kept && slot < p.kept;
  const bool gated = there && p.mode == Merge::add_gated && p.gate.data != nullptr;
  const float of_full = kept && p.mode == Merge::replace ? 0.f : (kept && p.mode == Merge::blend ? p.lam : 1.f);
  const float of_rows = p.mode == Merge::blend ? 1.f - p.lam : 1.f;
  for (int d = lane * kVec; d < p.width; d += p.lanes * kVec) {
    Floats v = zeros();
    if (there) v = load_at<T>(p.rows, false, b, slot, d, p.width);
    if (gated) {
      const Floats gate = load_at<T>(p.gate, p.gate_wide, b, slot, d, p.width);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] *= gate[i];
    }
    if (p.full.data != nullptr) {
      Floats full = zeros();
      if (of_full != 0.f) full = load_at<T>(p.full, false, b, n, d, p.width);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] = of_full * full[i] + of_rows * v[i];
    }
    if (!kept && p.token.data != nullptr) v = load_operand<T>(p.token.data, 0, p.token_wide, d, p.width, p.token.vec);
    if (p.pos.data != nullptr) {
      const Floats pos = load_at<T>(p.pos, p.pos_wide, b, n, d, p.width);
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[i] += pos[i];
    }
    store_pack(static_cast<T*>(p.out) + row * p.width, d, p.width, p.out_vec, to_pack<T>(v));
  }
}

struct MergeGradParams {
  Activation dout, rows, gate;
  Index ids, inverse;
  bool gate_wide = false, out_vec = false;
  void *dfull = nullptr, *drows = nullptr;
  float* dgate = nullptr;              // of each row
  float* partial = nullptr;            // (B, chunks, D): sums of the gate, or of the mask token
  float of_full = 0.f, of_rows = 1.f;  // what the gradients of a kept token's row count
  int tokens = 0, kept = 0, width = 0, lanes = 1;
  int per_chunk = 1;  // rows of a CTA
};

/// Adds what the groups of a CTA have summed, in their order, into the slot of the CTA.
__device__ __forceinline__ void store_partial(const MergeGradParams& p, const Floats& sum, int d) {
  __shared__ float sums[kVec][kRowThreads];
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[i][threadIdx.x] = sum[i];
  sync_threads();
  if (static_cast<int>(threadIdx.x) >= p.lanes) return;
  float* slot = p.partial + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * p.width;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float total = 0.f;
    for (int at = threadIdx.x; at < kRowThreads; at += p.lanes) total += sums[i][at];
    if (d + i < p.width) slot[d + i] = total;
  }
}

/// Gradients of rows and of their gate: a CTA is a chunk of the kept rows of a sample, and up to 2048 columns.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) merge_rows_grad_kernel(const __grid_constant__ MergeGradParams p) {
  const int b = blockIdx.y, lane = threadIdx.x % p.lanes, groups = kRowThreads / p.lanes;
  const int d = (blockIdx.z * p.lanes + lane) * kVec;
  const int begin = blockIdx.x * p.per_chunk, end = begin + p.per_chunk < p.kept ? begin + p.per_chunk : p.kept;
  Floats sum = zeros();
  for (int k = begin + threadIdx.x / p.lanes; k < end && d < p.width; k += groups) {
    const int id = p.ids.at(b, k);
    Floats grad = zeros();
    if (id >= 0 && id < p.tokens) grad = load_at<T>(p.dout, false, b, id, d, p.width);
    const int64_t row = (int64_t(b) * p.kept + k) * p.width;
    if (p.dgate != nullptr || p.partial != nullptr) {
      const Floats value = load_at<T>(p.rows, false, b, k, d, p.width);
      Floats product;
#pragma unroll
      for (int i = 0; i < kVec; ++i) product[i] = grad[i] * value[i];
      if (p.dgate != nullptr) store_pack(p.dgate + row, d, p.width, p.out_vec, to_pack<float>(product));
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += product[i];
    }
    if (p.drows == nullptr) continue;
    Floats factor;
#pragma unroll
    for (int i = 0; i < kVec; ++i) factor[i] = p.of_rows;
    if (p.gate.data != nullptr) factor = load_at<T>(p.gate, p.gate_wide, b, k, d, p.width);
#pragma unroll
    for (int i = 0; i < kVec; ++i) grad[i] *= factor[i];
    store_pack(static_cast<T*>(p.drows) + row, d, p.width, p.out_vec, to_pack<T>(grad));
  }
  if (p.partial != nullptr) store_partial(p, sum, d);
}

/// Gradients of the tokens and of the mask token: a CTA is a chunk of the tokens of a sample.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) merge_tokens_grad_kernel(const __grid_constant__ MergeGradParams p) {
  const int b = blockIdx.y, lane = threadIdx.x % p.lanes, groups = kRowThreads / p.lanes;
  const int d = (blockIdx.z * p.lanes + lane) * kVec;
  const int begin = blockIdx.x * p.per_chunk, end = begin + p.per_chunk < p.tokens ? begin + p.per_chunk : p.tokens;
  Floats sum = zeros();
  for (int n = begin + threadIdx.x / p.lanes; n < end && d < p.width; n += groups) {
    const bool kept = p.inverse.at(b, n) >= 0;
    const float factor = kept ? p.of_full : 1.f;
    Floats grad = zeros();
    if (factor != 0.f && (p.dfull != nullptr || !kept)) grad = load_at<T>(p.dout, false, b, n, d, p.width);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (!kept) sum[i] += grad[i];
      grad[i] *= factor;
    }
    if (p.dfull != nullptr) {
      T* out = static_cast<T*>(p.dfull) + (int64_t(b) * p.tokens + n) * p.width;
      store_pack(out, d, p.width, p.out_vec, to_pack<T>(grad));
    }
  }
  if (p.partial != nullptr) store_partial(p, sum, d);
}

}  // namespace maskaccel::cuda
