// Backward of the adaLN ops: one pass over the rows, then one small kernel that adds partial sums.
//
// A CTA owns a segment: neighbouring rows that share every modulation row. It recomputes the statistics of each stored
// row, writes the row's gradients and adds its share of the reduced gradients (modulation, weights) to fp32 accumulators
// in shared memory that only the owning thread touches; then it writes them to its slot of a workspace. No atomics: the
// second kernel adds the slots in a fixed order. Gradients of modulation that differs per token are stored directly.
//
// Derivatives take the values before rounding (the fp32 law), which is at least as close to the true gradient.
#pragma once

#include "cuda_forward.cuh"

namespace maskaccel::cuda {

constexpr int kBackwardSteps = 2;      // vectors a thread holds
constexpr int kBackwardThreads = 384;  // of a CTA at most; leaves a thread 168 registers

enum Reduced : int { kGate, kScale, kShift, kScale2, kShift2, kWeight, kBias, kPostWeight, kReducedCount };

struct BackwardParams {
  Common c;
  Activation dr, dy, dy2, x, a;  // x is the stored row that was normalised
  Modulation gate, scale, scale2;
  Vector weight, bias, post_weight;
  void *dx = nullptr, *da = nullptr;
  bool out_vec = false;
  float* per_token[kReducedCount] = {};  // fp32 (B * N, padded) rows written directly, or null
  bool per_token_vec = false;
  int slot[kReducedCount];               // offset among the accumulators of a segment, or -1
  int slots = 0;
  int padded = 0;              // row length of the workspace: 8 elements for every thread and step
  float* workspace = nullptr;  // (segments, slots, padded)
  bool shared = false;         // accumulators in shared memory; else directly in the workspace
  int block = 1;               // rows that share every modulation row; divides tokens
  int run = 1;                 // rows of a segment
  int runs_per_block = 1;
};

/// Where this thread's accumulators live: two float4 halves per vector, apart in shared memory so that its banks do not clash,
/// side by side in the workspace.
struct Accumulators {
  float* base;
  int thread, half, step;  // offset of the thread, from one half to the other, from one vector to the next

  static __device__ __forceinline__ Accumulators of(float* base, bool shared) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    return Accumulators{base, thread * (shared ? 4 : kVec), shared ? threads * 4 : 4, threads * kVec};
  }
  __device__ __forceinline__ float4* at(int slot, int s, int h) const {
    return reinterpret_cast<float4*>(base + thread + slot + s * step + h * half);
  }
  __device__ __forceinline__ void clear(int slots, int padded, int steps) const {
    for (int k = 0; k < slots; ++k)
      for (int s = 0; s < steps; ++s) *at(k * padded, s, 0) = *at(k * padded, s, 1) = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  __device__ __forceinline__ void add(int slot, int s, const Floats& v) const {
    float4* low = at(slot, s, 0);
    float4* high = at(slot, s, 1);
    const float4 l = *low, h = *high;
    *low = make_float4(l.x + v[0], l.y + v[1], l.z + v[2], l.w + v[3]);
    *high = make_float4(h.x + v[4], h.y + v[5], h.z + v[6], h.w + v[7]);
  }
};

/// Hides from the compiler that an offset is the same for every row: it would keep all addresses made from it in registers.
__device__ __forceinline__ void recompute(int& offset) {
#ifndef MASKACCEL_EMULATE
  asm volatile("" : "+r"(offset));
#else
  (void)offset;
#endif
}

/// Adds to the accumulator, or stores the gradient of a token's own modulation row.
template <bool kFast>
__device__ __forceinline__ void emit(const BackwardParams& p, const Accumulators& acc, int which, int s, int64_t row, int d,
                                     const Floats& v) {
  if (p.slot[which] >= 0) acc.add(p.slot[which], s, v);
  if (p.per_token[which] == nullptr) return;
  float* out = p.per_token[which] + row * p.c.width;
  if (kFast || p.per_token_vec) {
    if (d >= p.c.width) return;
    reinterpret_cast<float4*>(out + d)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(out + d)[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (d + i < p.c.width) out[d + i] = v[i];
    }
  }
}

__device__ __forceinline__ Floats times(const Floats& a, const Floats& b) {
  Floats out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = a[i] * b[i];
  return out;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Activation& t, int b, int n) {
  return static_cast<const T*>(t.data) + b * t.stride_b + n * t.stride_n;
}

/// From the gradient of y (in `dn`) to that of the normalised row, recording the reduced gradients on the way.
template <typename T, bool kFast>
__device__ __forceinline__ void through_modulation(const BackwardParams& p, const Accumulators& acc, bool record, int b, int n,
                                                   int64_t row, int s, int d, const Floats& hat, Floats& dn) {
  const Common& c = p.c;
  const Law exact = Law::exact();
  Floats value = hat;
  affine<T, kFast>(c, p.weight, p.bias, true, d, exact, value);
  if (record) {
    emit<kFast>(p, acc, kShift, s, row, d, dn);
    emit<kFast>(p, acc, kScale, s, row, d, times(dn, value));
  }
  if (p.scale.present()) {
    const int64_t at = p.scale.data != nullptr ? modulation_row(c, p.scale, b, n) : 0;
    dn = times(dn, scale_factors<T, kFast>(c, p.scale, at, d, exact));
  }
  if (p.dy2.data != nullptr) {
    Floats second = to_floats<T>(load_pack(row_of<T>(p.dy2, b, n), d, c.width, kFast || p.dy2.vec));
    if (record) {
      emit<kFast>(p, acc, kShift2, s, row, d, second);
      emit<kFast>(p, acc, kScale2, s, row, d, times(second, value));
    }
    if (p.scale2.data != nullptr) {
      second = times(second, scale_factors<T, kFast>(c, p.scale2, modulation_row(c, p.scale2, b, n), d, exact));
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) dn[i] += second[i];
  }
  if (record) emit<kFast>(p, acc, kBias, s, row, d, dn);
  if (p.weight.data != nullptr) {
    if (record) emit<kFast>(p, acc, kWeight, s, row, d, times(dn, hat));
    const Floats w = load_operand<T>(p.weight.data, 0, c.weight_wide, d, c.width, kFast || p.weight.vec);
    const float plus = c.weight_offset();
#pragma unroll
    for (int i = 0; i < kVec; ++i) dn[i] *= w[i] + plus;
  }
}

/// From the gradient of the residual (in `g`) to that of the branch, or of its normalised row under a post norm.
template <typename T, bool kFast>
__device__ __forceinline__ void through_gate(const BackwardParams& p, const Accumulators& acc, bool record, int b, int n,
                                             int64_t row, int s, int d, const Floats& hat, Floats& g) {
  const Common& c = p.c;
  const Law exact = Law::exact();
  const int act = c.flags & kGateActMask;
  if (p.gate.present()) {
    Floats value = hat;
    if (c.flags & kPostMask) affine<T, kFast>(c, p.post_weight, Vector{}, true, d, exact, value);
    const int64_t at = p.gate.data != nullptr ? modulation_row(c, p.gate, b, n) : 0;
    const Floats m = modulation_values<T, kFast>(c, p.gate, at, d, exact);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float activated = gate_act<T>(m[i], act, exact);
      value[i] *= g[i] * gate_act_slope(m[i], activated, act);
      g[i] *= activated;
    }
    if (record) emit<kFast>(p, acc, kGate, s, row, d, value);
  }
  if (c.flags & kPostMask && p.post_weight.data != nullptr) {
    if (record) emit<kFast>(p, acc, kPostWeight, s, row, d, times(g, hat));
    const Floats w = load_operand<T>(p.post_weight.data, 0, c.weight_wide, d, c.width, kFast || p.post_weight.vec);
    const float plus = c.weight_offset();
#pragma unroll
    for (int i = 0; i < kVec; ++i) g[i] *= w[i] + plus;
  }
}

/// Adds one vector's terms to the two row sums a norm's derivative needs.
__device__ __forceinline__ void add_sums(const Floats& dn, const Floats& hat, int left, Two& sums) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float kept = i < left ? dn[i] : 0.f;
    sums.a += kept;
    sums.b += kept * hat[i];
  }
}

/// The derivative of a norm, given the sums over the row.
__device__ __forceinline__ void norm_slope(Floats& dn, const Floats& hat, const Stats& stats, Two sums, bool layer,
                                           float inv_width) {
  const float mean = layer ? sums.a * inv_width : 0.f, slope = sums.b * inv_width;
#pragma unroll
  for (int i = 0; i < kVec; ++i) dn[i] = stats.rstd * (dn[i] - mean - hat[i] * slope);
}

/// The rows of this CTA: one sample, one block of shared modulation.
struct Segment {
  int b, begin, end;

  static __device__ __forceinline__ Segment of(const BackwardParams& p) {
    const int per_sample = p.c.tokens / p.block * p.runs_per_block;
    const int64_t index = blockIdx.x;
    const int inside = static_cast<int>(index % per_sample);
    const int start = inside / p.runs_per_block * p.block, begin = start + inside % p.runs_per_block * p.run;
    const int left = p.block - (begin - start);  // no sum of row numbers: it may pass 2^31
    return Segment{static_cast<int>(index / per_sample), begin, begin + (left < p.run ? left : p.run)};
  }
};

template <typename T, int kMode>
__global__ void __launch_bounds__(kBackwardThreads) backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kSteps = kBackwardSteps;
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const Common& c = p.c;
  const int first = threadIdx.x * kVec, step = blockDim.x * kVec;
  const int norm = c.flags & kNormMask, post = c.flags & kPostMask;
  const Segment seg = Segment::of(p);
  const int b = seg.b;

  float* slot_base = p.workspace + blockIdx.x * (int64_t(p.slots) * p.padded);
  Accumulators acc = Accumulators::of(p.shared ? dynamic_shared() : slot_base, p.shared);
  acc.clear(p.slots, p.padded, kSteps);

  Pack<T> x_next[kSteps], dy_next[kSteps], a_next[kSteps];
  auto fetch = [&](int n) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int d = first + s * step;
      if constexpr (kMode & kNormalise) {
        x_next[s] = load_pack(row_of<T>(p.x, b, n), d, c.width, true);
        dy_next[s] = load_pack(row_of<T>(p.dy, b, n), d, c.width, true);
      }
      if constexpr (kMode & kResidual) {
        if constexpr (kMode == kResidual) a_next[s] = load_pack(row_of<T>(p.a, b, n), d, c.width, true);
      }
    }
  };
  if (seg.begin < seg.end) fetch(seg.begin);

  for (int n = seg.begin; n < seg.end; ++n) {
    const int64_t row = int64_t(b) * c.tokens + n;
    recompute(acc.thread);
    Floats g[kSteps];    // gradient of the residual
    Floats hat[kSteps];  // normalised row
    Floats av[kSteps];   // branch, then normalised branch
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if constexpr (kMode & kNormalise) {
        hat[s] = to_floats<T>(x_next[s]);
        g[s] = to_floats<T>(dy_next[s]);
      }
      if constexpr (kMode == kResidual) av[s] = to_floats<T>(a_next[s]);
    }
    Pack<T> dr[kSteps], a_late[kSteps];  // of this row: needed only after the reductions, which hide the latency
    if constexpr (kMode & kResidual) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (p.dr.data != nullptr) dr[s] = load_pack(row_of<T>(p.dr, b, n), first + s * step, c.width, true);
        if constexpr (kMode == kBoth) a_late[s] = load_pack(row_of<T>(p.a, b, n), first + s * step, c.width, true);
      }
    }
    if (n + 1 < seg.end) fetch(n + 1);

    if constexpr (kMode & kNormalise) {
      Stats stats{0.f, 1.f};
      if (norm != kNormNone) stats = row_stats(hat, norm == kNormLayer, c.inv_width, c.eps, c.width, first, step, reduce);
      Two sums{0.f, 0.f};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        normalise(hat[s], stats.mean, stats.rstd, c.width - d);
        through_modulation<T, true>(p, acc, true, b, n, row, s, d, hat[s], g[s]);
        add_sums(g[s], hat[s], c.width - d, sums);
      }
      if (norm != kNormNone) {
        sums = reduce.sum(sums.a, sums.b);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) norm_slope(g[s], hat[s], stats, sums, norm == kNormLayer, c.inv_width);
      }
    }
    if constexpr (kMode & kResidual) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const Floats v = p.dr.data != nullptr ? to_floats<T>(dr[s]) : zeros();
#pragma unroll
        for (int i = 0; i < kVec; ++i) g[s][i] = kMode & kNormalise ? g[s][i] + v[i] : v[i];
      }
    }
    if (p.dx != nullptr) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        store_pack(static_cast<T*>(p.dx) + row * c.width, first + s * step, c.width, true, to_pack<T>(g[s]));
      }
    }
    if constexpr (kMode & kResidual) {
      if constexpr (kMode == kBoth) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) av[s] = to_floats<T>(a_late[s]);
      }
      Stats stats{0.f, 1.f};
      Two sums{0.f, 0.f};
      if (post != 0) stats = row_stats(av, post == kPostLayer, c.inv_width, c.post_eps, c.width, first, step, reduce);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = first + s * step;
        if (post != 0) normalise(av[s], stats.mean, stats.rstd, c.width - d);
        through_gate<T, true>(p, acc, true, b, n, row, s, d, av[s], g[s]);
        add_sums(g[s], av[s], c.width - d, sums);
      }
      if (post != 0) {
        sums = reduce.sum(sums.a, sums.b);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) norm_slope(g[s], av[s], stats, sums, post == kPostLayer, c.inv_width);
      }
      if (p.da != nullptr) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          store_pack(static_cast<T*>(p.da) + row * c.width, first + s * step, c.width, true, to_pack<T>(g[s]));
        }
      }
    }
  }

  if (!p.shared) return;
  for (int k = 0; k < p.slots; ++k)  // each thread copies what it alone has written
    for (int s = 0; s < kSteps; ++s) {
      float4* out = reinterpret_cast<float4*>(slot_base + k * p.padded + first + s * step);
      out[0] = *acc.at(k * p.padded, s, 0);
      out[1] = *acc.at(k * p.padded, s, 1);
    }
}

/// Any width, any alignment: the same arithmetic, reading the row once per pass.
template <typename T, int kMode>
__global__ void __launch_bounds__(512) backward_any_kernel(const __grid_constant__ BackwardParams p) {
  __shared__ Two reduce_buffer[2][kWarp];
  RowReduce<true> reduce{reduce_buffer};
  const Common& c = p.c;
  const int steps = static_cast<int>((c.width + blockDim.x * kVec - 1) / (blockDim.x * kVec));
  const int norm = c.flags & kNormMask, post = c.flags & kPostMask;
  const Segment seg = Segment::of(p);
  const int b = seg.b;
  auto offset = [&](int s) { return (s * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVec; };
  const Accumulators acc = Accumulators::of(p.workspace + blockIdx.x * (int64_t(p.slots) * p.padded), false);
  acc.clear(p.slots, p.padded, steps);

  for (int n = seg.begin; n < seg.end; ++n) {
    const int64_t row = int64_t(b) * c.tokens + n;
    auto stats_of = [&](const Activation& t, bool layer, float eps) {
      float sum = 0.f, mean = 0.f;
      for (int s = 0; layer && s < steps; ++s) {
        const Floats v = to_floats<T>(load_pack(row_of<T>(t, b, n), offset(s), c.width, t.vec));
        for (int i = 0; i < kVec; ++i) sum += v[i];
      }
      if (layer) mean = reduce.sum(sum) * c.inv_width;
      sum = 0.f;
      for (int s = 0; s < steps; ++s) {
        Floats v = to_floats<T>(load_pack(row_of<T>(t, b, n), offset(s), c.width, t.vec));
        normalise(v, mean, 1.f, c.width - offset(s));
        for (int i = 0; i < kVec; ++i) sum += v[i] * v[i];
      }
      return Stats{mean, inverse_sqrt(reduce.sum(sum) * c.inv_width + eps)};
    };
    auto hat_of = [&](const Activation& t, const Stats& stats, int s) {
      Floats v = to_floats<T>(load_pack(row_of<T>(t, b, n), offset(s), c.width, t.vec));
      normalise(v, stats.mean, stats.rstd, c.width - offset(s));
      return v;
    };
    Stats stats{0.f, 1.f}, post_stats{0.f, 1.f};
    Two sums{0.f, 0.f}, post_sums{0.f, 0.f};
    auto normal_gradient = [&](bool record, int s) {
      Floats dn = to_floats<T>(load_pack(row_of<T>(p.dy, b, n), offset(s), c.width, p.dy.vec));
      through_modulation<T, false>(p, acc, record, b, n, row, s, offset(s), hat_of(p.x, stats, s), dn);
      return dn;
    };
    auto residual_gradient = [&](int s) {
      Floats g = zeros();
      if constexpr (kMode & kNormalise) {
        g = normal_gradient(false, s);
        if (norm != kNormNone) norm_slope(g, hat_of(p.x, stats, s), stats, sums, norm == kNormLayer, c.inv_width);
      }
      if constexpr (kMode & kResidual) {
        if (p.dr.data != nullptr) {
          const Floats dr = to_floats<T>(load_pack(row_of<T>(p.dr, b, n), offset(s), c.width, p.dr.vec));
          for (int i = 0; i < kVec; ++i) g[i] += dr[i];
        }
      }
      return g;
    };
    if constexpr (kMode & kNormalise) {
      if (norm != kNormNone) stats = stats_of(p.x, norm == kNormLayer, c.eps);
      for (int s = 0; s < steps; ++s) add_sums(normal_gradient(true, s), hat_of(p.x, stats, s), c.width - offset(s), sums);
      sums = reduce.sum(sums.a, sums.b);
    }
    if (p.dx != nullptr) {
      for (int s = 0; s < steps; ++s) {
        const Pack<T> out = to_pack<T>(residual_gradient(s));
        store_pack(static_cast<T*>(p.dx) + row * c.width, offset(s), c.width, p.out_vec, out);
      }
    }
    if constexpr (kMode & kResidual) {
      if (post != 0) post_stats = stats_of(p.a, post == kPostLayer, c.post_eps);
      auto branch_gradient = [&](bool record, int s) {
        Floats g = residual_gradient(s);
        through_gate<T, false>(p, acc, record, b, n, row, s, offset(s), hat_of(p.a, post_stats, s), g);
        return g;
      };
      for (int s = 0; s < steps; ++s) {
        add_sums(branch_gradient(true, s), hat_of(p.a, post_stats, s), c.width - offset(s), post_sums);
      }
      post_sums = reduce.sum(post_sums.a, post_sums.b);
      for (int s = 0; p.da != nullptr && s < steps; ++s) {
        Floats g = branch_gradient(false, s);
        if (post != 0) norm_slope(g, hat_of(p.a, post_stats, s), post_stats, post_sums, post == kPostLayer, c.inv_width);
        store_pack(static_cast<T*>(p.da) + row * c.width, offset(s), c.width, p.out_vec, to_pack<T>(g));
      }
    }
  }
}

}  // namespace maskaccel::cuda
