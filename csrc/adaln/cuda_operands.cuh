// Operands of the fused adaLN kernels and the arithmetic on one vector of them. The two laws are those of
// maskaccel/ops/adaln/schema.py: `fp32` rounds where a tensor is stored, `narrow` where eager torch rounds.
#pragma once

#include "../common/cuda_common.cuh"
#include "flags.h"

namespace maskaccel::cuda {

/// An activation (B, N, D): element strides, dense last dim.
struct Activation {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;
  bool vec = false;  // every row starts on 16 bytes and D % 8 == 0
};

/// A modulation tensor and its table: token n of sample b reads the row at b * stride_b + (n / group) * stride_g, or at
/// rows[b, n] * stride_b where rows are given.
struct Modulation {
  const void* data = nullptr;
  const void* table = nullptr;
  int64_t stride_b = 0, stride_g = 0;
  int group = 1;
  bool vec = false, table_vec = false;

  __host__ __device__ bool present() const { return data != nullptr || table != nullptr; }
};

/// A (D,) vector: norm weight or bias.
struct Vector {
  const void* data = nullptr;
  bool vec = false;
};

/// What every adaLN kernel shares.
struct Common {
  int batch = 0, tokens = 0, width = 0, flags = 0;
  int64_t total = 0;  // batch * tokens
  const int32_t* rows = nullptr;
  int64_t rows_stride_b = 0;
  bool modulation_wide = false, weight_wide = false;  // fp32; else the dtype of x
  float eps = 0, post_eps = 0, offset = 0, inv_width = 0;

  __device__ __forceinline__ bool narrow() const { return flags & kNarrow; }
  __device__ __forceinline__ float weight_offset() const { return flags & kWeightPlusOne ? 1.f : 0.f; }
};

/// Where a value is rounded. Under promotion an fp32 operand keeps the result fp32.
struct Law {
  bool narrow, modulation, weight;

  template <typename T>
  static __device__ __forceinline__ Law of(const Common& c) {
    const bool narrow = c.narrow() && sizeof(T) < 4;
    return Law{narrow, narrow && !c.modulation_wide, narrow && !c.weight_wide};
  }
  static __device__ __forceinline__ Law exact() { return Law{false, false, false}; }
};

/// Element offset of the modulation row that token n of sample b reads. It also names the row: equal means same values.
__device__ __forceinline__ int64_t modulation_row(const Common& c, const Modulation& m, int b, int n) {
  if (c.rows != nullptr) return static_cast<int64_t>(c.rows[b * c.rows_stride_b + n]) * m.stride_b;
  return b * m.stride_b + (m.group == c.tokens ? 0 : (n / m.group) * m.stride_g);
}

/// Value plus table. In this and the functions below `kFast` promises that every operand is aligned (`vec`), which removes
/// the scalar paths from the code.
template <typename T, bool kFast>
__device__ __forceinline__ Floats modulation_values(const Common& c, const Modulation& m, int64_t at, int d, Law law) {
  if (m.data == nullptr) return load_operand<T>(m.table, 0, c.modulation_wide, d, c.width, kFast || m.table_vec);
  Floats v = load_operand<T>(m.data, at, c.modulation_wide, d, c.width, kFast || m.vec);
  if (m.table != nullptr) {
    const Floats t = load_operand<T>(m.table, 0, c.modulation_wide, d, c.width, kFast || m.table_vec);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = round_if<T>(v[i] + t[i], law.modulation);
  }
  return v;
}

/// `offset + scale`: what the normalised row is multiplied with.
template <typename T, bool kFast>
__device__ __forceinline__ Floats scale_factors(const Common& c, const Modulation& m, int64_t at, int d, Law law) {
  Floats v = modulation_values<T, kFast>(c, m, at, d, law);
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = round_if<T>(c.offset + v[i], law.modulation);
  return v;
}

template <typename T>
__device__ __forceinline__ float gate_act(float g, int act, Law law) {
  if (act == kGateTanh) return round_if<T>(tanhf(g), law.modulation);
  if (act == kGateClampTanh) return round_if<T>(tanhf(g > 2.f ? 2.f : (g < -2.f ? -2.f : g)), law.modulation);
  if (act == kGateSigmoid1m) {
    const float v = round_if<T>(1.f - g, law.modulation);
    return round_if<T>(1.f / (1.f + expf(-v)), law.modulation);
  }
  return g;
}

/// d act / d gate, from the gate and its activation.
__device__ __forceinline__ float gate_act_slope(float g, float activated, int act) {
  if (act == kGateTanh) return 1.f - activated * activated;
  if (act == kGateClampTanh) return g > 2.f || g < -2.f ? 0.f : 1.f - activated * activated;
  if (act == kGateSigmoid1m) return -activated * (1.f - activated);
  return 1.f;
}

template <typename T, bool kFast>
__device__ __forceinline__ Floats gate_values(const Common& c, const Modulation& m, int64_t at, int d, Law law) {
  Floats v = modulation_values<T, kFast>(c, m, at, d, law);
  const int act = c.flags & kGateActMask;
  if (act != kGateNone) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = gate_act<T>(v[i], act, law);
  }
  return v;
}

/// Affine part of a norm on normalised values, with the roundings of the law.
template <typename T>
__device__ __forceinline__ void affine_values(bool has_w, const Floats& w, bool has_b, const Floats& b, float plus, bool layer,
                                              Law law, Floats& v) {
  const bool inside = !law.narrow || layer;  // LayerNorm applies its affine before it rounds
  if (!inside) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = round_to<T>(v[i]);
  }
  if (has_w) {
    const bool round_sum = law.weight && !inside && plus != 0.f;
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = round_if<T>(v[i] * round_if<T>(w[i] + plus, round_sum), !inside);
  }
  if (has_b) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = round_if<T>(v[i] + b[i], !inside);
  }
  if (law.narrow && inside) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = round_to<T>(v[i]);
  }
}

template <typename T, bool kFast>
__device__ __forceinline__ void affine(const Common& c, const Vector& weight, const Vector& bias, bool layer, int d, Law law,
                                       Floats& v) {
  Floats w = zeros(), b = zeros();
  if (weight.data != nullptr) w = load_operand<T>(weight.data, 0, c.weight_wide, d, c.width, kFast || weight.vec);
  if (bias.data != nullptr) b = load_operand<T>(bias.data, 0, c.weight_wide, d, c.width, kFast || bias.vec);
  affine_values<T>(weight.data != nullptr, w, bias.data != nullptr, b, c.weight_offset(), layer, law, v);
}

/// Normalises, keeping zeros past the end of the row.
__device__ __forceinline__ void normalise(Floats& v, float mean, float rstd, int left) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = i < left ? (v[i] - mean) * rstd : 0.f;
}

/// Clamp that lets NaN through, as torch.clamp does.
__device__ __forceinline__ float clip_residual(float v) {
  constexpr float kMax = 65504.f;
  return v > kMax ? kMax : (v < -kMax ? -kMax : v);
}

/// Mean and inverse deviation of a row.
struct Stats {
  float mean, rstd;
};

/// Of a row of whole vectors that lives in registers: two passes, exact for rows with a large mean. The row loses its
/// mean, so that of the result is 0.
template <int kSteps, typename Reduce>
__device__ __forceinline__ Stats row_stats(Floats (&v)[kSteps], bool layer, float inv_width, float eps, int width, int first,
                                           int step, Reduce& reduce) {
  if (layer) {
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum += v[s][i];
    const float mean = reduce.sum(sum) * inv_width;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < kVec; ++i) v[s][i] -= mean;
  }
  float square = 0.f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float part = square;
#pragma unroll
    for (int i = 0; i < kVec; ++i) part += v[s][i] * v[s][i];
    square = first + s * step < width ? part : square;  // what lies past the end of the row must not count
  }
  return Stats{0.f, inverse_sqrt(reduce.sum(square) * inv_width + eps)};
}

/// Of a row that is read again for each pass: `value(d)` gives elements [d, d + 8), zeros past the end.
template <typename Value, typename Reduce>
__device__ __forceinline__ Stats stats_of(Value&& value, bool layer, float eps, const Common& c, int first, int step,
                                          Reduce& reduce) {
  float sum = 0.f, mean = 0.f;
  if (layer) {
    for (int d = first; d < c.width; d += step) {
      const Floats v = value(d);
      for (int i = 0; i < kVec; ++i) sum += v[i];
    }
    mean = reduce.sum(sum) * c.inv_width;
  }
  sum = 0.f;
  for (int d = first; d < c.width; d += step) {
    const Floats v = value(d);
    for (int i = 0; i < kVec; ++i) {
      const float centred = d + i < c.width ? v[i] - mean : 0.f;
      sum += centred * centred;
    }
  }
  return Stats{mean, inverse_sqrt(reduce.sum(sum) * c.inv_width + eps)};
}

/// `y * (offset + scale) + shift` for token n of sample b.
template <typename T, bool kFast>
__device__ __forceinline__ Floats modulate(const Common& c, const Modulation& scale, const Modulation& shift, int b, int n,
                                           int d, Law law, Floats y) {
  if (scale.present()) {
    const int64_t at = scale.data != nullptr ? modulation_row(c, scale, b, n) : 0;
    const Floats m = scale_factors<T, kFast>(c, scale, at, d, law);
#pragma unroll
    for (int i = 0; i < kVec; ++i) y[i] = round_if<T>(y[i] * m[i], law.modulation);
  }
  if (shift.present()) {
    const int64_t at = shift.data != nullptr ? modulation_row(c, shift, b, n) : 0;
    const Floats m = modulation_values<T, kFast>(c, shift, at, d, law);
#pragma unroll
    for (int i = 0; i < kVec; ++i) y[i] += m[i];
  }
  return y;
}

}  // namespace maskaccel::cuda
