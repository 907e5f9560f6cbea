// norm_modulate, gate_residual and their fusion: one pass over memory, the row stays in the nearest cache.
#pragma once

#include "cpu_modulation.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// y = t * mul + add, t = (row - mean) * inverse
template <class T, class S>
MASKACCEL_INLINE void modulate(const S* row, T* y, int64_t d, Moments m, const Affine& f, bool past) {
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  const float *mul_row = f.mul, *add_row = f.add;
  sweep(d, [&](int64_t i, auto part, auto) {
    const V t = mul(sub(load(row + i, part), mean), inverse);
    put(y + i, fma(t, load(mul_row + i, part), load(add_row + i, part)), part, past);
  });
}

// The narrow law: rounds to T where eager does.
template <class T, class S>
MASKACCEL_INLINE void modulate_narrow(const S* row, T* y, int64_t d, Moments m, const Affine& f, const float* weight,
                                      const float* bias, bool layer, bool round_product, bool past) {
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  sweep(d, [&](int64_t i, auto part, auto) {
    V n = mul(sub(load(row + i, part), mean), inverse);
    if (layer) {
      if (weight != nullptr) n = mul(n, load(weight + i, part));
      if (bias != nullptr) n = add(n, load(bias + i, part));
      n = rounded(n, T{});
    } else {
      n = rounded(n, T{});
      if (weight != nullptr) n = rounded(mul(n, load(weight + i, part)), T{});
      if (bias != nullptr) n = rounded(add(n, load(bias + i, part)), T{});
    }
    n = mul(n, load(f.mul + i, part));
    if (round_product) n = rounded(n, T{});
    put(y + i, add(n, load(f.add + i, part)), part, past);
  });
}

// r = x + gate * t(a) * post, kept in `keep_row` as stored (rounded to T); returns the sum of the row.
template <class T>
MASKACCEL_INLINE float residual(const T* x, const T* a, T* r, float* keep_row, int64_t d, const float* gate, bool clip,
                                bool past) {
  Sum sum = Sum::zero();
  const V high = set1(65504.0f), low = set1(-65504.0f);
  sweep(d, [&](int64_t i, auto part, auto chain) {
    V v = fma(load(gate + i, part), load(a + i, part), load(x + i, part));
    if (clip) v = vmin(high, vmax(low, v));
    if (r != nullptr) put(r + i, v, part, past);
    if (keep_row != nullptr) {
      v = rounded(v, T{});
      store(keep_row + i, v, part);
      sum.part[chain.k] = add(sum.part[chain.k], v);
    }
  });
  return sum.total();
}

// The general form: post norm, narrow rounding, no gate.
template <class T>
MASKACCEL_INLINE float residual_general(const T* x, const T* a, T* r, float* keep_row, const AdalnForward& s,
                                        const float* gate, const float* post, Moments m, bool past) {
  Sum sum = Sum::zero();
  const V high = set1(65504.0f), low = set1(-65504.0f), mean = set1(m.mean), inverse = set1(m.inverse);
  const bool clip = s.flags & kClip, narrow = s.flags & kNarrow, layer = (s.flags & kPostMask) == kPostLayer;
  const bool norm = s.flags & kPostMask, round_product = narrow && gate != nullptr && s.mod_dtype == s.dtype;
  sweep(s.D, [&](int64_t i, auto part, auto chain) {
    V p = load(a + i, part);
    if (norm) {
      p = mul(sub(p, mean), inverse);
      if (narrow && !layer) p = rounded(p, T{});
      if (post != nullptr) p = mul(p, load(post + i, part));
      if (narrow && (layer || post != nullptr)) p = rounded(p, T{});
    }
    if (gate != nullptr) p = mul(p, load(gate + i, part));
    if (round_product) p = rounded(p, T{});
    V v = add(load(x + i, part), p);
    if (clip) v = vmin(high, vmax(low, v));
    if (r != nullptr) put(r + i, v, part, past);
    if (keep_row != nullptr) {
      v = rounded(v, T{});
      store(keep_row + i, v, part);
      sum.part[chain.k] = add(sum.part[chain.k], v);
    }
  });
  return sum.total();
}

template <class T>
void forward_rows(const AdalnForward& s, int64_t begin, int64_t end) {
  const int64_t d = s.D, step = padded(d);
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(step) * 9 * sizeof(float)));
  const auto take = [&] { return (memory += step) - step; };
  const int norm = s.flags & kNormMask;
  // fp32 rounds nowhere in between, so both laws are one; a lone gate stage has no norm to be narrow about
  const bool narrow = (s.flags & kNarrow) && s.dtype != Dtype::f32;
  const bool round_product = narrow && s.mod_dtype == s.dtype && (s.scale.present());
  const bool round_product2 = narrow && s.mod_dtype == s.dtype && (s.scale2.present());
  const bool gated = s.a.data != nullptr, pair = s.y2 != nullptr;
  const bool post_norm = s.flags & kPostMask, post_layer = (s.flags & kPostMask) == kPostLayer;
  const float plus = s.flags & kWeightPlusOne ? 1.0f : 0.0f;

  float *weight = nullptr, *bias = nullptr, *post = nullptr;
  if (s.weight != nullptr) build_affine(weight = take(), s.weight, plus, 1.0f, s, narrow && norm != kNormLayer);
  if (s.bias != nullptr) build_affine(bias = take(), s.bias, 0.0f, 0.0f, s, false);
  if (s.post_weight != nullptr && post_norm)
    build_affine(post = take(), s.post_weight, plus, 1.0f, s, narrow && !post_layer);
  const float *fold_weight = narrow ? nullptr : weight, *fold_bias = narrow ? nullptr : bias;
  Affine first{take(), take(), nullptr, nullptr, false}, second{nullptr, nullptr, nullptr, nullptr, false};
  if (pair) second = {take(), take(), nullptr, nullptr, false};
  float* const gate = take();
  float* const keep_row = take();
  const char* gate_row = nullptr;
  bool gate_built = false;
  const bool simple_gate = !narrow && !post_norm && s.gate.present();

  int64_t b = begin / s.N, n = begin - b * s.N;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(s.x.data) + b * s.x.stride_b + n * s.x.stride_n;
    T* const r = s.r != nullptr ? static_cast<T*>(s.r) + row * d : nullptr;
    float sum = 0.0f;
    if (gated) {
      const T* a = static_cast<const T*>(s.a.data) + b * s.a.stride_b + n * s.a.stride_n;
      const char* const wanted = row_of(s.gate, s, b, n);
      if (s.gate.present() && (!gate_built || wanted != gate_row)) {
        build_gate(gate, wanted, s.gate, s);
        gate_row = wanted;
        gate_built = true;
      }
      float* const kept = s.y != nullptr ? keep_row : nullptr;
      if (simple_gate) {
        sum = residual(x, a, r, kept, d, gate, s.flags & kClip, s.past_cache);
      } else {
        const Moments m = post_norm ? moments(a, d, !post_layer, s.post_eps) : Moments{0.0f, 1.0f};
        sum = residual_general(x, a, r, kept, s, s.gate.present() ? gate : nullptr, post, m, s.past_cache);
      }
    }
    if (s.y != nullptr) {
      T* const y = static_cast<T*>(s.y) + row * d;
      T* const y2 = pair ? static_cast<T*>(s.y2) + row * d : nullptr;
      refresh(first, s, s.scale, s.shift, fold_weight, fold_bias, b, n);
      if (pair) refresh(second, s, s.scale2, s.shift2, fold_weight, fold_bias, b, n);
      const auto finish = [&](auto* from, Moments m) __attribute__((always_inline)) {
        if (narrow) {
          modulate_narrow(from, y, d, m, first, weight, bias, norm == kNormLayer, round_product, s.past_cache);
          if (pair) modulate_narrow(from, y2, d, m, second, weight, bias, norm == kNormLayer, round_product2, s.past_cache);
        } else {
          modulate(from, y, d, m, first, s.past_cache);
          if (pair) modulate(from, y2, d, m, second, s.past_cache);
        }
      };
      if (gated) {
        Moments m{0.0f, 1.0f};
        if (norm != kNormNone) {
          m.mean = norm == kNormLayer ? sum / static_cast<float>(d) : 0.0f;
          m.inverse = inverse_root(squares(keep_row, d, m.mean) / static_cast<float>(d), s.eps);
        }
        finish(static_cast<const float*>(keep_row), m);
      } else {
        finish(x, norm == kNormNone ? Moments{0.0f, 1.0f} : moments(x, d, norm == kNormRms, s.eps));
      }
    }
    if (++n == s.N) {
      n = 0;
      ++b;
    }
  }
  if (s.past_cache) stream_end();
}

void forward(const AdalnForward& s, int64_t begin, int64_t end) {
  switch (s.dtype) {
    case Dtype::bf16:
      return forward_rows<bf16>(s, begin, end);
    case Dtype::f16:
      return forward_rows<f16>(s, begin, end);
    default:
      return forward_rows<float>(s, begin, end);
  }
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
