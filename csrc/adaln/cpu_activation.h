// swiglu, geglu and gelu_tanh with their derivatives, on vectors.
#pragma once

#include "../common/vec_math.h"
#include "cpu_args.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

MASKACCEL_INLINE V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), vexp(sub(set1(0.0f), x)))); }

// The normal distribution function. Near zero by a fit of erf(t) / t - 1 in t^2; outside by one of -log(erfc(t)) -
// t^2, which keeps the relative accuracy of the negative tail.
MASKACCEL_INLINE V normal_cdf(V x) {
  constexpr float inner[] = {0.12837917f,   -0.37612632f,   0.11283671f,  -0.026858032f,
                             0.0051976424f, -0.0008104442f, 8.209797e-05f};
  constexpr float outer[] = {-0.00029628683f, 1.130213f,      -0.3683108f,    0.11042361f,     -0.026782896f,
                             0.004971698f,    -0.0006710618f, 6.1507395e-05f, -3.4018533e-06f, 8.530819e-08f};
  const V t = mul(vabs(x), set1(0.707106781f));
  const V s = mul(t, t);
  const V erf = fma(polynomial(s, inner, 6), t, t);
  const V tail = vexp(sub(set1(0.0f), add(s, polynomial(vmin(t, set1(6.0f)), outer, 9))));
  V upper = less(t, set1(0.93f), sub(set1(1.0f), erf), tail);  // erfc(t)
  upper = less(t, set1(6.0f), upper, set1(0.0f));
  const V half = mul(set1(0.5f), upper);
  const V result = less(x, set1(0.0f), half, sub(set1(1.0f), half));
  return less(s, set1(__builtin_inff()), result, add(result, mul(x, set1(0.0f))));  // a NaN stays one
}

// act(x), and its derivative in `slope`
template <int KIND, bool SLOPE>
MASKACCEL_INLINE V activate(V x, V& slope) {
  if constexpr (KIND == kSwiglu) {
    const V s = sigmoid(x);
    const V y = mul(x, s);
    if constexpr (SLOPE) slope = fma(y, sub(set1(1.0f), s), s);
    return y;
  } else if constexpr (KIND == kGeglu) {
    const V p = normal_cdf(x);
    if constexpr (SLOPE) slope = fma(mul(x, set1(0.398942280f)), vexp(mul(mul(x, x), set1(-0.5f))), p);
    return mul(x, p);
  } else {
    // 0.5 (1 + tanh(u)) is sigmoid(2u): no cancellation in the negative tail
    const V square = mul(x, x);
    const V twice_u = mul(mul(x, set1(1.59576912f)), fma(square, set1(0.044715f), set1(1.0f)));
    const V s = sigmoid(twice_u);
    const V y = mul(x, s);
    if constexpr (SLOPE) {
      const V inner = mul(set1(1.59576912f), fma(square, set1(0.134145f), set1(1.0f)));
      slope = fma(mul(y, sub(set1(1.0f), s)), inner, s);
    }
    return y;
  }
}

template <class T, int KIND>
void activation_rows(const GatedActivation& a, int64_t begin, int64_t end) {
  const int64_t m = a.width, value_at = a.flags & kGateFirst ? m : 0, gate_at = m - value_at;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    T* const y = static_cast<T*>(a.out) + row * m;
    V unused;
    sweep(m, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      if constexpr (KIND == kGeluTanh) {
        store(y + i, activate<KIND, false>(load(x + i, part), unused), part);
      } else {
        store(y + i, mul(load(x + value_at + i, part), activate<KIND, false>(load(x + gate_at + i, part), unused)),
              part);
      }
    });
  }
}

template <class T, int KIND>
void activation_backward_rows(const GatedActivation& a, int64_t begin, int64_t end) {
  const int64_t m = a.width, value_at = a.flags & kGateFirst ? m : 0, gate_at = m - value_at;
  const int64_t full = KIND == kGeluTanh ? m : 2 * m;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    const T* dy = static_cast<const T*>(a.dy) + row * a.stride_dy;
    T* const dx = static_cast<T*>(a.out) + row * full;
    sweep(m, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      V slope;
      const V g = load(dy + i, part);
      if constexpr (KIND == kGeluTanh) {
        activate<KIND, true>(load(x + i, part), slope);
        store(dx + i, mul(g, slope), part);
      } else {
        const V y = activate<KIND, true>(load(x + gate_at + i, part), slope);
        store(dx + value_at + i, mul(g, y), part);
        store(dx + gate_at + i, mul(mul(g, load(x + value_at + i, part)), slope), part);
      }
    });
  }
}

template <class T>
void activation_of(const GatedActivation& a, int64_t begin, int64_t end, bool backward) {
  const auto run = [&](auto kind) MASKACCEL_HOT {
    constexpr int k = decltype(kind)::k;
    backward ? activation_backward_rows<T, k>(a, begin, end) : activation_rows<T, k>(a, begin, end);
  };
  switch (a.flags & kActivationMask) {
    case kSwiglu:
      return run(Chain<kSwiglu>{});
    case kGeglu:
      return run(Chain<kGeglu>{});
    default:
      return run(Chain<kGeluTanh>{});
  }
}

void activation_any(const GatedActivation& a, int64_t begin, int64_t end, bool backward) {
  switch (a.dtype) {
    case Dtype::bf16:
      return activation_of<bf16>(a, begin, end, backward);
    case Dtype::f16:
      return activation_of<f16>(a, begin, end, backward);
    default:
      return activation_of<float>(a, begin, end, backward);
  }
}
void activation(const GatedActivation& a, int64_t begin, int64_t end) { activation_any(a, begin, end, false); }
void activation_backward(const GatedActivation& a, int64_t begin, int64_t end) { activation_any(a, begin, end, true); }

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
