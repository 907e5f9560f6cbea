// Cached-feature ops: the relative change of a tensor, and a weighted sum of remembered ones.
#pragma once

#include "../common/cuda_common.cuh"

namespace maskaccel::cuda {

struct DifferenceParams {
  const void *x = nullptr, *reference = nullptr, *base = nullptr;
  int64_t count = 0;      // elements of a sample
  int64_t per_chunk = 0;  // elements of a CTA, a multiple of 8
  int chunks = 1;
  bool vec = false;
  float* partial = nullptr;  // (B, chunks, 2)
  float* out = nullptr;      // (B, 2)
};

/// Elements [d, d + 8) of a long run, masked by an end that may pass 2^31.
template <typename T>
__device__ __forceinline__ Floats load_run(const T* from, int64_t at, int64_t end, bool vec) {
  const int left = end - at < kVec ? static_cast<int>(end - at) : kVec;
  return to_floats<T>(load_pack(from + at, 0, left, vec && left == kVec));
}

template <typename T>
__global__ void __launch_bounds__(256) difference_kernel(const __grid_constant__ DifferenceParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const int64_t sample = int64_t(blockIdx.x) * p.count, begin = blockIdx.y * p.per_chunk;
  const int64_t end = begin + p.per_chunk < p.count ? begin + p.per_chunk : p.count;
  const T* x = static_cast<const T*>(p.x) + sample;
  const T* reference = static_cast<const T*>(p.reference) + sample;
  const T* base = p.base != nullptr ? static_cast<const T*>(p.base) + sample : nullptr;
  float change = 0.f, size = 0.f;
#pragma unroll 2
  for (int64_t at = begin + threadIdx.x * kVec; at < end; at += blockDim.x * kVec) {
    Floats v = load_run(x, at, end, p.vec);
    const Floats r = load_run(reference, at, end, p.vec);
    const Floats o = base != nullptr ? load_run(base, at, end, p.vec) : zeros();
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      change += fabsf(v[i] - o[i] - r[i]);
      size += fabsf(r[i]);
    }
  }
  const Two sums = reduce.sum(change, size);
  if (threadIdx.x == 0) {
    float* out = p.partial + (int64_t(blockIdx.x) * p.chunks + blockIdx.y) * 2;
    out[0] = sums.a;
    out[1] = sums.b;
  }
}

static __global__ void __launch_bounds__(256) difference_sum_kernel(const __grid_constant__ DifferenceParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  float change = 0.f, size = 0.f;
  const float* in = p.partial + int64_t(blockIdx.x) * p.chunks * 2;
  for (int k = threadIdx.x; k < p.chunks; k += blockDim.x) {
    change += in[2 * k];
    size += in[2 * k + 1];
  }
  const Two sums = reduce.sum(change, size);
  if (threadIdx.x == 0) {
    p.out[blockIdx.x * 2] = sums.a;
    p.out[blockIdx.x * 2 + 1] = sums.b;
  }
}

struct HistoryParams {
  const void *history = nullptr, *x = nullptr, *gate = nullptr;
  const float* weights = nullptr;
  void* out = nullptr;
  int64_t history_k = 0, history_b = 0, x_b = 0, x_n = 0, gate_b = 0, gate_g = 0;
  int terms = 0, batch = 0, tokens = 0, width = 0, group = 1;
  int run = 1;               // rows of a CTA
  bool per_channel = false;  // weights are (K, D)
  bool gate_wide = false, history_vec = false, x_vec = false, gate_vec = false, weights_vec = false, out_vec = false;

  bool all_vec() const {
    return out_vec && history_vec && (x == nullptr || x_vec) && (gate == nullptr || gate_vec) && (!per_channel || weights_vec);
  }
};

/// sum += weights[t] * h for elements [d, d + 8) of a row.
template <bool kFast = false>
__device__ __forceinline__ void add_term(const HistoryParams& p, int t, int d, const Floats& h, Floats& sum) {
  if (p.per_channel) {
    const Floats w = to_floats<float>(load_pack(p.weights + int64_t(t) * p.width, d, p.width, kFast || p.weights_vec));
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += w[i] * h[i];
  } else {
    const float w = p.weights[t];
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += w * h[i];
  }
}

/// sum[s] = sum_t weights[t] * history[t] for elements [first + s * step, + 8) of token n of sample b.
/// `kUnroll` entries of the history are loaded together.
template <typename H, int kUnroll, int kSteps>
__device__ __forceinline__ void forecast(const HistoryParams& p, int b, int n, int first, int step, Floats (&sum)[kSteps]) {
  const H* history = static_cast<const H*>(p.history) + b * p.history_b + int64_t(n) * p.width;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) sum[s] = zeros();
#pragma unroll kUnroll
  for (int t = 0; t < p.terms; ++t) {
    Pack<H> h[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) h[s] = load_pack(history + t * p.history_k, first + s * step, p.width, p.history_vec);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) add_term(p, t, first + s * step, to_floats<H>(h[s]), sum[s]);
  }
}

/// x + gate * sum for elements [d, d + 8) of token n of sample b.
template <typename T>
__device__ __forceinline__ Floats gated_sum(const HistoryParams& p, int b, int n, int d, Floats sum) {
  if (p.gate != nullptr) {
    const int64_t at = b * p.gate_b + (n / p.group) * p.gate_g;
    const Floats g = load_operand<T>(p.gate, at, p.gate_wide, d, p.width, p.gate_vec);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] *= g[i];
  }
  if (p.x != nullptr) {
    const T* x = static_cast<const T*>(p.x) + b * p.x_b + n * p.x_n;
    const Floats v = to_floats<T>(load_pack(x, d, p.width, p.x_vec));
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += v[i];
  }
  return sum;
}

/// Stores x + gate * sum for elements [d, d + 8) of token n of sample b.
template <typename T>
__device__ __forceinline__ void store_sum(const HistoryParams& p, int b, int n, int d, const Floats& sum) {
  T* out = static_cast<T*>(p.out) + (int64_t(b) * p.tokens + n) * p.width;
  store_pack(out, d, p.width, p.out_vec, to_pack<T>(gated_sum<T>(p, b, n, d, sum)));
}

constexpr int kColumnThreads = 256;  // of a CTA that walks rows, a vector a thread, at most

/// Combines the rows of this CTA. `value(b, n, row, d)` is the vector of entry `newest`, which is not read from the history.
/// kFast: every operand lies on 16 bytes, so that the loads of several entries are under way together.
template <typename H, typename T, bool kFast, typename Value>
__device__ __forceinline__ void combine_rows(const HistoryParams& p, int newest, Value&& value) {
  constexpr int kTogether = sizeof(H) < 4 ? 4 : 2;
  const int d = (blockIdx.y * blockDim.x + threadIdx.x) * kVec;
  if (d >= p.width) return;
  const int total = p.batch * p.tokens;  // below 2^31: the binding checks
  const int begin = blockIdx.x * p.run, end = total - begin < p.run ? total : begin + p.run;
  Floats gate = zeros();
  int64_t gate_at = -1;
  int b = begin / p.tokens, n = begin % p.tokens;
  for (int row = begin; row < end; ++row) {
    const H* history = static_cast<const H*>(p.history) + b * p.history_b + int64_t(n) * p.width;
    const T* x_row = static_cast<const T*>(p.x) + b * p.x_b + n * p.x_n;
    const Pack<T> x = load_pack(x_row, d, p.x != nullptr ? p.width : 0, kFast || p.x_vec);
    Pack<H> given;
    if (newest >= 0) given = value(b, n, row, d);
    Floats sum = zeros();
    for (int t0 = 0; t0 < p.terms; t0 += kTogether) {
      Pack<H> held[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int t = t0 + i;
        held[i] = given;
        if (t != newest) {
          held[i] = load_pack(history + t * p.history_k, d, t < p.terms ? p.width : 0, kFast || p.history_vec);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (t0 + i < p.terms) add_term<kFast>(p, t0 + i, d, to_floats<H>(held[i]), sum);
      }
    }
    if (p.gate != nullptr) {
      const int64_t at = b * p.gate_b + (p.gate_g != 0 ? n / p.group * p.gate_g : 0);
      if (at != gate_at) gate = load_operand<T>(p.gate, at, p.gate_wide, d, p.width, kFast || p.gate_vec);
      gate_at = at;
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] *= gate[i];
    }
    if (p.x != nullptr) {
      const Floats v = to_floats<T>(x);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += v[i];
    }
    store_pack(static_cast<T*>(p.out) + int64_t(row) * p.width, d, p.width, kFast || p.out_vec, to_pack<T>(sum));
    if (++n == p.tokens) n = 0, ++b;
  }
}

/// H: dtype of the history; T: dtype of x and of the result.
template <typename H, typename T, bool kFast>
__global__ void __launch_bounds__(kColumnThreads, 2) history_kernel(const __grid_constant__ HistoryParams p) {
  combine_rows<H, T, kFast>(p, -1, [](int, int, int, int) { return Pack<H>{}; });
}

}  // namespace maskaccel::cuda
