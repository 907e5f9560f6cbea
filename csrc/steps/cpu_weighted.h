// Weighted sums of remembered rows, the inner loop of every forecast. Vectors come in the pair order of the result
// (common/vec_pair.h), and so do the rows of fp32 scratch that meet them.
#pragma once

#include "../common/vec_pair.h"
#include "cpu_args.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// Rows of one token at several steps.
template <class H>
struct Past {
  const H* row[CombineHistory::kMost];
  int64_t count = 0;
  int64_t ahead = 0;               // elements from these rows to the ones that are read next; 0: none
  const float* weights = nullptr;  // of row k: weights[k], or the channels from weights + k * weight_stride on
  int64_t weight_stride = 0;       // 0: one weight for a whole row
};

// A stretch of H in the pair order of T.
template <class T, class H>
MASKACCEL_INLINE Two load_pair(const H* p) {
  const Two v = load2(p);
  constexpr bool from = dtype_of<H> == Dtype::bf16, to = dtype_of<T> == Dtype::bf16;
  if constexpr (from && !to) return natural(v, bf16{});
  if constexpr (to && !from) return ordered(v, bf16{});
  return v;
}

// A row of any dtype as fp32 in the pair order of T.
template <class T>
MASKACCEL_INLINE void widen_row(float* out, Source row, int64_t d, T order) {
  sweep(d, [&](int64_t i, auto part, auto) MASKACCEL_HOT { store(out + i, load(row, i, part), part); });
  to_pair_order(out, d, order);
}

template <int PAIRS, class H>
MASKACCEL_INLINE void fetch_ahead(const H* row) {
  constexpr int64_t kElements = kLine / static_cast<int64_t>(sizeof(H));
#pragma GCC unroll 4
  for (int64_t at = 0; at < PAIRS * 2 * W; at += kElements) __builtin_prefetch(row + at, 0, 2);
}

// sum[j] = sum_k weight_k * row_k over the pairs from element i on. The lines of the next rows are asked for: the
// hardware does not look across pages, and there are more streams than it follows well.
template <class T, int PAIRS, class H>
MASKACCEL_INLINE void weighted(const Past<H>& p, int64_t i, Two* sum) {
#pragma GCC unroll 2
  for (int j = 0; j < PAIRS; ++j) sum[j] = {set1(0.0f), set1(0.0f)};
  for (int64_t k = 0; k < p.count; ++k) {
    const H* const row = p.row[k] + i;
    if (p.ahead != 0) fetch_ahead<PAIRS>(row + p.ahead);
    if (p.weight_stride != 0) {
      const float* const w = p.weights + k * p.weight_stride + i;
#pragma GCC unroll 2
      for (int j = 0; j < PAIRS; ++j) {
        const Two v = load_pair<T>(row + j * 2 * W), f = load2(w + j * 2 * W);
        sum[j] = {fma(f.lo, v.lo, sum[j].lo), fma(f.hi, v.hi, sum[j].hi)};
      }
    } else {
      const V w = set1(p.weights[k]);
#pragma GCC unroll 2
      for (int j = 0; j < PAIRS; ++j) {
        const Two v = load_pair<T>(row + j * 2 * W);
        sum[j] = {fma(w, v.lo, sum[j].lo), fma(w, v.hi, sum[j].hi)};
      }
    }
  }
}

template <class H, class Part>
MASKACCEL_INLINE V weighted_one(const Past<H>& p, int64_t i, Part part) {
  V sum = set1(0.0f);
  for (int64_t k = 0; k < p.count; ++k) {
    const V w = p.weight_stride != 0 ? load(p.weights + k * p.weight_stride + i, part) : set1(p.weights[k]);
    sum = fma(w, load(p.row[k] + i, part), sum);
  }
  return sum;
}

// two(i, sum, Chain<0 or 2>) for the weighted sums of whole pairs of a row, one(i, sum, Full | Tail, Chain<0 or 1>) for
// what is left, in natural order.
template <class T, class H, class F, class G>
MASKACCEL_INLINE void weighted_row(const Past<H>& p, int64_t d, F&& two, G&& one) {
  Two sum[2];
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    weighted<T, 2>(p, i, sum);
    two(i, sum[0], Chain<0>{});
    two(i + 2 * W, sum[1], Chain<2>{});
  }
  if (i + 2 * W <= d) {
    weighted<T, 1>(p, i, sum);
    two(i, sum[0], Chain<0>{});
    i += 2 * W;
  }
  if (i + W <= d) {
    one(i, weighted_one(p, i, Full{}), Full{}, Chain<0>{});
    i += W;
  }
  if (i < d) {
    const Tail tail{static_cast<int>(d - i)};
    one(i, weighted_one(p, i, tail), tail, Chain<1>{});
  }
}

// Rows of a combine_history call, one after the other: the forecast, its gate and the residual it is added to.
template <class H, class T>
class CombinedRows {
 public:
  // `memory`: (K + 1) rows of `step` elements.
  CombinedRows(const CombineHistory& s, float* memory, int64_t step) : s_(s), gate_(memory) {
    past_.count = s.K;
    past_.weights = s.weights;
    if (s.weight_stride == 0) return;
    float* const weights = memory + step;
    for (int64_t k = 0; k < s.K; ++k)
      widen_row(weights + k * step, {s.weights + k * s.weight_stride, Dtype::f32}, s.D, T{});
    past_.weights = weights;
    past_.weight_stride = step;
  }

  // two(i, value, chain) and one(i, value, part, chain) over the row of token n of sample b; `more`: the next token
  // follows.
  template <class F, class G>
  MASKACCEL_HOT void row(int64_t b, int64_t n, bool more, F&& two, G&& one) {
    for (int64_t k = 0; k < s_.K; ++k)
      past_.row[k] = static_cast<const H*>(s_.history) + k * s_.stride_k + b * s_.stride_b + n * s_.stride_n;
    past_.ahead = more ? s_.stride_n : 0;
    const T* const x = s_.x != nullptr ? static_cast<const T*>(s_.x) + b * s_.x_b + n * s_.x_n : nullptr;
    const T* const next = x != nullptr && more ? x + s_.x_n : nullptr;
    if (s_.gate != nullptr) {
      const char* const wanted =
          static_cast<const char*>(s_.gate) + (b * s_.gate_b + n / s_.group * s_.gate_row) * size_of(s_.gate_dtype);
      if (wanted != gate_row_) widen_row(gate_, {wanted, s_.gate_dtype}, s_.D, T{});
      gate_row_ = wanted;
    }
    const float* const gate = s_.gate != nullptr ? gate_ : nullptr;
    weighted_row<T>(
        past_, s_.D,
        [&](int64_t i, Two v, auto chain) MASKACCEL_HOT {
          if (gate != nullptr) {
            const Two g = load2(gate + i);
            v = {mul(v.lo, g.lo), mul(v.hi, g.hi)};
          }
          if (x != nullptr) {
            if (next != nullptr) fetch_ahead<1>(next + i);
            const Two r = load2(x + i);
            v = {add(v.lo, r.lo), add(v.hi, r.hi)};
          }
          two(i, v, chain);
        },
        [&](int64_t i, V v, auto part, auto chain) MASKACCEL_HOT {
          if (gate != nullptr) v = mul(v, load(gate + i, part));
          if (x != nullptr) v = add(v, load(x + i, part));
          one(i, v, part, chain);
        });
  }

 private:
  const CombineHistory& s_;
  Past<H> past_;
  float* const gate_;
  const char* gate_row_ = nullptr;
};

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
