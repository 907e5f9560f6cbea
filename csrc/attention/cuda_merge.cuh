// Two partial results of attention as one, and its gradients; the contract is in maskaccel/ops/attention/schema.py.
#pragma once

#include "cuda_args.h"
#include "cuda_mma.cuh"

namespace maskaccel::cuda {

constexpr int kMergeThreads = 128;

struct MergeParams {
  int batch = 0, tokens = 0, heads = 0, dim = 0;
  int lanes = 1;  // of a row: a power of two, at most a warp
  Rows part[2], dout;
  const float *lse[2] = {nullptr, nullptr}, *dlse = nullptr;  // (B, H, S)
  void* out = nullptr;                                        // contiguous, as the parts
  float* lse_out = nullptr;
  void* dpart[2] = {nullptr, nullptr};
  float* dpart_lse[2] = {nullptr, nullptr};
};

/// The row of a group of lanes, and the share of each part in it.
struct MergedRow {
  int b, token, h, lane;
  bool inside;
  int64_t lse_at;
  float lse, share[2];

  __device__ __forceinline__ explicit MergedRow(const MergeParams& p) {
    const int64_t thread = blockIdx.x * int64_t{kMergeThreads} + threadIdx.x, row = thread / p.lanes;
    lane = static_cast<int>(thread % p.lanes);
    h = static_cast<int>(row % p.heads);
    token = static_cast<int>(row / p.heads % p.tokens);
    b = static_cast<int>(row / p.heads / p.tokens);
    inside = b < p.batch;
    lse_at = inside ? (int64_t{b} * p.heads + h) * p.tokens + token : 0;
    const float first = p.lse[0][lse_at], second = p.lse[1][lse_at];
    const float top = fmaxf(first, second), shift = top == -kInfinity ? 0.f : top;
    const float mass[2] = {expf(first - shift), expf(second - shift)}, total = mass[0] + mass[1];
    lse = shift + logf(total);  // of nothing: log(0)
    for (int i = 0; i < 2; ++i) share[i] = mass[i] == 0.f ? 0.f : mass[i] / total;
  }
  template <typename T>
  __device__ __forceinline__ const T* of(const Rows& r) const {
    return static_cast<const T*>(r.data) + b * r.stride_b + token * r.stride_s + h * r.stride_h;
  }
  /// Elements [d, d + 8) of a part; zeros where it has no share, whatever it holds.
  template <typename T>
  __device__ __forceinline__ Floats read(const MergeParams& p, int i, int d) const {
    if (share[i] == 0.f) return zeros();
    return to_floats<T>(load_pack(of<T>(p.part[i]), d, p.dim, p.part[i].vec));
  }
  template <typename T>
  __device__ __forceinline__ T* result(const MergeParams& p, void* to) const {
    return static_cast<T*>(to) + ((int64_t{b} * p.tokens + token) * p.heads + h) * p.dim;
  }
};

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_attention_kernel(const __grid_constant__ MergeParams p) {
  const MergedRow row(p);
  if (!row.inside) return;
  for (int d = row.lane * kVec; d < p.dim; d += p.lanes * kVec) {
    const Floats a = row.read<T>(p, 0, d), b = row.read<T>(p, 1, d);
    Floats out;
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = row.share[0] * a[i] + row.share[1] * b[i];
    store_pack<T>(row.result<T>(p, p.out), d, p.dim, p.dim % kVec == 0, to_pack<T>(out));
  }
  if (row.lane == 0) p.lse_out[row.lse_at] = row.lse;
}

/// d out_i = w_i dout and d lse_i = w_i (dlse + dout . (out_i - out)), where out_1 - out = w_2 (out_1 - out_2).
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_attention_backward_kernel(const __grid_constant__ MergeParams p) {
  const MergedRow row(p);
  float apart = 0.f;  // dout . (out_1 - out_2)
  if (row.inside) {
    for (int d = row.lane * kVec; d < p.dim; d += p.lanes * kVec) {
      const Floats dout = to_floats<T>(load_pack(row.of<T>(p.dout), d, p.dim, p.dout.vec));
      const Floats a = row.read<T>(p, 0, d), b = row.read<T>(p, 1, d);
#pragma unroll
      for (int i = 0; i < kVec; ++i) apart += dout[i] * (a[i] - b[i]);
      for (int part = 0; part < 2; ++part) {
        Floats grad;
#pragma unroll
        for (int i = 0; i < kVec; ++i) grad[i] = row.share[part] * dout[i];
        store_pack<T>(row.result<T>(p, p.dpart[part]), d, p.dim, p.dim % kVec == 0, to_pack<T>(grad));
      }
    }
  }
  apart = warp_sum(apart, p.lanes);
  if (!row.inside || row.lane != 0) return;
  const float dlse = p.dlse != nullptr ? p.dlse[row.lse_at] : 0.f;
  p.dpart_lse[0][row.lse_at] = row.share[0] == 0.f ? 0.f : row.share[0] * (dlse + row.share[1] * apart);
  p.dpart_lse[1][row.lse_at] = row.share[1] == 0.f ? 0.f : row.share[1] * (dlse - row.share[0] * apart);
}

}  // namespace maskaccel::cuda
