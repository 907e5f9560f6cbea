// Step ops with a norm in the same pass: a forecast and the norm of its sum, or a norm and how far its result moved.
//
// A CTA walks a run of neighbouring tokens of one sample, one row at a time. As in the adaLN forward a fast kernel keeps
// the row in registers, and a plain one takes every width and alignment.
#pragma once

#include "../adaln/cuda_forward.cuh"
#include "../common/types.h"
#include "cuda_steps.cuh"

namespace maskaccel::cuda {

/// Where a row comes from: the history in the dtype of the result, in another, or x with a remembered result beside it.
enum class Source { kSame, kOther, kRemembered };

struct NormedParams {
  Common c;
  HistoryParams history;  // `out` is the sum that the norm reads
  Dtype stored = Dtype::f32;
  Activation x, reference;
  Modulation scale, shift;
  Vector weight, bias;
  void* y = nullptr;
  bool out_vec = false;
  int run = 1, chunks = 1;   // tokens of a CTA, runs of a sample
  float* partial = nullptr;  // (B, chunks, 2)
};

/// x + gate * sum of the history, before it is rounded.
template <typename T, Source kSource, int kSteps>
__device__ __forceinline__ void forecast_row(const NormedParams& p, int b, int n, int first, int step, Floats (&r)[kSteps]) {
  if constexpr (kSource == Source::kSame) {
    forecast<T, 2>(p.history, b, n, first, step, r);
  } else if (p.stored == Dtype::f32) {
    forecast<float, 1>(p.history, b, n, first, step, r);
  } else if (p.stored == Dtype::bf16) {
    forecast<bf16, 1>(p.history, b, n, first, step, r);
  } else {
    forecast<fp16, 1>(p.history, b, n, first, step, r);
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) r[s] = gated_sum<T>(p.history, b, n, first + s * step, r[s]);
}

/// Adds |y - r| and |r| of one vector; `left` elements of it are within the row.
__device__ __forceinline__ void add_moved(const Floats& y, const Floats& r, int left, float& change, float& size) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    change += i < left ? fabsf(y[i] - r[i]) : 0.f;
    size += fabsf(r[i]);
  }
}

template <typename Reduce>
__device__ __forceinline__ void store_moved(const NormedParams& p, float change, float size, Reduce& reduce) {
  const Two sums = reduce.sum(change, size);
  if (threadIdx.x == 0) {
    p.partial[int64_t(blockIdx.x) * 2] = sums.a;
    p.partial[int64_t(blockIdx.x) * 2 + 1] = sums.b;
  }
}

template <typename T, Source kSource>
__global__ void __launch_bounds__(kMaxRowThreads, 1) normed_kernel(const __grid_constant__ NormedParams p) {
  constexpr bool kForecast = kSource != Source::kRemembered;
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int b = blockIdx.x / p.chunks, begin = (blockIdx.x % p.chunks) * p.run;
  const int end = begin + (c.tokens - begin < p.run ? c.tokens - begin : p.run);
  const int first = threadIdx.x * kVec, step = blockDim.x * kVec, norm = c.flags & kNormMask;
  float change = 0.f, size = 0.f;
  for (int n = begin; n < end; ++n) {
    const int64_t out_row = (int64_t(b) * c.tokens + n) * c.width;
    Floats r[kRowSteps];
    Pack<T> remembered[kRowSteps];
    if constexpr (kForecast) {
      forecast_row<T, kSource>(p, b, n, first, step, r);
#pragma unroll
      for (int s = 0; s < kRowSteps; ++s) {
        const Pack<T> stored = to_pack<T>(r[s]);
        store_pack(static_cast<T*>(p.history.out) + out_row, first + s * step, c.width, true, stored);
        r[s] = to_floats<T>(stored);  // the norm sees the sum as stored
      }
    } else {
      const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + n * p.x.stride_n;
      const T* reference = static_cast<const T*>(p.reference.data) + b * p.reference.stride_b + n * p.reference.stride_n;
#pragma unroll
      for (int s = 0; s < kRowSteps; ++s) {
        r[s] = to_floats<T>(load_pack(x, first + s * step, c.width, true));
        remembered[s] = load_pack(reference, first + s * step, c.width, true);
      }
    }
    if (norm != kNormNone) {
      const Stats stats = row_stats(r, norm == kNormLayer, c.inv_width, c.eps, c.width, first, step, reduce);
#pragma unroll
      for (int s = 0; s < kRowSteps; ++s)
#pragma unroll
        for (int i = 0; i < kVec; ++i) r[s][i] *= stats.rstd;
    }
#pragma unroll
    for (int s = 0; s < kRowSteps; ++s) {
      const int d = first + s * step;
      affine<T, true>(c, p.weight, p.bias, norm == kNormLayer, d, law, r[s]);
      const Pack<T> y = to_pack<T>(modulate<T, true>(c, p.scale, p.shift, b, n, d, law, r[s]));
      store_pack(static_cast<T*>(p.y) + out_row, d, c.width, true, y);
      if constexpr (!kForecast) {
        add_moved(to_floats<T>(y), to_floats<T>(remembered[s]), c.width - d, change, size);
      }
    }
  }
  if constexpr (!kForecast) store_moved(p, change, size, reduce);
}

/// Any width, any alignment: the same arithmetic, reading the row once per pass.
template <typename T, Source kSource>
__global__ void __launch_bounds__(512) normed_any_kernel(const __grid_constant__ NormedParams p) {
  constexpr bool kForecast = kSource != Source::kRemembered;
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int b = blockIdx.x / p.chunks, begin = (blockIdx.x % p.chunks) * p.run;
  const int end = begin + (c.tokens - begin < p.run ? c.tokens - begin : p.run);
  const int first = threadIdx.x * kVec, step = blockDim.x * kVec, norm = c.flags & kNormMask;
  float change = 0.f, size = 0.f;
  for (int n = begin; n < end; ++n) {
    const int64_t out_row = (int64_t(b) * c.tokens + n) * c.width;
    const T* row = nullptr;
    if constexpr (kForecast) {
      // A thread reads back only what it wrote, and not through the read-only path: `vec` is false.
      T* h = static_cast<T*>(p.history.out) + out_row;
      for (int d = first; d < c.width; d += step) {
        Floats r[1];
        forecast_row<T, kSource>(p, b, n, d, 0, r);
        store_pack(h, d, c.width, p.out_vec, to_pack<T>(r[0]));
      }
      row = h;
    } else {
      row = static_cast<const T*>(p.x.data) + b * p.x.stride_b + n * p.x.stride_n;
    }
    const bool vec = !kForecast && p.x.vec;
    auto value = [&](int d) { return to_floats<T>(load_pack(row, d, c.width, vec)); };
    Stats stats{0.f, 1.f};
    if (norm != kNormNone) stats = stats_of(value, norm == kNormLayer, c.eps, c, first, step, reduce);
    for (int d = first; d < c.width; d += step) {
      Floats v = value(d);
      for (int i = 0; i < kVec; ++i) v[i] = (v[i] - stats.mean) * stats.rstd;
      affine<T, false>(c, p.weight, p.bias, norm == kNormLayer, d, law, v);
      const Pack<T> y = to_pack<T>(modulate<T, false>(c, p.scale, p.shift, b, n, d, law, v));
      store_pack(static_cast<T*>(p.y) + out_row, d, c.width, p.out_vec, y);
      if constexpr (!kForecast) {
        const T* reference = static_cast<const T*>(p.reference.data) + b * p.reference.stride_b + n * p.reference.stride_n;
        const Floats r = to_floats<T>(load_pack(reference, d, c.width, p.reference.vec));
        add_moved(to_floats<T>(y), r, c.width - d, change, size);
      }
    }
  }
  if constexpr (!kForecast) store_moved(p, change, size, reduce);
}

/// Splits each sample into runs of up to 8 tokens, once about 32 CTAs per multiprocessor have one.
inline void plan_runs(NormedParams& p, const DeviceInfo& device) {
  const int64_t run = p.c.total / (int64_t(device.multiprocessors) * 32);
  p.run = static_cast<int>(run < 1 ? 1 : (run > 8 ? 8 : run));
  p.chunks = static_cast<int>(ceil_div(p.c.tokens, p.run));
}

template <typename T, Source kSource>
void run_normed(const char* op, const NormedParams& p, Stream stream) {
  const HistoryParams& h = p.history;
  const bool rows = kSource == Source::kRemembered
                        ? all_aligned(p.x) && all_aligned(p.reference)
                        : h.history_vec && (h.x == nullptr || h.x_vec) && (h.gate == nullptr || h.gate_vec) &&
                              (!h.per_channel || h.weights_vec);
  const dim3 grid(static_cast<unsigned>(p.c.batch * p.chunks));
  const int width = p.c.width;
  if (rows && p.out_vec && width <= kRowSteps * kMaxRowThreads * kVec && all_aligned(p.scale) && all_aligned(p.shift) &&
      all_aligned(p.weight) && all_aligned(p.bias)) {
    const int threads = row_threads(static_cast<int>(ceil_div(width, kRowSteps)), kMaxRowThreads);
    return launch(op, normed_kernel<T, kSource>, grid, threads, 0, stream, p);
  }
  launch(op, normed_any_kernel<T, kSource>, grid, row_threads(width, 512), 0, stream, p);
}

}  // namespace maskaccel::cuda
