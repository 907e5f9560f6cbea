// Kept rows and their modulated norm in one read of them.
//
// As in the adaLN forward a row stays in registers, belongs to a warp up to 1024 elements and to a CTA beyond, the next
// row is loaded before this one is reduced, and a plain kernel takes every width and alignment.
#pragma once

#include <algorithm>

#include "../adaln/cuda_forward.cuh"
#include "cuda_rows.cuh"

namespace maskaccel::cuda {

struct GatherModulateParams {
  Common c;  // of x: `tokens` is N
  Activation x;
  Index ids;
  Modulation scale, shift;
  Vector weight, bias;
  void *rows = nullptr, *y = nullptr;
  int64_t total = 0;  // B * K
  bool out_vec = false;
  int run = 1;  // rows of a warp or CTA
};

template <typename T, int kSteps, bool kWholeCta>
__global__ void __launch_bounds__(kWholeCta ? kMaxRowThreads : kWarpRowWarps * kWarp)
    gather_modulate_kernel(const __grid_constant__ GatherModulateParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<kWholeCta> reduce{reduce_buffer};
  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int lane = kWholeCta ? threadIdx.x : threadIdx.x & 31;
  const int group = kWholeCta ? blockIdx.x : blockIdx.x * kWarpRowWarps + threadIdx.x / kWarp;
  const int total = static_cast<int>(p.total), norm = c.flags & kNormMask;
  if (group > (total - 1) / p.run) return;  // whole warps or CTAs: nobody waits for them
  const int begin = group * p.run, end = begin + (total - begin < p.run ? total - begin : p.run);
  const int first = lane * kVec, step = (kWholeCta ? blockDim.x : kWarp) * kVec;

  Pack<T> next[kSteps];
  int next_id = -1;
  const auto fetch = [&](int row) {
    const int b = row / p.ids.count, id = p.ids.at(b, row % p.ids.count);
    next_id = id >= 0 && id < c.tokens ? id : -1;
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + (next_id < 0 ? 0 : next_id) * p.x.stride_n;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) next[s] = load_pack(x, first + s * step, next_id < 0 ? 0 : c.width, true);
  };
  fetch(begin);
  for (int row = begin; row < end; ++row) {
    const int b = row / p.ids.count, id = next_id;
    const int64_t out_row = int64_t(row) * c.width;
    Floats r[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (p.rows != nullptr) store_pack(static_cast<T*>(p.rows) + out_row, first + s * step, c.width, true, next[s]);
      r[s] = to_floats<T>(next[s]);
    }
    if (row + 1 < end) fetch(row + 1);
    if (norm != kNormNone) {
      const Stats stats = row_stats(r, norm == kNormLayer, c.inv_width, c.eps, c.width, first, step, reduce);
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < kVec; ++i) r[s][i] = (r[s][i] - stats.mean) * stats.rstd;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int d = first + s * step;
      if (id >= 0) {
        affine<T, true>(c, p.weight, p.bias, norm == kNormLayer, d, law, r[s]);
        r[s] = modulate<T, true>(c, p.scale, p.shift, b, id, d, law, r[s]);
      }
      store_pack(static_cast<T*>(p.y) + out_row, d, c.width, true, to_pack<T>(id >= 0 ? r[s] : zeros()));
    }
  }
}

/// Any width, any alignment: the same arithmetic, reading the row once per pass.
template <typename T>
__global__ void __launch_bounds__(512) gather_modulate_any_kernel(const __grid_constant__ GatherModulateParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int row = blockIdx.x, b = row / p.ids.count, id = p.ids.at(b, row % p.ids.count);
  const bool inside = id >= 0 && id < c.tokens;
  const int step = blockDim.x * kVec, first = threadIdx.x * kVec, norm = c.flags & kNormMask;
  const int64_t out_row = int64_t(row) * c.width;
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + (inside ? id : 0) * p.x.stride_n;
  const auto stored = [&](int d) { return load_pack(x, d, inside ? c.width : 0, p.x.vec); };
  Stats stats{0.f, 1.f};
  if (norm != kNormNone) {
    stats = stats_of([&](int d) { return to_floats<T>(stored(d)); }, norm == kNormLayer, c.eps, c, first, step, reduce);
  }
  for (int d = first; d < c.width; d += step) {
    const Pack<T> pack = stored(d);
    if (p.rows != nullptr) store_pack(static_cast<T*>(p.rows) + out_row, d, c.width, p.out_vec, pack);
    Floats v = zeros();
    if (inside) {
      v = to_floats<T>(pack);
      for (int i = 0; i < kVec; ++i) v[i] = (v[i] - stats.mean) * stats.rstd;
      affine<T, false>(c, p.weight, p.bias, norm == kNormLayer, d, law, v);
      v = modulate<T, false>(c, p.scale, p.shift, b, id, d, law, v);
    }
    store_pack(static_cast<T*>(p.y) + out_row, d, c.width, p.out_vec, to_pack<T>(v));
  }
}

template <typename T>
void run_gather_modulate(const char* op, GatherModulateParams p, const DeviceInfo& device, Stream stream) {
  const int width = p.c.width;
  if (!p.out_vec || width > kRowSteps * kMaxRowThreads * kVec || !all_aligned(p.x) || !all_aligned(p.scale) ||
      !all_aligned(p.shift) || !all_aligned(p.weight) || !all_aligned(p.bias)) {
    const dim3 grid(static_cast<unsigned>(p.total));
    return launch(op, gather_modulate_any_kernel<T>, grid, row_threads(width, 512), 0, stream, p);
  }
  const int64_t warps = width <= 1024 ? kWarpRowWarps : 1;
  p.run = static_cast<int>(std::clamp<int64_t>(p.total / (int64_t(device.multiprocessors) * 32 * warps), 1, 8));
  const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.total, p.run), warps)));
  if (width <= 1024) {
    return launch(op, gather_modulate_kernel<T, 4, false>, grid, kWarpRowWarps * kWarp, 0, stream, p);
  }
  const int threads = row_threads(static_cast<int>(ceil_div(width, kRowSteps)), kMaxRowThreads);
  launch(op, gather_modulate_kernel<T, kRowSteps, true>, grid, threads, 0, stream, p);
}

}  // namespace maskaccel::cuda
