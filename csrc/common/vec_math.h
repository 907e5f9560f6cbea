// Functions of fp32 vectors.
#pragma once

#include "vec.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

MASKACCEL_INLINE V polynomial(V x, const float* c, int degree) {
  V r = set1(c[degree]);
  for (int i = degree - 1; i >= 0; --i) r = fma(r, x, set1(c[i]));
  return r;
}

// e^x within 2 ulp; inf above 88.7, 0 below -104. Coefficients: Chebyshev fit of (e^r - 1 - r) / r^2 on +-ln(2) / 2.
MASKACCEL_INLINE V vexp(V x) {
  constexpr float c[] = {0.5f, 0.16666667f, 0.041666467f, 0.008333298f, 0.0013933651f, 0.00019899286f};
  x = vmin(set1(89.0f), vmax(set1(-105.0f), x));
  const V n = vround(mul(x, set1(1.44269504f)));
  const V r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), x));
  const V tail = fma(mul(r, r), polynomial(r, c, 5), r);
  return mul(add(set1(1.0f), tail), pow2(n));
}

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
