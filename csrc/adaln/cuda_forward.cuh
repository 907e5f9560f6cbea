// Forward of norm_modulate, gate_residual and gate_residual_norm_modulate: one kernel, three modes.
//
// The fast kernel takes rows of a multiple of 8 elements, up to 6144, whose operands all lie on 16 bytes; a second, plain
// kernel takes everything else. A row stays in registers from load to store. Rows of at most 1024 elements belong to a warp,
// longer ones to a CTA.
// Each warp or CTA walks a run of neighbouring rows, so that scale and shift can stay in registers while the rows
// share them (they are fetched again when their address changes), and loads the next row before it reduces this one.
#pragma once

#include "cuda_operands.cuh"

namespace maskaccel::cuda {

enum Mode : int { kResidual = 1, kNormalise = 2, kBoth = 3 };

struct ForwardParams {
  Common c;
  Activation x, a;
  Modulation gate, scale, shift, scale2, shift2;
  Vector weight, bias, post_weight;
  void *r = nullptr, *y = nullptr, *y2 = nullptr;
  bool out_vec = false;
  int run = 1;  // rows per warp or CTA
};

constexpr int kWarpRowWarps = 4;      // warps of a CTA where each warp has its own rows
constexpr int kRowSteps = 2;          // vectors a thread holds where a CTA shares one row
constexpr int kMaxRowThreads = 384;   // threads of that CTA at most; leaves a thread 168 registers

template <typename T, int kSteps, bool kWholeCta, int kMode>
__global__ void __launch_bounds__(kWholeCta ? kMaxRowThreads : kWarpRowWarps* kWarp)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  constexpr bool kKeep = kWholeCta;  // scale and shift stay in registers between rows
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<kWholeCta> reduce{reduce_buffer};

  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int lane = kWholeCta ? threadIdx.x : threadIdx.x & 31;
  const int row_threads = kWholeCta ? blockDim.x : kWarp;
  const int group = kWholeCta ? blockIdx.x : blockIdx.x * kWarpRowWarps + threadIdx.x / kWarp;
  const int rows = static_cast<int>(c.total);  // below 2^31: the binding checks
  if (group > (rows - 1) / p.run) return;      // whole warps or CTAs: nobody waits for them
  const int begin = group * p.run, end = begin + (rows - begin < p.run ? rows - begin : p.run);
  const int first = lane * kVec, step = row_threads * kVec;

  int b = begin / c.tokens, n = begin % c.tokens;
  int64_t kept_scale = -1, kept_shift = -1;
  Floats scale_kept[kSteps], shift_kept[kSteps];

  Pack<T> x_next[kSteps], a_next[kSteps];
  auto fetch = [&](int fb, int fn) {
    const T* x = static_cast<const T*>(p.x.data) + fb * p.x.stride_b + fn * p.x.stride_n;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) x_next[s] = load_pack(x, first + s * step, c.width, true);
    if constexpr (kMode & kResidual) {
      const T* a = static_cast<const T*>(p.a.data) + fb * p.a.stride_b + fn * p.a.stride_n;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) a_next[s] = load_pack(a, first + s * step, c.width, true);
    }
  };
  fetch(b, n);

  for (int row = begin; row < end; ++row) {
    Floats r[kSteps];
    Floats av[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      r[s] = to_floats<T>(x_next[s]);
      if constexpr (kMode & kResidual) av[s] = to_floats<T>(a_next[s]);
    }
    const int row_b = b, row_n = n;
    if (++n == c.tokens) n = 0, ++b;
    if (row + 1 < end) fetch(b, n);
    const int64_t out_row = int64_t(row) * c.width;

    if constexpr (kMode & kResidual) {
      const int post = c.flags & kPostMask;
      if (post != 0) {
        const Stats stats = row_stats(av, post == kPostLayer, c.inv_width, c.post_eps, c.width, first, step, reduce);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          normalise(av[s], stats.mean, stats.rstd, c.width - first - s * step);
          affine<T, true>(c, p.post_weight, Vector{}, post == kPostLayer, first + s * step, law, av[s]);
        }
      }
      if (p.gate.present()) {
        const int64_t at = p.gate.data != nullptr ? modulation_row(c, p.gate, row_b, row_n) : 0;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const Floats g = gate_values<T, true>(c, p.gate, at, first + s * step, law);
#pragma unroll
          for (int i = 0; i < kVec; ++i) av[s][i] = round_if<T>(g[i] * av[s][i], law.modulation);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          r[s][i] += av[s][i];
          if (c.flags & kClip) r[s][i] = clip_residual(r[s][i]);
        }
        const Pack<T> stored = to_pack<T>(r[s]);
        if (p.r != nullptr) {
          store_pack(static_cast<T*>(p.r) + out_row, first + s * step, c.width, true, stored);
        }
        r[s] = to_floats<T>(stored);  // the norm sees the residual as stored
      }
    }

    if constexpr (kMode & kNormalise) {
      const int norm = c.flags & kNormMask;
      if (norm != kNormNone) {
        const Stats stats = row_stats(r, norm == kNormLayer, c.inv_width, c.eps, c.width, first, step, reduce);
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int i = 0; i < kVec; ++i) r[s][i] = (r[s][i] - stats.mean) * stats.rstd;
      }
      const int64_t scale_at = p.scale.data != nullptr ? modulation_row(c, p.scale, row_b, row_n) : 0;
      const int64_t shift_at = p.shift.data != nullptr ? modulation_row(c, p.shift, row_b, row_n) : 0;
      if constexpr (kKeep) {
        if (p.scale.present() && scale_at != kept_scale) {
          kept_scale = scale_at;
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            scale_kept[s] = scale_factors<T, true>(c, p.scale, scale_at, first + s * step, law);
          }
        }
        if (p.shift.present() && shift_at != kept_shift) {
          kept_shift = shift_at;
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            shift_kept[s] = modulation_values<T, true>(c, p.shift, shift_at, first + s * step, law);
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        affine<T, true>(c, p.weight, p.bias, norm == kNormLayer, d, law, r[s]);
        Floats y = r[s];
        if (p.scale.present()) {
          const Floats m = kKeep ? scale_kept[s] : scale_factors<T, true>(c, p.scale, scale_at, d, law);
#pragma unroll
          for (int i = 0; i < kVec; ++i) y[i] = round_if<T>(y[i] * m[i], law.modulation);
        }
        if (p.shift.present()) {
          const Floats m = kKeep ? shift_kept[s] : modulation_values<T, true>(c, p.shift, shift_at, d, law);
#pragma unroll
          for (int i = 0; i < kVec; ++i) y[i] += m[i];
        }
        store_pack(static_cast<T*>(p.y) + out_row, d, c.width, true, to_pack<T>(y));
        if (p.y2 != nullptr) {
          y = r[s];
          if (p.scale2.data != nullptr) {
            const Floats m = scale_factors<T, true>(c, p.scale2, modulation_row(c, p.scale2, row_b, row_n), d, law);
#pragma unroll
            for (int i = 0; i < kVec; ++i) y[i] = round_if<T>(y[i] * m[i], law.modulation);
          }
          if (p.shift2.data != nullptr) {
            const Floats m = modulation_values<T, true>(c, p.shift2, modulation_row(c, p.shift2, row_b, row_n), d, law);
#pragma unroll
            for (int i = 0; i < kVec; ++i) y[i] += m[i];
          }
          store_pack(static_cast<T*>(p.y2) + out_row, d, c.width, true, to_pack<T>(y));
        }
      }
    }
  }
}

/// Any width, any alignment: the same arithmetic, reading the row once per pass.
template <typename T, int kMode>
__global__ void __launch_bounds__(512) forward_any_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const Common& c = p.c;
  const Law law = Law::of<T>(c);
  const int64_t row = blockIdx.x;
  const int b = static_cast<int>(row / c.tokens), n = static_cast<int>(row % c.tokens);
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + n * p.x.stride_n;
  const T* a = nullptr;
  const int step = blockDim.x * kVec, first = threadIdx.x * kVec, norm = c.flags & kNormMask;
  const int post = c.flags & kPostMask;
  if constexpr (kMode & kResidual) a = static_cast<const T*>(p.a.data) + b * p.a.stride_b + n * p.a.stride_n;

  Stats post_stats{0.f, 1.f};
  auto branch = [&](int d) { return to_floats<T>(load_pack(a, d, c.width, p.a.vec)); };
  if constexpr (kMode & kResidual) {
    if (post != 0) post_stats = stats_of(branch, post == kPostLayer, c.post_eps, c, first, step, reduce);
  }
  auto residual = [&](int d) {
    Floats v = to_floats<T>(load_pack(x, d, c.width, p.x.vec));
    if constexpr (kMode & kResidual) {
      Floats w = branch(d);
      if (post != 0) {
        normalise(w, post_stats.mean, post_stats.rstd, c.width - d);
        affine<T, false>(c, p.post_weight, Vector{}, post == kPostLayer, d, law, w);
      }
      if (p.gate.present()) {
        const int64_t at = p.gate.data != nullptr ? modulation_row(c, p.gate, b, n) : 0;
        const Floats g = gate_values<T, false>(c, p.gate, at, d, law);
        for (int i = 0; i < kVec; ++i) w[i] = round_if<T>(g[i] * w[i], law.modulation);
      }
      for (int i = 0; i < kVec; ++i) {
        v[i] += w[i];
        if (c.flags & kClip) v[i] = clip_residual(v[i]);
        v[i] = round_to<T>(v[i]);
      }
    }
    return v;
  };

  Stats stats{0.f, 1.f};
  if constexpr (kMode & kNormalise) {
    if (norm != kNormNone) stats = stats_of(residual, norm == kNormLayer, c.eps, c, first, step, reduce);
  }
  for (int d = first; d < c.width; d += step) {
    Floats v = residual(d);
    const int64_t out = row * c.width;
    if (kMode & kResidual && p.r != nullptr) store_pack(static_cast<T*>(p.r) + out, d, c.width, p.out_vec, to_pack<T>(v));
    if constexpr (kMode & kNormalise) {
      for (int i = 0; i < kVec; ++i) v[i] = (v[i] - stats.mean) * stats.rstd;
      affine<T, false>(c, p.weight, p.bias, norm == kNormLayer, d, law, v);
      for (int which = 0; which < (p.y2 != nullptr ? 2 : 1); ++which) {
        const Floats y = modulate<T, false>(c, which ? p.scale2 : p.scale, which ? p.shift2 : p.shift, b, n, d, law, v);
        store_pack(static_cast<T*>(which ? p.y2 : p.y) + out, d, c.width, p.out_vec, to_pack<T>(y));
      }
    }
  }
}

inline bool all_aligned(const Modulation& m) { return (m.data == nullptr || m.vec) && (m.table == nullptr || m.table_vec); }
inline bool all_aligned(const Vector& v) { return v.data == nullptr || v.vec; }
inline bool all_aligned(const Activation& a) { return a.data == nullptr || a.vec; }

/// Threads of a CTA that owns a row and holds one vector per thread, as far as they go.
inline int row_threads(int width, int most) {
  const int64_t threads = ceil_div(ceil_div(width, kVec), kWarp) * kWarp;
  return static_cast<int>(threads < most ? threads : most);
}

template <typename T, int kMode>
void run_forward(const char* op, ForwardParams p, const DeviceInfo& device, Stream stream) {
  const int width = p.c.width;
  if (p.c.total == 0) return;
  const bool fast = p.out_vec && width <= kRowSteps * kMaxRowThreads * kVec && all_aligned(p.x) && all_aligned(p.a) && all_aligned(p.gate) &&
                    all_aligned(p.scale) && all_aligned(p.shift) && all_aligned(p.scale2) && all_aligned(p.shift2) &&
                    all_aligned(p.weight) && all_aligned(p.bias) && all_aligned(p.post_weight);
  if (!fast) {
    const dim3 grid(static_cast<unsigned>(p.c.total));
    return launch(op, forward_any_kernel<T, kMode>, grid, row_threads(width, 512), 0, stream, p);
  }
  // Enough groups for about 32 CTAs per multiprocessor before runs get longer: a run saves modulation traffic, but too few
  // runs leave the last wave half empty.
  auto run_of = [&](int64_t groups_wanted) {
    const int64_t run = p.c.total / groups_wanted;
    return static_cast<int>(run < 1 ? 1 : (run > 8 ? 8 : run));
  };
  const int64_t sms = device.multiprocessors;
  if (width <= 1024) {
    p.run = run_of(sms * 32 * kWarpRowWarps);
    const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.c.total, p.run), kWarpRowWarps)));
    return launch(op, forward_kernel<T, 4, false, kMode>, grid, kWarpRowWarps * kWarp, 0, stream, p);
  }
  p.run = run_of(sms * 32);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.c.total, p.run)));
  const int threads = row_threads(static_cast<int>(ceil_div(width, kRowSteps)), kMaxRowThreads);
  launch(op, forward_kernel<T, kRowSteps, true, kMode>, grid, threads, 0, stream, p);
}

}  // namespace maskaccel::cuda
