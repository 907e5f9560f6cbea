// Kept rows and their modulated norm in one read of them.
//
// As in the adaLN forward a row belongs to a warp up to 1024 elements and to a CTA beyond, the next rows are on their way to
// shared memory while a row is worked on, scale and shift that a sample shares stay there, and a plain kernel takes every
// width and alignment.
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
  bool keep = false;  // scale and shift are those of the sample and stay in shared memory
  int run = 1;        // rows of a warp or CTA
  int stages = 1;     // rows of the ring
  int own = 0;        // bytes of shared memory that are a thread's own
};

template <typename T, int kSteps, bool kWholeCta>
__global__ void __launch_bounds__(kWholeCta ? kMaxRowThreads : kWarpRowWarps* kWarp, kWholeCta ? 2 : 3)
    gather_modulate_kernel(const __grid_constant__ GatherModulateParams p) {
  using Ring = RowRing<T, kSteps>;
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<kWholeCta> reduce{reduce_buffer};
  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int lane = kWholeCta ? threadIdx.x : threadIdx.x & 31;
  const int group = kWholeCta ? blockIdx.x : blockIdx.x * kWarpRowWarps + threadIdx.x / kWarp;
  const int total = static_cast<int>(p.total), norm = c.flags & kNormMask;
  if (group > (total - 1) / p.run) return;  // whole warps or CTAs: nobody waits for them
  const int begin = group * p.run, end = begin + (total - begin < p.run ? total - begin : p.run);
  const int first = lane * kVec, step = (kWholeCta ? blockDim.x : kWarp) * kVec, width = c.width;
  const auto id_of = [&](int b, int m) {
    const int id = p.ids.at(b, m);
    return id >= 0 && id < c.tokens ? id : -1;
  };

  Ring ring(own_memory(p.own), p.stages);
  char* const kept = ring.first + p.stages * Ring::kStage;  // scale, then shift
  int next = begin, next_b = begin / p.ids.count, next_m = begin % p.ids.count;
  int b = next_b, m = next_m;
  const auto fetch = [&] {
    if (next < end) {
      const int id = id_of(next_b, next_m);
      const T* x = static_cast<const T*>(p.x.data) + next_b * p.x.stride_b + (id < 0 ? 0 : id) * p.x.stride_n;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        const bool inside = id >= 0 && d < width;
        ring.copy(s, inside ? x + d : x, inside);
      }
      ++next;
      if (++next_m == p.ids.count) next_m = 0, ++next_b;
    }
    ring.close();
  };
#pragma unroll 1
  for (int i = 0; i < p.stages; ++i) fetch();

  for (int row = begin; row < end; ++row) {
    if (p.keep && (row == begin || m == 0)) {
      const int64_t scale_at = p.scale.data != nullptr ? modulation_row(c, p.scale, b, 0) : 0;
      const int64_t shift_at = p.shift.data != nullptr ? modulation_row(c, p.shift, b, 0) : 0;
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        if (p.scale.present()) {
          keep_floats(kept + s * kFloatsBytes, scale_factors<T, true>(c, p.scale, scale_at, d, law));
        }
        if (p.shift.present()) {
          keep_floats(kept + (kSteps + s) * kFloatsBytes, modulation_values<T, true>(c, p.shift, shift_at, d, law));
        }
      }
    }
    const int id = id_of(b, m);
    const int64_t out_row = int64_t(row) * width;
    ring.wait();
    Floats r[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const Pack<T> held = ring.read(s);
      if (p.rows != nullptr) store_pack(static_cast<T*>(p.rows) + out_row, first + s * step, width, true, held);
      r[s] = to_floats<T>(held);
    }
    Stats stats{0.f, 1.f};
    if (norm != kNormNone) stats = row_stats(r, norm == kNormLayer, c.inv_width, c.eps, width, first, step, reduce);
    fetch();  // into the place of this row, which this thread has read by now
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int d = first + s * step;
#pragma unroll
      for (int i = 0; i < kVec; ++i) r[s][i] *= stats.rstd;
      if (id >= 0) {
        affine<T, true>(c, p.weight, p.bias, norm == kNormLayer, d, law, r[s]);
        if (p.keep) {
          if (p.scale.present()) {
            const Floats factor = kept_floats(kept + s * kFloatsBytes);
#pragma unroll
            for (int i = 0; i < kVec; ++i) r[s][i] *= factor[i];
            round_all<T>(r[s], law.modulation);
          }
          if (p.shift.present()) {
            const Floats term = kept_floats(kept + (kSteps + s) * kFloatsBytes);
#pragma unroll
            for (int i = 0; i < kVec; ++i) r[s][i] += term[i];
          }
        } else {
          r[s] = modulate<T, true>(c, p.scale, p.shift, b, id, d, law, r[s]);
        }
      }
      store_pack(static_cast<T*>(p.y) + out_row, d, width, true, to_pack<T>(id >= 0 ? r[s] : zeros()));
    }
    if (++m == p.ids.count) m = 0, ++b;
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
  const bool by_warp = width <= kWarpRowSteps * kWarp * kVec;
  const int threads = by_warp ? kWarpRowWarps * kWarp
                              : row_threads(static_cast<int>(ceil_div(width, kRowSteps)), kMaxRowThreads);
  const int steps = by_warp ? kWarpRowSteps : kRowSteps;
  const int64_t groups = by_warp ? kWarpRowWarps : 1;
  const auto by_sample = [&](const Modulation& m) { return m.data == nullptr || m.group == p.c.tokens; };
  const bool shared = by_sample(p.scale) && by_sample(p.shift);
  const RowPlan plan = RowPlan::of(device, ceil_div(p.total, groups), threads, by_warp ? 168 : 80,
                                   int{sizeof(Pack<T>)} * steps, shared ? kFloatsBytes * steps * 2 : 0);
  p.own = plan.own;
  p.run = plan.run;
  p.stages = plan.stages;
  p.keep = shared && plan.keep;
  const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.total, p.run), groups)));
  if (by_warp) return launch(op, gather_modulate_kernel<T, kWarpRowSteps, false>, grid, threads, plan.shared, stream, p);
  launch(op, gather_modulate_kernel<T, kRowSteps, true>, grid, threads, plan.shared, stream, p);
}

}  // namespace maskaccel::cuda
