// The norm of one head and its rotation, without leaving the registers.
#pragma once

#include "cpu_modulation.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// The rotation of one token, one value an element, the sign in the sine: out_i = n_i * cos_i + n_pair(i) * sin_i.
inline void build_rotation(float* cos, float* sin, const QkNormRope& s, int64_t b, int64_t token, int64_t h) {
  const int64_t row = s.positions != nullptr ? s.positions[b * s.positions_stride + token] : token;
  const int64_t d = s.Dh, half = d / 2, size = size_of(s.table_dtype);
  const bool by_half = s.flags & kRopeHalf, each_pair = s.T == half;
  const auto table = [&](const void* data, const int64_t* stride) {
    const int64_t at = b * stride[0] + row * stride[1] + h * stride[2];
    return Source{static_cast<const char*>(data) + at * size, s.table_dtype};
  };
  const Source c = table(s.cos, s.cos_stride), n = table(s.sin, s.sin_stride);
  const auto value = [](Source src, int64_t i) {
    switch (src.dtype) {
      case Dtype::bf16:
        return to_float(static_cast<const bf16*>(src.data)[i]);
      case Dtype::f16:
        return to_float(static_cast<const f16*>(src.data)[i]);
      default:
        return static_cast<const float*>(src.data)[i];
    }
  };
  const int64_t cs = s.cos_stride[3], ns = s.sin_stride[3];
  if (!each_pair && cs == 1 && ns == 1) {
    sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      store(cos + i, load(c, i, part), part);
      store(sin + i, load(n, i, part), part);
    });
    if (by_half) {
      for (int64_t i = 0; i < half; ++i) sin[i] = -sin[i];
    } else {
      for (int64_t i = 0; i < d; i += 2) sin[i] = -sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const int64_t lo = by_half ? i : 2 * i, hi = by_half ? i + half : 2 * i + 1;
    cos[lo] = value(c, (each_pair ? i : lo) * cs);
    cos[hi] = value(c, (each_pair ? i : hi) * cs);
    sin[lo] = -value(n, (each_pair ? i : lo) * ns);
    sin[hi] = value(n, (each_pair ? i : hi) * ns);
  }
}

struct HeadNorm {
  Moments m;
  const float *weight, *bias;
  bool narrow, layer;
};

template <class T, class Part>
MASKACCEL_INLINE V normed(V v, int64_t i, Part part, const HeadNorm& h) {
  v = mul(sub(v, set1(h.m.mean)), set1(h.m.inverse));
  if (!h.narrow || h.layer) {
    if (h.weight != nullptr) v = mul(v, load(h.weight + i, part));
    if (h.bias != nullptr) v = add(v, load(h.bias + i, part));
    return h.narrow ? rounded(v, T{}) : v;
  }
  v = rounded(v, T{});
  if (h.weight != nullptr) v = rounded(mul(v, load(h.weight + i, part)), T{});
  if (h.bias != nullptr) v = rounded(add(v, load(h.bias + i, part)), T{});
  return v;
}

// Any head size; `buffer` holds the normalised head.
template <class T>
MASKACCEL_INLINE void head_general(const T* x, T* out, int64_t d, const HeadNorm& h, const float* cos, const float* sin,
                                   bool by_half, float* buffer, bool past) {
  if (cos == nullptr) {
    sweep(d, [&](int64_t i, auto part, auto)
                 MASKACCEL_HOT { put(out + i, normed<T>(load(x + i, part), i, part, h), part, past); });
    return;
  }
  sweep(d, [&](int64_t i, auto part, auto)
               MASKACCEL_HOT { store(buffer + i, normed<T>(load(x + i, part), i, part, h), part); });
  if (by_half) {
    const int64_t half = d / 2;
    const auto turn = [&](int64_t from, int64_t pair) {
      sweep(half, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
        const V v = mul(load(buffer + from + i, part), load(cos + from + i, part));
        store(out + from + i, fma(load(buffer + pair + i, part), load(sin + from + i, part), v), part);
      });
    };
    turn(0, half);
    turn(half, 0);
  } else {
    sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      const V n = load(buffer + i, part);
      put(out + i, fma(swap_pairs(n), load(sin + i, part), mul(n, load(cos + i, part))), part, past);
    });
  }
}

// Heads of NV vectors: one load and one store of each element. The statistics too, unless they span the heads.
template <class T, int NV>
MASKACCEL_INLINE void head_registers(const T* x, T* out, HeadNorm h, int norm, float eps, bool own_moments,
                                     const float* cos, const float* sin, bool by_half, bool past) {
  V v[NV];
  for (int i = 0; i < NV; ++i) v[i] = load(x + i * W, Full{});
  if (own_moments && norm != kNormNone) {
    const float n = NV * W;
    h.m.mean = 0.0f;
    V s0 = set1(0.0f), s1 = s0;
    if (norm == kNormLayer) {
      for (int i = 0; i < NV; ++i) (i & 1 ? s1 : s0) = add(i & 1 ? s1 : s0, v[i]);
      h.m.mean = hsum(add(s0, s1)) / n;
      s0 = s1 = set1(0.0f);
    }
    const V mean = set1(h.m.mean);
    for (int i = 0; i < NV; ++i) {
      const V c = sub(v[i], mean);
      (i & 1 ? s1 : s0) = fma(c, c, i & 1 ? s1 : s0);
    }
    h.m.inverse = inverse_root(hsum(add(s0, s1)) / n, eps);
  }
  for (int i = 0; i < NV; ++i) v[i] = normed<T>(v[i], i * W, Full{}, h);
  for (int i = 0; i < NV; ++i) {
    V y = v[i];
    if (cos != nullptr) {
      const V pair = by_half ? v[NV > 1 ? (i + NV / 2) % NV : 0] : swap_pairs(v[i]);
      y = fma(pair, load(sin + i * W, Full{}), mul(v[i], load(cos + i * W, Full{})));
    }
    put(out + i * W, y, Full{}, past);
  }
}

struct HeadPlan {
  bool across, rope, narrow;
  int norm;
};

MASKACCEL_INLINE HeadPlan plan_of(const QkNormRope& s) {
  return {(s.flags & kAcrossHeads) != 0, s.cos != nullptr, (s.flags & kNarrow) && s.dtype != Dtype::f32,
          s.flags & kNormMask};
}

template <class T>
MASKACCEL_INLINE Moments head_moments(const QkNormRope& s, const QkNormRope::Side& q, const T* x, const HeadPlan& p) {
  if (p.norm == kNormNone) return {0.0f, 1.0f};
  if (!p.across) return moments(x, s.Dh, p.norm == kNormRms, s.eps);
  const float n = static_cast<float>(s.Dh * q.H);
  float mean = 0.0f, square = 0.0f;
  if (p.norm == kNormLayer) {
    for (int64_t h = 0; h < q.H; ++h) mean += row_sum(x + h * q.stride_h, s.Dh);
    mean /= n;
  }
  for (int64_t h = 0; h < q.H; ++h) square += squares(x + h * q.stride_h, s.Dh, mean);
  return {mean, inverse_root(square / n, s.eps)};
}

// Weight and bias of a side as fp32 rows of Dh, or H * Dh across heads.
inline void head_affine(const QkNormRope& s, const QkNormRope::Side& q, const HeadPlan& p, float* weight, float* bias) {
  AdalnShape shape;
  shape.D = p.across ? s.Dh * q.H : s.Dh;
  shape.affine_dtype = s.affine_dtype;
  const float plus = s.flags & kWeightPlusOne ? 1.0f : 0.0f;
  if (q.weight != nullptr) build_affine(weight, q.weight, plus, 1.0f, shape, p.narrow && p.norm != kNormLayer);
  if (q.bias != nullptr) build_affine(bias, q.bias, 0.0f, 0.0f, shape, false);
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
