// Two partial attention results as one. Compiled once per instruction set; see common/isa.h.
//
// With w_i = exp(lse_i - lse), so w_1 + w_2 = 1:
//
//   lse = max + log(1 + exp(-|lse_1 - lse_2|))        out = w_1 out_1 + w_2 out_2
//   d out_i = w_i dout                                d lse_1 = w_1 (dlse + w_2 t),  d lse_2 = w_2 (dlse - w_1 t)
//
// where t = dout . (out_1 - out_2), since out_1 - out = w_2 (out_1 - out_2). A part of weight 0 is not read: a row
// that had no keys may hold anything.
#include <math.h>

#include "../common/vec.h"
#include "cpu_merge.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

struct Shares {
  float weight[2], lse;
};

Shares shares(float lse1, float lse2) {
  const float most = lse1 > lse2 ? lse1 : lse2;
  if (lse1 == -INFINITY && lse2 == -INFINITY) return {{0.0f, 0.0f}, -INFINITY};
  const float less = ::expf(-::fabsf(lse1 - lse2)), larger = 1.0f / (1.0f + less), smaller = less / (1.0f + less);
  const bool first = lse1 > lse2;
  return {{first ? larger : smaller, first ? smaller : larger}, most + ::log1pf(less)};
}

// Rows of one token and head, and the flat places of its row and its lse.
struct Place {
  int64_t b, s, h, row, lse;
};

template <class F>
MASKACCEL_INLINE void each_place(const MergeAttention& m, int64_t begin, int64_t end, F&& f) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / m.S, s = token - b * m.S;
    for (int64_t h = 0; h < m.H; ++h) f(Place{b, s, h, token * m.H + h, (b * m.H + h) * m.S + s});
  }
}

template <class T>
const T* row_of(const HeadRows& rows, const Place& p) {
  return static_cast<const T*>(rows.data) + rows.offset(p.b, p.s, p.h);
}

template <class T>
void merge_tokens(const MergeAttention& m, int64_t begin, int64_t end) {
  each_place(m, begin, end, [&](const Place& p) MASKACCEL_HOT {
    const Shares share = shares(m.part_lse[0][p.lse], m.part_lse[1][p.lse]);
    m.lse[p.lse] = share.lse;
    T* const out = static_cast<T*>(m.out) + p.row * m.D;
    const V w1 = set1(share.weight[0]), w2 = set1(share.weight[1]);
    if (share.weight[0] != 0.0f && share.weight[1] != 0.0f) {
      const T *const x1 = row_of<T>(m.part[0], p), *const x2 = row_of<T>(m.part[1], p);
      sweep(m.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
        put(out + i, fma(w1, load(x1 + i, part), mul(w2, load(x2 + i, part))), part, m.past_cache);
      });
      return;
    }
    const int only = share.weight[0] != 0.0f ? 0 : 1;
    const bool any = share.weight[only] != 0.0f;
    const T* const x = row_of<T>(m.part[only], p);
    sweep(m.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      put(out + i, any ? mul(only == 0 ? w1 : w2, load(x + i, part)) : set1(0.0f), part, m.past_cache);
    });
  });
  if (m.past_cache) stream_end();
}

template <class T>
void backward_tokens(const MergeAttentionBackward& m, int64_t begin, int64_t end) {
  each_place(m, begin, end, [&](const Place& p) MASKACCEL_HOT {
    const Shares share = shares(m.part_lse[0][p.lse], m.part_lse[1][p.lse]);
    const float w1 = share.weight[0], w2 = share.weight[1];
    const bool both = w1 != 0.0f && w2 != 0.0f;
    const T* const dout = row_of<T>(m.dout, p);
    const T *const x1 = row_of<T>(m.part[0], p), *const x2 = row_of<T>(m.part[1], p);
    T* const dx1 = static_cast<T*>(m.dpart[0]) + p.row * m.D;
    T* const dx2 = static_cast<T*>(m.dpart[1]) + p.row * m.D;
    const V v1 = set1(w1), v2 = set1(w2);
    Sum dot = Sum::zero();
    sweep(m.D, [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
      const V g = load(dout + i, part);
      put(dx1 + i, mul(v1, g), part, m.past_cache);
      put(dx2 + i, mul(v2, g), part, m.past_cache);
      if (both) {
        V& sum = dot.part[decltype(chain)::k];
        sum = fma(g, sub(load(x1 + i, part), load(x2 + i, part)), sum);
      }
    });
    const float t = both ? dot.total() : 0.0f, dlse = m.dlse == nullptr ? 0.0f : m.dlse[p.lse];
    m.dpart_lse[0][p.lse] = w1 * (dlse + w2 * t);
    m.dpart_lse[1][p.lse] = w2 * (dlse - w1 * t);
  });
  if (m.past_cache) stream_end();
}

void merge(const MergeAttention& m, int64_t begin, int64_t end) {
  with_dtype(m.dtype, [&](auto t) { merge_tokens<decltype(t)>(m, begin, end); });
}

void backward(const MergeAttentionBackward& m, int64_t begin, int64_t end) {
  with_dtype(m.dtype, [&](auto t) { backward_tokens<decltype(t)>(m, begin, end); });
}

}  // namespace

const MergeKernels merge_kernels = {merge, backward};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
