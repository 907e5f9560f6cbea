// Compiled once per instruction set; see common/isa.h.
#include "cpu_weighted.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

template <class T, bool BASE>
MASKACCEL_INLINE void difference_chunk(const T* x, const T* reference, const T* base, int64_t n, float* out) {
  Sum change = Sum::zero(), size = Sum::zero();
  sweep(n, [&](int64_t i, auto part, auto chain) MASKACCEL_HOT {
    V v = load(x + i, part);
    if constexpr (BASE) v = sub(v, load(base + i, part));
    const V r = load(reference + i, part);
    change.part[chain.k] = add(change.part[chain.k], vabs(sub(v, r)));
    size.part[chain.k] = add(size.part[chain.k], vabs(r));
  });
  out[0] = change.total();
  out[1] = size.total();
}

template <class T>
void difference_chunks(const RelativeDifference& s, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t n = s.size - from < s.chunk ? s.size - from : s.chunk, at = b * s.size + from;
    const T *x = static_cast<const T*>(s.x) + at, *reference = static_cast<const T*>(s.reference) + at;
    if (s.base != nullptr) {
      difference_chunk<T, true>(x, reference, static_cast<const T*>(s.base) + at, n, s.partial + 2 * c);
    } else {
      difference_chunk<T, false>(x, reference, x, n, s.partial + 2 * c);
    }
  }
}

void relative_difference(const RelativeDifference& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { difference_chunks<decltype(t)>(s, begin, end); });
}

template <class H, class T>
void combine_rows(const CombineHistory& s, int64_t begin, int64_t end) {
  const int64_t step = (s.D + 15) & ~int64_t{15};
  CombinedRows<H, T> rows(s, static_cast<float*>(scratch(static_cast<size_t>((s.K + 1) * step) * sizeof(float))), step);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.N, n = row - b * s.N;
    T* const out = static_cast<T*>(s.out) + row * s.D;
    rows.row(
        b, n, n + 1 < s.N && row + 1 < end,
        [&](int64_t i, Two v, auto) MASKACCEL_HOT { put2(out + i, v, s.past_cache); },
        [&](int64_t i, V v, auto part, auto) MASKACCEL_HOT { put(out + i, v, part, s.past_cache); });
  }
  if (s.past_cache) stream_end();
}

template <class H>
void combine_from(const CombineHistory& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { combine_rows<H, decltype(t)>(s, begin, end); });
}

void combine_history(const CombineHistory& s, int64_t begin, int64_t end) {
  with_dtype(s.history_dtype, [&](auto t) { combine_from<decltype(t)>(s, begin, end); });
}

}  // namespace

const StepsKernels steps_kernels = {relative_difference, combine_history};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
