// norm_modulate, gate_residual and their fusion: one pass over memory, the row stays in the nearest cache.
#pragma once

#include "cpu_modulation.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// The rows after the current ones, or null. Their lines are asked for while this row is computed: the hardware does
// not look far enough ahead, and reading memory and computing would take turns.
template <class T>
struct Ahead {
  const T *x, *a;
};
template <class T>
MASKACCEL_INLINE void fetch(const T* next, int64_t i) {
  if (next == nullptr) return;
  __builtin_prefetch(next + i, 0, 2);
  if (2 * W * sizeof(T) > kLine) __builtin_prefetch(next + i + W, 0, 2);
}

// Applies f to both halves of a pair or to the rest of a row: scratch rows in pair order, `row` of S, result of T.
template <class T, class S, class F>
MASKACCEL_INLINE void map_row(const S* row, T* y, int64_t d, bool past, Ahead<T> next, F&& f) {
  sweep2(
      d,
      [&](int64_t i, auto) MASKACCEL_HOT {
        fetch(next.x, i);
        fetch(next.a, i);
        const Two v = load2(row + i);
        put2(y + i, Two{f(v.lo, i, Full{}), f(v.hi, i + W, Full{})}, past);
      },
      [&](int64_t i, auto part, auto) MASKACCEL_HOT { put(y + i, f(load(row + i, part), i, part), part, past); });
}

// y = t * mul + add, t = (row - mean) * inverse
template <class T, class S>
MASKACCEL_INLINE void modulate(const S* row, T* y, int64_t d, Moments m, const Affine& f, bool past, Ahead<T> next) {
  const V mean = set1(m.mean), inverse = set1(m.inverse), start = set1(-m.mean * m.inverse);
  const float *mul_row = f.mul, *add_row = f.add;
  map_row(row, y, d, past, next, [&](V v, int64_t i, auto part) MASKACCEL_HOT {
    // One operation where the result is rounded to 16 bits anyway; fp32 keeps the form that does not lose to a
    // large mean.
    const V t = dtype_of<T> == Dtype::f32 ? mul(sub(v, mean), inverse) : fma(v, inverse, start);
    return fma(t, load(mul_row + i, part), load(add_row + i, part));
  });
}

// The narrow law: rounds to T where eager does.
template <class T, class S>
MASKACCEL_INLINE void modulate_narrow(const S* row, T* y, int64_t d, Moments m, const Affine& f, const float* weight,
                                      const float* bias, bool layer, bool round_product, bool past, Ahead<T> next) {
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  const float *mul_row = f.mul, *add_row = f.add;
  map_row(row, y, d, past, next, [&](V v, int64_t i, auto part) MASKACCEL_HOT {
    V n = mul(sub(v, mean), inverse);
    if (layer) {
      if (weight != nullptr) n = mul(n, load(weight + i, part));
      if (bias != nullptr) n = add(n, load(bias + i, part));
      n = rounded(n, T{});
    } else {
      n = rounded(n, T{});
      if (weight != nullptr) n = rounded(mul(n, load(weight + i, part)), T{});
      if (bias != nullptr) n = rounded(add(n, load(bias + i, part)), T{});
    }
    n = mul(n, load(mul_row + i, part));
    if (round_product) n = rounded(n, T{});
    return add(n, load(add_row + i, part));
  });
}

// r = f(x, a), kept in `keep_row` as stored (rounded to T); returns the sum of the row.
template <class T, class F>
MASKACCEL_INLINE float residual_of(const T* x, const T* a, T* r, float* keep_row, int64_t d, bool clip, bool past,
                                   F&& f) {
  Sum sum = Sum::zero();
  const auto value = [&](V vx, V va, int64_t i, auto part) MASKACCEL_HOT {
    const V v = f(vx, va, i, part);
    return clip ? vmin(set1(65504.0f), vmax(set1(-65504.0f), v)) : v;
  };
  sweep2(
      d,
      [&](int64_t i, auto chain) MASKACCEL_HOT {
        const Two vx = load2(x + i), va = load2(a + i);
        const Two v{value(vx.lo, va.lo, i, Full{}), value(vx.hi, va.hi, i + W, Full{})};
        const Two stored = put2(r != nullptr ? r + i : nullptr, v, past);
        if (keep_row == nullptr) return;
        store2(keep_row + i, stored);
        sum.part[chain.k] = add(sum.part[chain.k], stored.lo);
        sum.part[chain.k + 1] = add(sum.part[chain.k + 1], stored.hi);
      },
      [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
        const V v = value(load(x + i, part), load(a + i, part), i, part);
        if (r != nullptr) put(r + i, v, part, past);
        if (keep_row == nullptr) return;
        const V stored = rounded(v, T{});
        store(keep_row + i, stored, part);
        sum.part[chain.k] = add(sum.part[chain.k], stored);
      });
  return sum.total();
}

// The form with everything: post norm, narrow rounding, no gate.
template <class T>
MASKACCEL_INLINE float residual_general(const T* x, const T* a, T* r, float* keep_row, const AdalnForward& s,
                                        const float* gate, const float* post, Moments m) {
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  const bool narrow = s.flags & kNarrow, layer = (s.flags & kPostMask) == kPostLayer, norm = s.flags & kPostMask;
  const bool round_product = narrow && gate != nullptr && s.mod_dtype == s.dtype;
  return residual_of(x, a, r, keep_row, s.D, s.flags & kClip, s.past_cache,
                     [&](V vx, V p, int64_t i, auto part) MASKACCEL_HOT {
                       if (norm) {
                         p = mul(sub(p, mean), inverse);
                         if (narrow && !layer) p = rounded(p, T{});
                         if (post != nullptr) p = mul(p, load(post + i, part));
                         if (narrow && (layer || post != nullptr)) p = rounded(p, T{});
                       }
                       if (gate != nullptr) p = mul(p, load(gate + i, part));
                       if (round_product) p = rounded(p, T{});
                       return add(vx, p);
                     });
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
  // fp32 law: weight and bias are folded into the modulation rows and not read on their own
  const float *fold_weight = narrow ? nullptr : weight, *fold_bias = narrow ? nullptr : bias;
  if (narrow && weight != nullptr) to_pair_order(weight, d, T{});
  if (narrow && bias != nullptr) to_pair_order(bias, d, T{});
  if (post != nullptr) to_pair_order(post, d, T{});
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
    const bool more = n + 1 < s.N && row + 1 < end;
    const Ahead<T> none{nullptr, nullptr};
    Ahead<T> next{more ? x + s.x.stride_n : nullptr, nullptr};
    T* const r = s.r != nullptr ? static_cast<T*>(s.r) + row * d : nullptr;
    float sum = 0.0f;
    if (gated) {
      const T* a = static_cast<const T*>(s.a.data) + b * s.a.stride_b + n * s.a.stride_n;
      if (more) next.a = a + s.a.stride_n;
      const char* const wanted = row_of(s.gate, s, b, n);
      if (s.gate.present() && (!gate_built || wanted != gate_row)) {
        build_gate(gate, wanted, s.gate, s);
        to_pair_order(gate, d, T{});
        gate_row = wanted;
        gate_built = true;
      }
      float* const kept = s.y != nullptr ? keep_row : nullptr;
      if (simple_gate) {
        sum = residual_of(x, a, r, kept, d, s.flags & kClip, s.past_cache,
                          [&](V vx, V va, int64_t i, auto part)
                              MASKACCEL_HOT { return fma(load(gate + i, part), va, vx); });
      } else {
        const Moments m = post_norm ? moments(a, d, !post_layer, s.post_eps) : Moments{0.0f, 1.0f};
        sum = residual_general(x, a, r, kept, s, s.gate.present() ? gate : nullptr, post, m);
      }
    }
    if (s.y != nullptr) {
      T* const y = static_cast<T*>(s.y) + row * d;
      T* const y2 = pair ? static_cast<T*>(s.y2) + row * d : nullptr;
      refresh(first, s, s.scale, s.shift, fold_weight, fold_bias, b, n, T{});
      if (pair) refresh(second, s, s.scale2, s.shift2, fold_weight, fold_bias, b, n, T{});
      const auto finish = [&](auto* from, Moments m) __attribute__((always_inline)) {
        if (narrow) {
          modulate_narrow(from, y, d, m, first, weight, bias, norm == kNormLayer, round_product, s.past_cache, next);
          if (pair)
            modulate_narrow(from, y2, d, m, second, weight, bias, norm == kNormLayer, round_product2, s.past_cache,
                            none);
        } else {
          modulate(from, y, d, m, first, s.past_cache, next);
          if (pair) modulate(from, y2, d, m, second, s.past_cache, none);
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
