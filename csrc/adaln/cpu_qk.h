// qk_norm_rope: the norm of each head (or of all heads of a token) and its rotation, row by row, and the gradients.
#pragma once

#include "cpu_heads.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

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
  with_dtype(s.dtype, [&](auto t) { qk_forward_of<decltype(t)>(s, which, begin, end); });
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
  with_dtype(s.dtype, [&](auto t) { qk_chunks<decltype(t)>(s, which, begin, end); });
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
