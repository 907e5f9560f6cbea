// The common gradient: one modulated output, a norm without affine, no sandwich norm. Two tokens at a time, so that
// the sums they share are loaded and stored half as often.
#pragma once

#include "cpu_backward.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

MASKACCEL_INLINE bool is_plain(const AdalnBackward& s) {
  return s.dy.data != nullptr && s.dy2.data == nullptr && s.weight == nullptr && s.bias == nullptr &&
         (s.a.data == nullptr || !(s.flags & kPostMask)) && s.dscale2.data == nullptr && s.dshift2.data == nullptr;
}

template <class T>
struct PlainToken {
  const T *x, *dy, *dr, *a;
  T *dx, *da;
  V mean, inverse, mean_plain, mean_product;
};

// Rows that a group of tokens shares, all in the pair order of T.
struct PlainShared {
  const float *mul, *gate, *slope;
  float *dscale, *dshift, *dgate;
};

// The sums over the row that the gradient of a norm needs, and the shares of scale and shift.
template <class T, int R>
MASKACCEL_INLINE void plain_sums(PlainToken<T>* tokens, const PlainShared& s, int64_t d, int norm) {
  Sum plain[R], product[R];
  for (int r = 0; r < R; ++r) plain[r] = product[r] = Sum::zero();
  const auto step = [&](const V* x, const V* dy, int64_t i, auto part, auto chain) MASKACCEL_HOT {
    const V m = load(s.mul + i, part);
    V shift = set1(0.0f), scale = set1(0.0f);
    for (int r = 0; r < R; ++r) {
      const V t = mul(sub(x[r], tokens[r].mean), tokens[r].inverse), dn = mul(dy[r], m);
      plain[r].part[chain.k] = add(plain[r].part[chain.k], dn);
      product[r].part[chain.k] = fma(dn, t, product[r].part[chain.k]);
      shift = add(shift, dy[r]);
      scale = fma(dy[r], t, scale);
    }
    if (s.dshift != nullptr) store(s.dshift + i, add(load(s.dshift + i, part), shift), part);
    if (s.dscale != nullptr) store(s.dscale + i, add(load(s.dscale + i, part), scale), part);
  };
  sweep2(
      d,
      [&](int64_t i, auto chain) MASKACCEL_HOT {
        V x[2][R], dy[2][R];
        for (int r = 0; r < R; ++r) {
          const Two vx = load2(tokens[r].x + i), vy = load2(tokens[r].dy + i);
          x[0][r] = vx.lo, x[1][r] = vx.hi, dy[0][r] = vy.lo, dy[1][r] = vy.hi;
        }
        step(x[0], dy[0], i, Full{}, chain);
        step(x[1], dy[1], i + W, Full{}, Chain<decltype(chain)::k + 1>{});
      },
      [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
        V x[R], dy[R];
        for (int r = 0; r < R; ++r) x[r] = load(tokens[r].x + i, part), dy[r] = load(tokens[r].dy + i, part);
        step(x, dy, i, part, chain);
      });
  for (int r = 0; r < R; ++r) {
    const float n = static_cast<float>(d);
    tokens[r].mean_plain = set1(norm == kNormLayer ? plain[r].total() / n : 0.0f);
    tokens[r].mean_product = set1(norm == kNormNone ? 0.0f : product[r].total() / n);
  }
}

// dx, and from it da and the share of the gate.
template <class T, int R>
MASKACCEL_INLINE void plain_gradients(const PlainToken<T>* tokens, const PlainShared& s, int64_t d, bool past) {
  const bool gated = tokens[0].a != nullptr, residual = tokens[0].dr != nullptr;
  const auto gradient = [&](const PlainToken<T>& k, V x, V dy, V m) MASKACCEL_HOT {
    const V t = mul(sub(x, k.mean), k.inverse);
    return mul(sub(sub(mul(dy, m), k.mean_plain), mul(t, k.mean_product)), k.inverse);
  };
  const auto add_gate = [&](V sum, int64_t i, auto part) MASKACCEL_HOT {
    if (s.slope != nullptr) sum = mul(sum, load(s.slope + i, part));
    store(s.dgate + i, add(load(s.dgate + i, part), sum), part);
  };
  sweep2(
      d,
      [&](int64_t i, auto) MASKACCEL_HOT {
        const V m0 = load(s.mul + i, Full{}), m1 = load(s.mul + i + W, Full{});
        V gate0 = set1(0.0f), gate1 = set1(0.0f);
        for (int r = 0; r < R; ++r) {
          const PlainToken<T>& k = tokens[r];
          const Two x = load2(k.x + i), dy = load2(k.dy + i);
          Two g{gradient(k, x.lo, dy.lo, m0), gradient(k, x.hi, dy.hi, m1)};
          if (residual) {
            const Two dr = load2(k.dr + i);
            g = {add(g.lo, dr.lo), add(g.hi, dr.hi)};
          }
          if (k.dx != nullptr) put2(k.dx + i, g, past);
          if (!gated) continue;
          if (s.dgate != nullptr) {
            const Two a = load2(k.a + i);
            gate0 = fma(g.lo, a.lo, gate0);
            gate1 = fma(g.hi, a.hi, gate1);
          }
          if (k.da == nullptr) continue;
          if (s.gate != nullptr) g = {mul(g.lo, load(s.gate + i, Full{})), mul(g.hi, load(s.gate + i + W, Full{}))};
          put2(k.da + i, g, past);
        }
        if (s.dgate == nullptr) return;
        add_gate(gate0, i, Full{});
        add_gate(gate1, i + W, Full{});
      },
      [&](int64_t i, auto part, auto) MASKACCEL_HOT {
        const V m = load(s.mul + i, part);
        V gate = set1(0.0f);
        for (int r = 0; r < R; ++r) {
          const PlainToken<T>& k = tokens[r];
          V g = gradient(k, load(k.x + i, part), load(k.dy + i, part), m);
          if (residual) g = add(g, load(k.dr + i, part));
          if (k.dx != nullptr) store(k.dx + i, g, part);
          if (!gated) continue;
          if (s.dgate != nullptr) gate = fma(g, load(k.a + i, part), gate);
          if (k.da != nullptr) store(k.da + i, s.gate != nullptr ? mul(g, load(s.gate + i, part)) : g, part);
        }
        if (s.dgate != nullptr) add_gate(gate, i, part);
      });
}

template <class T, int R>
MASKACCEL_INLINE void plain_tokens(PlainToken<T>* tokens, const PlainShared& shared, const AdalnBackward& s) {
  const int norm = s.flags & kNormMask;
  for (int r = 0; r < R; ++r) {
    const Moments m = norm == kNormNone ? Moments{0.0f, 1.0f} : moments(tokens[r].x, s.D, norm == kNormRms, s.eps);
    tokens[r].mean = set1(m.mean);
    tokens[r].inverse = set1(m.inverse);
  }
  plain_sums<T, R>(tokens, shared, s.D, norm);
  if (s.dx != nullptr || s.a.data != nullptr) plain_gradients<T, R>(tokens, shared, s.D, s.past_cache);
}

template <class T>
void backward_chunks_plain(const AdalnBackward& s, int64_t begin, int64_t end) {
  const int64_t d = s.D, step = padded(d);
  float* const memory = static_cast<float*>(scratch(static_cast<size_t>(step) * 4 * sizeof(float)));
  Affine first{memory, memory + step, nullptr, nullptr, false};
  float *const gate = memory + 2 * step, *const slope = memory + 3 * step;
  const char* gate_row = nullptr;
  bool gate_built = false, sloped = false;
  const bool gated = s.a.data != nullptr;
  const Modulation no_shift;
  Adder dgate, dscale, dshift;
  Adder* const all[] = {&dgate, &dscale, &dshift};
  const Partial* const to[] = {&s.dgate, &s.dscale, &s.dshift};

  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t until = from + s.chunk < s.N ? from + s.chunk : s.N;
    for (int k = 0; k < 3; ++k) all[k]->start_chunk(*to[k], b, c - b * s.chunks, from, until, d);
    const auto token = [&](int64_t n) {
      const auto row_at = [&](const Rows& t) {
        return t.data == nullptr ? nullptr : static_cast<const T*>(t.data) + b * t.stride_b + n * t.stride_n;
      };
      const int64_t out = (b * s.N + n) * d;
      const V none = set1(0.0f);
      return PlainToken<T>{row_at(s.x),
                           row_at(s.dy),
                           row_at(s.dr),
                           row_at(s.a),
                           s.dx != nullptr ? static_cast<T*>(s.dx) + out : nullptr,
                           s.da != nullptr ? static_cast<T*>(s.da) + out : nullptr,
                           none,
                           none,
                           none,
                           none};
    };
    const auto together = [&](int64_t n) {  // tokens n and n + 1 read and add to the same rows
      if (row_of(s.scale, s, b, n) != row_of(s.scale, s, b, n + 1)) return false;
      if (gated && row_of(s.gate, s, b, n) != row_of(s.gate, s, b, n + 1)) return false;
      for (const Adder* one : all)
        if (one->slot(n, from, d) != one->slot(n + 1, from, d)) return false;
      return true;
    };
    for (int64_t n = from; n < until;) {
      refresh(first, s, s.scale, no_shift, nullptr, nullptr, b, n, T{});
      if (gated && s.gate.present()) {
        const char* const wanted = row_of(s.gate, s, b, n);
        if (!gate_built || wanted != gate_row) {
          build_gate(gate, wanted, s.gate, s);
          sloped = build_gate_slope(slope, wanted, s.gate, s);
          to_pair_order(gate, d, T{});
          if (sloped) to_pair_order(slope, d, T{});
          gate_row = wanted;
          gate_built = true;
        }
      }
      const PlainShared shared{first.mul,
                               gated && s.gate.present() ? gate : nullptr,
                               sloped ? slope : nullptr,
                               dscale.slot(n, from, d),
                               dshift.slot(n, from, d),
                               dgate.slot(n, from, d)};
      if (n + 1 < until && together(n)) {
        PlainToken<T> two[2] = {token(n), token(n + 1)};
        plain_tokens<T, 2>(two, shared, s);
        n += 2;
      } else {
        PlainToken<T> one[1] = {token(n)};
        plain_tokens<T, 1>(one, shared, s);
        n += 1;
      }
    }
    for (const Adder* one : all) {
      if (one->to->data == nullptr) continue;
      for (float* row = one->base; row <= one->slot(until - 1, from, d); row += d) to_natural_order(row, d, T{});
    }
  }
  if (s.past_cache) stream_end();
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
