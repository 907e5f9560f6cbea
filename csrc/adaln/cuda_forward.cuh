// Forward of norm_modulate, gate_residual and gate_residual_norm_modulate: one kernel, three modes.
//
// The fast kernel takes rows of a multiple of 8 elements, up to 6144, whose operands all lie on 16 bytes; a second, plain
// kernel takes everything else. Rows of at most 1024 elements belong to a warp, longer ones to a CTA.
// Each warp or CTA walks a run of neighbouring rows. The next rows are on their way to shared memory while a row is worked
// on, in registers from load to store; gate, scale and shift stay in shared memory, finished, while the rows share them
// (they are fetched again when their address changes).
#pragma once

#include "../common/cuda_ring.cuh"
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
  bool keep = false;       // gate, scale and shift stay in shared memory
  bool by_sample = false;  // the rows of a sample share them
  int run = 1;        // rows per warp or CTA
  int stages = 1;     // rows of the ring
  int own = 0;        // bytes of shared memory that are a thread's own
};

constexpr int kWarpRowWarps = 4;     // warps of a CTA where each warp has its own rows
constexpr int kWarpRowSteps = 4;     // vectors a thread holds there
constexpr int kRowSteps = 2;         // vectors a thread holds where a CTA shares one row
constexpr int kMaxRowThreads = 384;  // threads of that CTA at most

/// Vectors of a thread that stay in shared memory, as a multiple of its steps (scale and shift; gate), and that a row brings.
constexpr int kept_of(int mode) { return (mode & kResidual ? 1 : 0) + (mode & kNormalise ? 2 : 0); }
constexpr int loaded_of(int mode) { return mode & kResidual ? 2 : 1; }

/// The common calls have kernels of their own, where little is tested in the loop: every result and every modulation, a
/// norm without weights, neither post norm nor clip, and shared memory for what rows share.
enum Kind : int { kGeneral, kPlain, kPlainNarrow };

template <typename T, int kSteps, bool kWholeCta, int kMode, int kKind>
__global__ void __launch_bounds__(kWholeCta ? kMaxRowThreads : kWarpRowWarps* kWarp,
                                  !kWholeCta ? 3 : kKind == kGeneral ? 1 : 2)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using Ring = RowRing<T, kSteps * loaded_of(kMode)>;
  constexpr bool kAny = kKind == kGeneral;
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<kWholeCta> reduce{reduce_buffer};

  const Common& c = p.c;
  const Law law = kAny ? Law::of<T>(c) : kKind == kPlain ? Law::exact() : Law{true, !c.modulation_wide, false};
  const int lane = kWholeCta ? threadIdx.x : threadIdx.x & 31;
  const int row_threads = kWholeCta ? blockDim.x : kWarp;
  const int group = kWholeCta ? blockIdx.x : blockIdx.x * kWarpRowWarps + threadIdx.x / kWarp;
  const int rows = static_cast<int>(c.total);  // below 2^31: the binding checks
  if (group > (rows - 1) / p.run) return;      // whole warps or CTAs: nobody waits for them
  const int begin = group * p.run, end = begin + (rows - begin < p.run ? rows - begin : p.run);
  const int first = lane * kVec, step = row_threads * kVec, width = c.width;

  Ring ring(own_memory(p.own), p.stages);
  char* const kept = ring.first + p.stages * Ring::kStage;  // of operand `which` and step s: at kept_at(which, s)
  const auto kept_at = [&](int which, int s) { return kept + (which * kSteps + s) * kFloatsBytes; };
  const T *x_next = nullptr, *a_next = nullptr;
  int next = begin, next_n = begin % c.tokens;
  const auto seek = [&](int b) {
    x_next = static_cast<const T*>(p.x.data) + b * p.x.stride_b + next_n * p.x.stride_n;
    if constexpr (kMode & kResidual) a_next = static_cast<const T*>(p.a.data) + b * p.a.stride_b + next_n * p.a.stride_n;
  };
  seek(begin / c.tokens);
  const auto fetch = [&] {
    if (next < end) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        ring.copy(s, d < width ? x_next + d : x_next, d < width);
        if constexpr (kMode & kResidual) ring.copy(kSteps + s, d < width ? a_next + d : a_next, d < width);
      }
      ++next;
      x_next += p.x.stride_n;
      if constexpr (kMode & kResidual) a_next += p.a.stride_n;
      if (++next_n == c.tokens) {
        next_n = 0;
        seek(next / c.tokens);
      }
    }
    ring.close();
  };
#pragma unroll 1
  for (int i = 0; i < p.stages; ++i) fetch();

  int64_t kept_gate = -1, kept_scale = -1, kept_shift = -1;
  int b = begin / c.tokens, n = begin % c.tokens;
  T* r_row = static_cast<T*>(p.r) + (p.r != nullptr ? int64_t{begin} * width : 0);
  T* y_row = static_cast<T*>(p.y) + (p.y != nullptr ? int64_t{begin} * width : 0);

  for (int row = begin; row < end; ++row) {
    int64_t gate_at = 0, scale_at = 0, shift_at = 0;
    const auto gate = [&](int s) { return gate_values<T, true>(c, p.gate, gate_at, first + s * step, law); };
    const auto scale = [&](int s) { return scale_factors<T, true>(c, p.scale, scale_at, first + s * step, law); };
    const auto shift = [&](int s) { return modulation_values<T, true>(c, p.shift, shift_at, first + s * step, law); };
    // `values(s)` of operand `which`, whose address is `at`, once for all rows that share them.
    const auto renew = [&](int which, int64_t& last, bool present, int64_t at, auto&& values) {
      if ((kAny && !p.keep) || !present || at == last) return;
      last = at;
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) keep_floats(kept_at(which, s), values(s));
    };
    if (!p.by_sample || row == begin || n == 0) {
      if constexpr (kMode & kNormalise) {
        scale_at = p.scale.data != nullptr ? modulation_row(c, p.scale, b, n) : 0;
        shift_at = p.shift.data != nullptr ? modulation_row(c, p.shift, b, n) : 0;
        renew(0, kept_scale, p.scale.present(), scale_at, scale);
        renew(1, kept_shift, p.shift.present(), shift_at, shift);
      }
      if constexpr (kMode & kResidual) {
        gate_at = p.gate.data != nullptr ? modulation_row(c, p.gate, b, n) : 0;
        renew(kept_of(kMode) - 1, kept_gate, p.gate.present(), gate_at, gate);
      }
    }
    const auto shared_values = [&](int which, int s, auto&& values) {
      return !kAny || p.keep ? kept_floats(kept_at(which, s)) : values(s);
    };

    ring.wait();
    Floats r[kSteps];
    Floats av[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      r[s] = to_floats<T>(ring.read(s));
      if constexpr (kMode & kResidual) av[s] = to_floats<T>(ring.read(kSteps + s));
    }

    if constexpr (kMode & kResidual) {
      const int post = kAny ? c.flags & kPostMask : 0;
      if (post != 0) {
        const Stats stats = row_stats(av, post == kPostLayer, c.inv_width, c.post_eps, width, first, step, reduce);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          normalise(av[s], stats.mean, stats.rstd, width - first - s * step);
          affine<T, true>(c, p.post_weight, Vector{}, post == kPostLayer, first + s * step, law, av[s]);
        }
      }
      if (!kAny || p.gate.present()) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const Floats g = shared_values(kept_of(kMode) - 1, s, gate);
#pragma unroll
          for (int i = 0; i < kVec; ++i) av[s][i] *= g[i];
          round_all<T>(av[s], law.modulation);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) r[s][i] += av[s][i];
        if (kAny && c.flags & kClip) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) r[s][i] = clip_residual(r[s][i]);
        }
        const Pack<T> stored = to_pack<T>(r[s]);
        if (!kAny || p.r != nullptr) store_pack(r_row, first + s * step, width, true, stored);
        r[s] = to_floats<T>(stored);  // the norm sees the residual as stored
      }
      r_row += width;
    }
    if constexpr (!(kMode & kNormalise)) fetch();

    if constexpr (kMode & kNormalise) {
      const int norm = c.flags & kNormMask;
      Stats stats{0.f, 1.f};
      if (!kAny || norm != kNormNone) {
        stats = row_stats(r, norm == kNormLayer, c.inv_width, c.eps, width, first, step, reduce);
      }
      fetch();  // into the place of this row, which this thread has read by now
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        if (!kAny || norm != kNormNone) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) r[s][i] *= stats.rstd;
        }
        if constexpr (kAny) affine<T, true>(c, p.weight, p.bias, norm == kNormLayer, d, law, r[s]);
        if constexpr (!kAny) round_all<T>(r[s], law.narrow);
        Floats y = r[s];
        if constexpr (kKind == kPlain) {
          const Floats m = shared_values(0, s, scale), term = shared_values(1, s, shift);
#pragma unroll
          for (int i = 0; i < kVec; ++i) y[i] = y[i] * m[i] + term[i];
        } else {
          if (!kAny || p.scale.present()) {
            const Floats m = shared_values(0, s, scale);
#pragma unroll
            for (int i = 0; i < kVec; ++i) y[i] *= m[i];
            round_all<T>(y, law.modulation);
          }
          if (!kAny || p.shift.present()) {
            const Floats term = shared_values(1, s, shift);
#pragma unroll
            for (int i = 0; i < kVec; ++i) y[i] += term[i];
          }
        }
        store_pack(y_row, d, width, true, to_pack<T>(y));
        if (kAny && p.y2 != nullptr) {
          y = modulate<T, true>(c, p.scale2, p.shift2, b, n, d, law, r[s]);
          store_pack(static_cast<T*>(p.y2) + int64_t(row) * width, d, width, true, to_pack<T>(y));
        }
      }
      y_row += width;
    }
    if (++n == c.tokens) n = 0, ++b;
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
  const bool by_warp = width <= kWarpRowSteps * kWarp * kVec;
  const int threads = by_warp ? kWarpRowWarps * kWarp
                              : row_threads(static_cast<int>(ceil_div(width, kRowSteps)), kMaxRowThreads);
  const int steps = by_warp ? kWarpRowSteps : kRowSteps;
  const int64_t groups = by_warp ? kWarpRowWarps : 1;
  const RowPlan plan = RowPlan::of(device, ceil_div(p.c.total, groups), threads, by_warp ? 168 : 80,
                                   int{sizeof(Pack<T>)} * steps * loaded_of(kMode), kFloatsBytes * steps * kept_of(kMode));
  p.own = plan.own;
  p.run = plan.run;
  p.stages = plan.stages;
  p.keep = plan.keep;
  const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.c.total, p.run), groups)));
  const auto by_sample = [&](const Modulation& m) { return m.data == nullptr || m.group == p.c.tokens; };
  p.by_sample = plan.keep && p.c.rows == nullptr && by_sample(p.gate) && by_sample(p.scale) && by_sample(p.shift);
  const auto run = [&](auto kernel) { launch(op, kernel, grid, threads, plan.shared, stream, p); };
  if (by_warp) return run(forward_kernel<T, kWarpRowSteps, false, kMode, kGeneral>);
  const bool plain = plan.keep && (p.c.flags & (kPostMask | kClip)) == 0 && p.weight.data == nullptr &&
                     p.bias.data == nullptr && p.y2 == nullptr &&
                     (!(kMode & kResidual) || (p.gate.present() && p.r != nullptr)) &&
                     (!(kMode & kNormalise) ||
                      (p.scale.present() && p.shift.present() && (p.c.flags & kNormMask) != kNormNone));
  if (!plain) return run(forward_kernel<T, kRowSteps, true, kMode, kGeneral>);
  if constexpr (sizeof(T) < 4) {
    if (p.c.flags & kNarrow) return run(forward_kernel<T, kRowSteps, true, kMode, kPlainNarrow>);
  }
  run(forward_kernel<T, kRowSteps, true, kMode, kPlain>);
}

}  // namespace maskaccel::cuda
