// Norm and modulation of rows, one after the other.
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

// Takes no note of what is stored.
struct Unwatched {
  template <class Chain>
  MASKACCEL_HOT void two(int64_t, Two, Chain) {}
  template <class Part, class Chain>
  MASKACCEL_HOT void one(int64_t, V, Part, Chain) {}
};

// Applies f to both halves of a pair or to the rest of a row: scratch rows in pair order, `row` of S, result of T.
// `watch` is shown the result; of a tail the lanes past its end are undefined.
template <class T, class S, class F, class Watch>
MASKACCEL_INLINE void map_row(const S* row, T* y, int64_t d, bool past, Ahead<T> next, Watch& watch, F&& f) {
  sweep2(
      d,
      [&](int64_t i, auto chain) MASKACCEL_HOT {
        fetch(next.x, i);
        fetch(next.a, i);
        const Two v = load2(row + i);
        watch.two(i, put2(y + i, Two{f(v.lo, i, Full{}), f(v.hi, i + W, Full{})}, past), chain);
      },
      [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
        const V v = f(load(row + i, part), i, part);
        put(y + i, v, part, past);
        watch.one(i, v, part, chain);
      });
}

// y = t * mul + add, t = (row - mean) * inverse
template <class T, class S, class Watch>
MASKACCEL_INLINE void modulate(const S* row, T* y, int64_t d, Moments m, const Affine& f, bool past, Ahead<T> next,
                               Watch& watch) {
  const V mean = set1(m.mean), inverse = set1(m.inverse), start = set1(-m.mean * m.inverse);
  const float *mul_row = f.mul, *add_row = f.add;
  map_row(row, y, d, past, next, watch, [&](V v, int64_t i, auto part) MASKACCEL_HOT {
    // One operation where the result is rounded to 16 bits anyway; fp32 keeps the form that does not lose to a
    // large mean.
    const V t = dtype_of<T> == Dtype::f32 ? mul(sub(v, mean), inverse) : fma(v, inverse, start);
    return fma(t, load(mul_row + i, part), load(add_row + i, part));
  });
}

// The narrow law: rounds to T where eager does.
template <class T, class S, class Watch>
MASKACCEL_INLINE void modulate_narrow(const S* row, T* y, int64_t d, Moments m, const Affine& f, const float* weight,
                                      const float* bias, bool layer, bool round_product, bool past, Ahead<T> next,
                                      Watch& watch) {
  const V mean = set1(m.mean), inverse = set1(m.inverse);
  const float *mul_row = f.mul, *add_row = f.add;
  map_row(row, y, d, past, next, watch, [&](V v, int64_t i, auto part) MASKACCEL_HOT {
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

// The norm stage of a forward call: its rows of scratch, and what of them is valid for the next token.
template <class T>
class NormedRows {
 public:
  static constexpr int kRows = 6;  // of scratch, at most

  // `take` gives rows of padded(D) floats.
  template <class Take>
  NormedRows(const AdalnForward& s, Take&& take) : s_(s), norm_(s.flags & kNormMask) {
    // fp32 rounds nowhere in between, so both laws are one; a lone gate stage has no norm to be narrow about
    narrow_ = (s.flags & kNarrow) && s.dtype != Dtype::f32;
    round_product_ = narrow_ && s.mod_dtype == s.dtype && s.scale.present();
    round_product2_ = narrow_ && s.mod_dtype == s.dtype && s.scale2.present();
    const float plus = s.flags & kWeightPlusOne ? 1.0f : 0.0f;
    if (s.weight != nullptr) build_affine(weight_ = take(), s.weight, plus, 1.0f, s, narrow_ && norm_ != kNormLayer);
    if (s.bias != nullptr) build_affine(bias_ = take(), s.bias, 0.0f, 0.0f, s, false);
    // fp32 law: weight and bias are folded into the modulation rows and not read on their own
    fold_weight_ = narrow_ ? nullptr : weight_;
    fold_bias_ = narrow_ ? nullptr : bias_;
    if (narrow_ && weight_ != nullptr) to_pair_order(weight_, s.D, T{});
    if (narrow_ && bias_ != nullptr) to_pair_order(bias_, s.D, T{});
    first_ = {take(), take(), nullptr, nullptr, false};
    if (s.y2 != nullptr) second_ = {take(), take(), nullptr, nullptr, false};
  }

  // y (and y2) of token n of sample b from its row as it is in memory.
  template <class Watch>
  MASKACCEL_HOT void row(const T* x, T* y, T* y2, int64_t b, int64_t n, Ahead<T> next, Watch& watch) {
    finish(x, y, y2, b, n, norm_ == kNormNone ? Moments{0.0f, 1.0f} : moments(x, s_.D, norm_ == kNormRms, s_.eps), next,
           watch);
  }

  // The same of a row of scratch in pair order, whose sum is known.
  MASKACCEL_HOT void row(const float* kept, float sum, T* y, T* y2, int64_t b, int64_t n, Ahead<T> next) {
    Moments m{0.0f, 1.0f};
    if (norm_ != kNormNone) {
      const float d = static_cast<float>(s_.D);
      m.mean = norm_ == kNormLayer ? sum / d : 0.0f;
      m.inverse = inverse_root(squares(kept, s_.D, m.mean) / d, s_.eps);
    }
    Unwatched none;
    finish(kept, y, y2, b, n, m, next, none);
  }

 private:
  template <class S, class Watch>
  MASKACCEL_HOT void finish(const S* from, T* y, T* y2, int64_t b, int64_t n, Moments m, Ahead<T> next, Watch& watch) {
    const int64_t d = s_.D;
    const bool past = s_.past_cache, layer = norm_ == kNormLayer;
    const Ahead<T> nothing{nullptr, nullptr};
    Unwatched none;
    refresh(first_, s_, s_.scale, s_.shift, fold_weight_, fold_bias_, b, n, T{});
    if (y2 != nullptr) refresh(second_, s_, s_.scale2, s_.shift2, fold_weight_, fold_bias_, b, n, T{});
    if (narrow_) {
      modulate_narrow(from, y, d, m, first_, weight_, bias_, layer, round_product_, past, next, watch);
      if (y2 != nullptr)
        modulate_narrow(from, y2, d, m, second_, weight_, bias_, layer, round_product2_, past, nothing, none);
    } else {
      modulate(from, y, d, m, first_, past, next, watch);
      if (y2 != nullptr) modulate(from, y2, d, m, second_, past, nothing, none);
    }
  }

  const AdalnForward& s_;
  const int norm_;
  bool narrow_, round_product_, round_product2_;
  float *weight_ = nullptr, *bias_ = nullptr;
  const float *fold_weight_, *fold_bias_;
  Affine first_{nullptr, nullptr, nullptr, nullptr, false}, second_{nullptr, nullptr, nullptr, nullptr, false};
};

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
