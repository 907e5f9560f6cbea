// Gradients of the adaLN ops. A chunk of tokens sums its share of every modulation and weight gradient in fp32;
// `reduce` adds the shares in a fixed order, so the result does not depend on the number of threads.
#pragma once

#include "cpu_modulation.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// The sums of one gradient while a chunk is walked.
struct Adder {
  const Partial* to;
  float *base, *row;  // row: where the current token adds; null if the gradient is not wanted

  void start_chunk(const Partial& p, int64_t b, int64_t c, int64_t from, int64_t until, int64_t D) {
    to = &p;
    row = nullptr;
    if (p.data == nullptr) return;
    base = p.data + (b * p.per_sample + c * p.per_chunk) * D;
    const int64_t slots = (until - 1) / p.group - from / p.group + 1;
    std::memset(base, 0, static_cast<size_t>(slots * D) * sizeof(float));
  }
  // Where token n adds.
  float* slot(int64_t n, int64_t from, int64_t D) const {
    return to->data == nullptr ? nullptr : base + (n / to->group - from / to->group) * D;
  }
  void at(int64_t n, int64_t from, int64_t D) { row = slot(n, from, D); }
};

// Gradient of the bare normalised row into keep_g, its two sums, and the shares of scale and shift.
template <class T>
MASKACCEL_INLINE void norm_sums(const AdalnBackward& s, const T* x, const T* dy, const T* dy2, float* keep_g, Moments m,
                                const float* mul1, const float* mul2, const float* weight, const float* bias,
                                float* dscale, float* dshift, float* dscale2, float* dshift2, float& plain_out,
                                float& product_out) {
  Sum plain = Sum::zero(), product = Sum::zero();
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  const bool affine = weight != nullptr || bias != nullptr;
  sweep(s.D, [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
    const V t = mul(sub(load(x + i, part), mean), inverse);
    V n = t;
    if (affine) {
      if (weight != nullptr) n = mul(n, load(weight + i, part));
      if (bias != nullptr) n = add(n, load(bias + i, part));
    }
    const V g = load(dy + i, part);
    if (dshift != nullptr) store(dshift + i, add(g, load(dshift + i, part)), part);
    if (dscale != nullptr) store(dscale + i, fma(g, n, load(dscale + i, part)), part);
    V dn = mul(g, load(mul1 + i, part));
    if (dy2 != nullptr) {
      const V g2 = load(dy2 + i, part);
      if (dshift2 != nullptr) store(dshift2 + i, add(g2, load(dshift2 + i, part)), part);
      if (dscale2 != nullptr) store(dscale2 + i, fma(g2, n, load(dscale2 + i, part)), part);
      dn = fma(g2, load(mul2 + i, part), dn);
    }
    store(keep_g + i, dn, part);
    plain.part[chain.k] = add(plain.part[chain.k], dn);
    product.part[chain.k] = fma(dn, t, product.part[chain.k]);
  });
  plain_out = plain.total();
  product_out = product.total();
}

// With a norm weight, keep_g holds dn (before the weight); this adds the weight's and bias's share and applies the
// weight.
template <class T>
MASKACCEL_INLINE void affine_sums(const T* x, float* keep_g, int64_t d, Moments m, const float* weight, float* dweight,
                                  float* dbias, float& plain_out, float& product_out) {
  Sum plain = Sum::zero(), product = Sum::zero();
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  sweep(d, [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
    const V t = mul(sub(load(x + i, part), mean), inverse);
    V dn = load(keep_g + i, part);
    if (dweight != nullptr) store(dweight + i, fma(dn, t, load(dweight + i, part)), part);
    if (dbias != nullptr) store(dbias + i, add(dn, load(dbias + i, part)), part);
    if (weight != nullptr) {
      dn = mul(dn, load(weight + i, part));
      store(keep_g + i, dn, part);
    }
    plain.part[chain.k] = add(plain.part[chain.k], dn);
    product.part[chain.k] = fma(dn, t, product.part[chain.k]);
  });
  plain_out = plain.total();
  product_out = product.total();
}

// keep_g = gradient of the row the norm read; also stored to dx
template <class T>
MASKACCEL_INLINE void norm_dx(const T* x, const T* dr, float* keep_g, T* dx, int64_t d, Moments m, float mean_plain,
                              float mean_product) {
  const V mean = set1(m.mean), inverse = set1(m.inverse), p = set1(mean_plain), q = set1(mean_product);
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V t = mul(sub(load(x + i, part), mean), inverse);
    V g = mul(sub(sub(load(keep_g + i, part), p), mul(t, q)), inverse);
    if (dr != nullptr) g = add(g, load(dr + i, part));
    store(keep_g + i, g, part);
    if (dx != nullptr) store(dx + i, g, part);
  });
}

// From the gradient of r: da and the sums of gate and post weight.
template <class T>
MASKACCEL_INLINE void gate_backward(const T* a, const float* g_row, T* da, int64_t d, const float* gate,
                                    const float* slope, float* dgate) {
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V g = load(g_row + i, part);
    if (da != nullptr) store(da + i, gate != nullptr ? mul(g, load(gate + i, part)) : g, part);
    if (dgate != nullptr) {
      V dg = mul(g, load(a + i, part));
      if (slope != nullptr) dg = mul(dg, load(slope + i, part));
      store(dgate + i, add(dg, load(dgate + i, part)), part);
    }
  });
}

template <class T>
MASKACCEL_INLINE void gate_backward_post(const T* a, float* g_row, T* da, const AdalnBackward& s, const float* gate,
                                         const float* slope, const float* post, float* dgate, float* dpost) {
  const bool layer = (s.flags & kPostMask) == kPostLayer;
  const int64_t d = s.D;
  const Moments m = moments(a, d, !layer, s.post_eps);
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  Sum plain = Sum::zero(), product = Sum::zero();
  sweep(d, [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
    const V t = mul(sub(load(a + i, part), mean), inverse);
    V g = load(g_row + i, part);
    if (dgate != nullptr) {
      V dg = mul(g, post != nullptr ? mul(t, load(post + i, part)) : t);
      if (slope != nullptr) dg = mul(dg, load(slope + i, part));
      store(dgate + i, add(dg, load(dgate + i, part)), part);
    }
    if (gate != nullptr) g = mul(g, load(gate + i, part));
    if (dpost != nullptr) store(dpost + i, fma(g, t, load(dpost + i, part)), part);
    if (post != nullptr) g = mul(g, load(post + i, part));
    store(g_row + i, g, part);
    plain.part[chain.k] = add(plain.part[chain.k], g);
    product.part[chain.k] = fma(g, t, product.part[chain.k]);
  });
  if (da == nullptr) return;
  const float n = static_cast<float>(d);
  const V p = set1(layer ? plain.total() / n : 0.0f), q = set1(product.total() / n);
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V t = mul(sub(load(a + i, part), mean), inverse);
    store(da + i, mul(sub(sub(load(g_row + i, part), p), mul(t, q)), inverse), part);
  });
}

// d act / d gate, next to the activated gate; false if it is 1 everywhere
inline bool build_gate_slope(float* slope, const char* row, const Modulation& m, const AdalnShape& s) {
  const int act = s.flags & kGateActMask;
  if (act == kGateNone) return false;
  combine(slope, row, m.table, s, 0.0f);
  for (int64_t i = 0; i < s.D; ++i) {
    const float v = slope[i];
    if (act == kGateSigmoid1m) {
      const float y = 1.0f / (1.0f + __builtin_expf(v - 1.0f));
      slope[i] = -y * (1.0f - y);
    } else {
      const bool outside = act == kGateClampTanh && (v > 2.0f || v < -2.0f);
      const float y = __builtin_tanhf(v);
      slope[i] = outside ? 0.0f : 1.0f - y * y;
    }
  }
  return true;
}

template <class T>
void backward_chunks_general(const AdalnBackward& s, int64_t begin, int64_t end) {
  const int64_t d = s.D, step = padded(d);
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(step) * 11 * sizeof(float)));
  const auto take = [&] { return (memory += step) - step; };
  const int norm = s.flags & kNormMask;
  const bool normed = s.dy.data != nullptr, gated = s.a.data != nullptr;
  const bool post_norm = s.flags & kPostMask;
  const float plus = s.flags & kWeightPlusOne ? 1.0f : 0.0f;
  float *weight = nullptr, *bias = nullptr, *post = nullptr;
  if (s.weight != nullptr) build_affine(weight = take(), s.weight, plus, 1.0f, s, false);
  if (s.bias != nullptr) build_affine(bias = take(), s.bias, 0.0f, 0.0f, s, false);
  if (s.post_weight != nullptr && post_norm) build_affine(post = take(), s.post_weight, plus, 1.0f, s, false);
  // The weight is folded into `mul` unless its own gradient (or the bias's) needs dn before it.
  const bool affine = s.dweight.data != nullptr || s.dbias.data != nullptr;
  const float* const fold = affine ? nullptr : weight;
  Affine first{take(), take(), nullptr, nullptr, false}, second{take(), take(), nullptr, nullptr, false};
  float *const gate = take(), *const slope = take(), *const keep_g = take();
  const char* gate_row = nullptr;
  bool gate_built = false, sloped = false;
  const Modulation no_shift;

  Adder dgate, dscale, dshift, dscale2, dshift2, dweight, dbias, dpost;
  Adder* const all[] = {&dgate, &dscale, &dshift, &dscale2, &dshift2, &dweight, &dbias, &dpost};
  const Partial* const to[] = {&s.dgate, &s.dscale, &s.dshift, &s.dscale2, &s.dshift2, &s.dweight, &s.dbias, &s.dpost};
  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t until = from + s.chunk < s.N ? from + s.chunk : s.N;
    for (int k = 0; k < 8; ++k) all[k]->start_chunk(*to[k], b, c - b * s.chunks, from, until, d);
    for (int64_t n = from; n < until; ++n) {
      for (Adder* one : all) one->at(n, from, d);
      const auto row_at = [&](const Rows& t) {
        return t.data == nullptr ? nullptr : static_cast<const T*>(t.data) + b * t.stride_b + n * t.stride_n;
      };
      const int64_t out_row = (b * s.N + n) * d;
      const T *const dr = row_at(s.dr), *const dy = row_at(s.dy), *const dy2 = row_at(s.dy2), *const x = row_at(s.x);
      T* const dx = s.dx != nullptr ? static_cast<T*>(s.dx) + out_row : nullptr;
      T* const da = s.da != nullptr ? static_cast<T*>(s.da) + out_row : nullptr;
      if (normed) {
        refresh(first, s, s.scale, no_shift, fold, nullptr, b, n, float{});
        if (dy2 != nullptr) refresh(second, s, s.scale2, no_shift, fold, nullptr, b, n, float{});
        const Moments m = norm == kNormNone ? Moments{0.0f, 1.0f} : moments(x, d, norm == kNormRms, s.eps);
        float plain, product;
        norm_sums(s, x, dy, dy2, keep_g, m, first.mul, second.mul, weight, bias, dscale.row, dshift.row, dscale2.row,
                  dshift2.row, plain, product);
        if (affine) affine_sums(x, keep_g, d, m, weight, dweight.row, dbias.row, plain, product);
        if (dx != nullptr || gated) {
          const float size = static_cast<float>(d);
          norm_dx(x, dr, keep_g, dx, d, m, norm == kNormLayer ? plain / size : 0.0f,
                  norm == kNormNone ? 0.0f : product / size);
        }
      } else {
        sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT { store(keep_g + i, load(dr + i, part), part); });
      }
      if (!gated) continue;
      const T* const a = row_at(s.a);
      const char* const wanted = row_of(s.gate, s, b, n);
      if (s.gate.present() && (!gate_built || wanted != gate_row)) {
        build_gate(gate, wanted, s.gate, s);
        sloped = build_gate_slope(slope, wanted, s.gate, s);
        gate_row = wanted;
        gate_built = true;
      }
      const float* const g = s.gate.present() ? gate : nullptr;
      if (post_norm) {
        gate_backward_post(a, keep_g, da, s, g, sloped ? slope : nullptr, post, dgate.row, dpost.row);
      } else {
        gate_backward(a, keep_g, da, d, g, sloped ? slope : nullptr, dgate.row);
      }
    }
  }
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel

#include "cpu_backward_plain.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

template <class T>
void backward_chunks(const AdalnBackward& s, int64_t begin, int64_t end) {
  if (is_plain(s)) return backward_chunks_plain<T>(s, begin, end);
  backward_chunks_general<T>(s, begin, end);
}

void backward(const AdalnBackward& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { backward_chunks<decltype(t)>(s, begin, end); });
}

void reduce(const AdalnReduce& r, int64_t begin, int64_t end) {
  const int64_t per_sample = (r.N + r.group - 1) / r.group;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t ob = o / per_sample, row = o - ob * per_sample;
    float* const out = r.out + o * r.D;
    std::memset(out, 0, static_cast<size_t>(r.D) * sizeof(float));
    const int64_t first = row * r.group / r.chunk;
    const int64_t end_token = (row + 1) * r.group < r.N ? (row + 1) * r.group : r.N;
    for (int64_t b = r.out_b == 1 ? 0 : ob; b < (r.out_b == 1 ? r.B : ob + 1); ++b) {
      for (int64_t c = first; c * r.chunk < end_token; ++c) {
        const int64_t slot = b * r.per_sample + c * r.per_chunk + row - c * r.chunk / r.group;
        const float* const from = r.partial + slot * r.D;
        sweep(r.D, [&](int64_t i, auto part, auto)
                       MASKACCEL_HOT { store(out + i, add(load(out + i, part), load(from + i, part)), part); });
      }
    }
  }
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
