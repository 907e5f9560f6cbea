// qk_norm_rope: the norm of each head (or of all heads of a token) and its rotation, without leaving the registers.
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

template <class T, int NV>
void qk_rows(const QkNormRope& s, int which, int64_t begin, int64_t end) {
  const HeadPlan p = plan_of(s);
  const int first = which == 2 ? 0 : which, last = which == 2 ? 1 : which;
  const int64_t step = padded(s.Dh);
  const int64_t wide = p.across ? padded(s.Dh * (s.side[0].H > s.side[1].H ? s.side[0].H : s.side[1].H)) : step;
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(3 * step + 4 * wide) * sizeof(float)));
  float *const cos = memory, *const sin = memory + step, *const buffer = memory + 2 * step;
  float *weight[2], *bias[2];
  for (int i = first; i <= last; ++i) {
    weight[i] = memory + 3 * step + 2 * i * wide;
    bias[i] = weight[i] + wide;
    head_affine(s, s.side[i], p, weight[i], bias[i]);
  }
  const bool by_half = s.flags & kRopeHalf;
  const int64_t tokens = s.side[first].S;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / tokens, token = row - b * tokens;
    if (p.rope && !s.table_per_head) build_rotation(cos, sin, s, b, token, 0);
    for (int i = first; i <= last; ++i) {
      const QkNormRope::Side& q = s.side[i];
      const T* x = static_cast<const T*>(q.x) + b * q.stride_b + token * q.stride_s;
      T* out = static_cast<T*>(q.out) + row * q.H * s.Dh;
      HeadNorm norm{{0.0f, 1.0f}, nullptr, nullptr, p.narrow, p.norm == kNormLayer};
      if (p.across) norm.m = head_moments(s, q, x, p);
      for (int64_t h = 0; h < q.H; ++h, x += q.stride_h, out += s.Dh) {
        if (p.rope && s.table_per_head) build_rotation(cos, sin, s, b, token, h);
        norm.weight = q.weight != nullptr ? weight[i] + (p.across ? h * s.Dh : 0) : nullptr;
        norm.bias = q.bias != nullptr ? bias[i] + (p.across ? h * s.Dh : 0) : nullptr;
        if constexpr (NV > 0) {
          head_registers<T, NV>(x, out, norm, p.norm, s.eps, !p.across, p.rope ? cos : nullptr, sin, by_half,
                                s.past_cache);
        } else {
          if (!p.across) norm.m = head_moments(s, q, x, p);
          head_general(x, out, s.Dh, norm, p.rope ? cos : nullptr, sin, by_half, buffer, s.past_cache);
        }
      }
    }
  }
  if (s.past_cache) stream_end();
}

template <class T>
void qk_forward_of(const QkNormRope& s, int which, int64_t begin, int64_t end) {
  if (s.Dh == 64) return qk_rows<T, 64 / W>(s, which, begin, end);
  if (s.Dh == 128) return qk_rows<T, 128 / W>(s, which, begin, end);
  qk_rows<T, 0>(s, which, begin, end);
}

void qk_forward(const QkNormRope& s, int which, int64_t begin, int64_t end) {
  switch (s.dtype) {
    case Dtype::bf16:
      return qk_forward_of<bf16>(s, which, begin, end);
    case Dtype::f16:
      return qk_forward_of<f16>(s, which, begin, end);
    default:
      return qk_forward_of<float>(s, which, begin, end);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// One head: gradient through the rotation, then through the norm; adds to the weight and bias sums of the chunk.
template <class T>
MASKACCEL_INLINE void unrotate(const T* dy, float* dn, int64_t d, const float* cos, const float* sin, bool by_half) {
  if (cos == nullptr) {
    sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT { store(dn + i, load(dy + i, part), part); });
  } else if (by_half) {
    const int64_t half = d / 2;
    sweep(half, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      const V lo = load(dy + i, part), hi = load(dy + half + i, part);
      store(dn + i, fma(hi, load(sin + half + i, part), mul(lo, load(cos + i, part))), part);
      store(dn + half + i, fma(lo, load(sin + i, part), mul(hi, load(cos + half + i, part))), part);
    });
  } else {
    sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      const V g = load(dy + i, part);
      store(dn + i, add(mul(g, load(cos + i, part)), swap_pairs(mul(g, load(sin + i, part)))), part);
    });
  }
}

struct HeadSums {
  float plain, product;  // sum of dn * weight, and of that times the normalised value
};

template <class T>
MASKACCEL_INLINE HeadSums head_sums(const T* x, float* dn, int64_t d, Moments m, const float* weight, float* dweight,
                                    float* dbias) {
  Sum plain = Sum::zero(), product = Sum::zero();
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  sweep(d, [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
    const V t = mul(sub(load(x + i, part), mean), inverse);
    V g = load(dn + i, part);
    if (dweight != nullptr) store(dweight + i, fma(g, t, load(dweight + i, part)), part);
    if (dbias != nullptr) store(dbias + i, add(g, load(dbias + i, part)), part);
    if (weight != nullptr) {
      g = mul(g, load(weight + i, part));
      store(dn + i, g, part);
    }
    g = keep(g, part);
    plain.part[chain.k] = add(plain.part[chain.k], g);
    product.part[chain.k] = fma(g, t, product.part[chain.k]);
  });
  return {plain.total(), product.total()};
}

template <class T>
MASKACCEL_INLINE void head_dx(const T* x, const float* dn, T* dx, int64_t d, Moments m, float mean_plain,
                              float mean_product) {
  const V mean = set1(m.mean), inverse = set1(m.inverse), p = set1(mean_plain), q = set1(mean_product);
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V t = mul(sub(load(x + i, part), mean), inverse);
    const V g = sub(sub(load(dn + i, part), p), mul(t, q));
    store(dx + i, mul(g, inverse), part);
  });
}

template <class T>
void qk_chunks(const QkNormRope& s, int which, int64_t begin, int64_t end) {
  const HeadPlan p = plan_of(s);
  const QkNormRope::Side& q = s.side[which];
  const int64_t d = s.Dh, heads = q.H, step = padded(d), wide = p.across ? padded(d * heads) : step;
  float* memory =
      static_cast<float*>(scratch(static_cast<size_t>(2 * step + 2 * wide + padded(d * heads)) * sizeof(float)));
  float *const cos = memory, *const sin = memory + step, *const weight = memory + 2 * step;
  float* const dn = weight + 2 * wide;  // a whole token: statistics may span its heads
  head_affine(s, q, p, weight, weight + wide);
  const int64_t row_size = p.across ? d * heads : d;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t to = from + s.chunk < q.S ? from + s.chunk : q.S;
    float* const dw = q.dweight != nullptr ? q.dweight + c * row_size : nullptr;
    float* const db = q.dbias != nullptr ? q.dbias + c * row_size : nullptr;
    if (dw != nullptr) std::memset(dw, 0, static_cast<size_t>(row_size) * sizeof(float));
    if (db != nullptr) std::memset(db, 0, static_cast<size_t>(row_size) * sizeof(float));
    for (int64_t token = from; token < to; ++token) {
      if (p.rope && !s.table_per_head) build_rotation(cos, sin, s, b, token, 0);
      const T* const x = static_cast<const T*>(q.x) + b * q.stride_b + token * q.stride_s;
      const T* const dy = static_cast<const T*>(q.dy) + b * q.dy_b + token * q.dy_s;
      T* const dx = q.out != nullptr ? static_cast<T*>(q.out) + (b * q.S + token) * heads * d : nullptr;
      const auto part_of = [&](float* row, int64_t h) {
        return row == nullptr ? nullptr : row + (p.across ? h * d : 0);
      };
      const auto gradient = [&](int64_t h, Moments m) {
        if (p.rope && s.table_per_head) build_rotation(cos, sin, s, b, token, h);
        unrotate(dy + h * q.dy_h, dn + h * d, d, p.rope ? cos : nullptr, sin, s.flags & kRopeHalf);
        return head_sums(x + h * q.stride_h, dn + h * d, d, m, q.weight != nullptr ? part_of(weight, h) : nullptr,
                         part_of(dw, h), part_of(db, h));
      };
      const auto write = [&](int64_t h, Moments m, HeadSums sums, float n) {
        const bool none = p.norm == kNormNone;
        head_dx(x + h * q.stride_h, dn + h * d, dx + h * d, d, m, p.norm == kNormLayer ? sums.plain / n : 0.0f,
                none ? 0.0f : sums.product / n);
      };
      if (p.across) {
        const Moments m = head_moments(s, q, x, p);
        HeadSums all{0.0f, 0.0f};
        for (int64_t h = 0; h < heads; ++h) {
          const HeadSums one = gradient(h, m);
          all.plain += one.plain;
          all.product += one.product;
        }
        if (dx != nullptr)
          for (int64_t h = 0; h < heads; ++h) write(h, m, all, static_cast<float>(d * heads));
      } else {
        for (int64_t h = 0; h < heads; ++h) {
          const Moments m = head_moments(s, q, x + h * q.stride_h, p);
          const HeadSums sums = gradient(h, m);
          if (dx != nullptr) write(h, m, sums, static_cast<float>(d));
        }
      }
    }
  }
}

void qk_backward(const QkNormRope& s, int which, int64_t begin, int64_t end) {
  switch (s.dtype) {
    case Dtype::bf16:
      return qk_chunks<bf16>(s, which, begin, end);
    case Dtype::f16:
      return qk_chunks<f16>(s, which, begin, end);
    default:
      return qk_chunks<float>(s, which, begin, end);
  }
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
