// Step ops with a norm in the same pass. Compiled once per instruction set; see common/isa.h.
#include "../adaln/cpu_normed.h"
#include "cpu_norm.h"
#include "cpu_weighted.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// Not inlined: the combined row comes from any of three dtypes, and the norm is the same for all of them.
template <class T>
__attribute__((noinline)) void normalise_kept(NormedRows<T>& normed, const float* kept, float sum, T* y, int64_t b,
                                              int64_t n) {
  normed.row(kept, sum, y, nullptr, b, n, Ahead<T>{nullptr, nullptr});
}

template <class H, class T>
void combine_rows(const CombineNorm& s, int64_t begin, int64_t end) {
  const int64_t d = s.combine.D, step = padded(d);
  const int64_t count = s.combine.K + 2 + NormedRows<T>::kRows;
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(count * step) * sizeof(float)));
  const auto take = [&] { return (memory += step) - step; };
  float* const kept = take();
  NormedRows<T> normed(s.norm, take);
  CombinedRows<H, T> rows(s.combine, memory, step);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.combine.N, n = row - b * s.combine.N;
    T* const h = static_cast<T*>(s.combine.out) + row * d;
    Sum sum = Sum::zero();
    rows.row(
        b, n, n + 1 < s.combine.N && row + 1 < end,
        [&](int64_t i, Two v, auto chain) MASKACCEL_HOT {
          const Two stored = put2(h + i, v, s.combine.past_cache);
          store2(kept + i, stored);
          sum.part[chain.k] = add(sum.part[chain.k], stored.lo);
          sum.part[chain.k + 1] = add(sum.part[chain.k + 1], stored.hi);
        },
        [&](int64_t i, V v, auto part, auto chain) MASKACCEL_HOT {
          put(h + i, v, part, s.combine.past_cache);
          const V stored = keep(rounded(v, T{}), part);
          store(kept + i, stored, part);
          sum.part[chain.k] = add(sum.part[chain.k], stored);
        });
    normalise_kept(normed, kept, sum.total(), static_cast<T*>(s.norm.y) + row * d, b, n);
  }
  if (s.combine.past_cache) stream_end();
}

template <class H>
void combine_from(const CombineNorm& s, int64_t begin, int64_t end) {
  with_dtype(s.combine.dtype, [&](auto t) { combine_rows<H, decltype(t)>(s, begin, end); });
}

void combine_norm(const CombineNorm& s, int64_t begin, int64_t end) {
  with_dtype(s.combine.history_dtype, [&](auto t) { combine_from<decltype(t)>(s, begin, end); });
}

// Sums of |y - reference| and |reference| of a row whose y is being stored.
template <class T>
struct Moved {
  const T* reference;
  Sum change = Sum::zero(), size = Sum::zero();

  template <class Chain>
  MASKACCEL_HOT void two(int64_t i, Two y, Chain chain) {
    const Two r = load2(reference + i);
    change.part[chain.k] = add(change.part[chain.k], vabs(sub(y.lo, r.lo)));
    change.part[chain.k + 1] = add(change.part[chain.k + 1], vabs(sub(y.hi, r.hi)));
    size.part[chain.k] = add(size.part[chain.k], vabs(r.lo));
    size.part[chain.k + 1] = add(size.part[chain.k + 1], vabs(r.hi));
  }
  template <class Part, class Chain>
  MASKACCEL_HOT void one(int64_t i, V y, Part part, Chain chain) {
    const V r = load(reference + i, part);
    change.part[chain.k] = add(change.part[chain.k], keep(vabs(sub(rounded(y, T{}), r)), part));
    size.part[chain.k] = add(size.part[chain.k], vabs(r));
  }
};

template <class T>
void difference_rows(const NormDifference& s, int64_t begin, int64_t end) {
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(padded(s.D)) * NormedRows<T>::kRows * sizeof(float)));
  NormedRows<T> normed(s, [&] { return (memory += padded(s.D)) - padded(s.D); });
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.N, n = row - b * s.N;
    const T* const x = static_cast<const T*>(s.x.data) + b * s.x.stride_b + n * s.x.stride_n;
    Moved<T> moved{static_cast<const T*>(s.reference.data) + b * s.reference.stride_b + n * s.reference.stride_n};
    Ahead<T> next{nullptr, nullptr};
    if (n + 1 < s.N && row + 1 < end) next = {x + s.x.stride_n, moved.reference + s.reference.stride_n};
    normed.row(x, static_cast<T*>(s.y) + row * s.D, nullptr, b, n, next, moved);
    s.sums[2 * row] = moved.change.total();
    s.sums[2 * row + 1] = moved.size.total();
  }
  if (s.past_cache) stream_end();
}

void norm_difference(const NormDifference& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { difference_rows<decltype(t)>(s, begin, end); });
}

}  // namespace

const StepsNormKernels steps_norm_kernels = {combine_norm, norm_difference};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
