// norm_modulate, gate_residual and their fusion: one pass over memory, the row stays in the nearest cache.
#pragma once

#include "cpu_normed.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

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
  const bool narrow = (s.flags & kNarrow) && s.dtype != Dtype::f32;
  const bool gated = s.a.data != nullptr;
  const bool post_norm = s.flags & kPostMask, post_layer = (s.flags & kPostMask) == kPostLayer;
  const float plus = s.flags & kWeightPlusOne ? 1.0f : 0.0f;

  float* post = nullptr;
  if (s.post_weight != nullptr && post_norm)
    build_affine(post = take(), s.post_weight, plus, 1.0f, s, narrow && !post_layer);
  if (post != nullptr) to_pair_order(post, d, T{});
  NormedRows<T> normed(s, take);
  float* const gate = take();
  float* const keep_row = take();
  const char* gate_row = nullptr;
  bool gate_built = false;
  Unwatched none;
  const bool simple_gate = !narrow && !post_norm && s.gate.present();

  int64_t b = begin / s.N, n = begin - b * s.N;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(s.x.data) + b * s.x.stride_b + n * s.x.stride_n;
    const bool more = n + 1 < s.N && row + 1 < end;
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
      T* const y2 = s.y2 != nullptr ? static_cast<T*>(s.y2) + row * d : nullptr;
      if (gated) {
        normed.row(static_cast<const float*>(keep_row), sum, y, y2, b, n, next);
      } else {
        normed.row(x, y, y2, b, n, next, none);
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
  with_dtype(s.dtype, [&](auto t) { forward_rows<decltype(t)>(s, begin, end); });
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
