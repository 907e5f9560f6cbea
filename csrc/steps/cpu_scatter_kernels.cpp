// A forecast at a step that computed a few rows. Compiled once per instruction set; see common/isa.h.
#include <cstring>

#include "cpu_scatter.h"
#include "cpu_weighted.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

template <class T>
void means(const GroupMeans& s, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    float* const mean = s.mean + g * s.D;
    const V share = set1(1.0f / static_cast<float>(s.begin[g + 1] - s.begin[g]));
    for (int32_t at = s.begin[g]; at < s.begin[g + 1]; ++at) {
      const T* const row = static_cast<const T*>(s.fresh) + s.order[at] * s.D;
      const bool first = at == s.begin[g], last = at + 1 == s.begin[g + 1];
      sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
        V v = load(row + i, part);
        if (!first) v = add(load(mean + i, part), v);
        store(mean + i, last ? mul(v, share) : v, part);
      });
    }
  }
}

void group_means(const GroupMeans& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { means<decltype(t)>(s, begin, end); });
}

// The newest value of one token, brought up to date. It is read again at once, from the nearest cache.
template <class H>
MASKACCEL_INLINE void update(const ScatterCombine& s, int64_t row, H* value) {
  if (s.row[row] >= 0) {
    std::memcpy(value, static_cast<const H*>(s.fresh) + s.row[row] * s.D, static_cast<size_t>(s.D) * sizeof(H));
  } else if (s.group != nullptr && s.group[row] >= 0) {
    const float* const mean = s.mean + s.group[row] * s.D;
    const V gamma = set1(s.gamma), rest = set1(1.0f - s.gamma);
    sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
      store(value + i, fma(gamma, load(mean + i, part), mul(rest, load(value + i, part))), part);
    });
  }
}

template <class H, class T>
void scatter_rows(const ScatterCombine& s, int64_t begin, int64_t end) {
  const int64_t step = (s.D + 15) & ~int64_t{15};
  CombinedRows<H, T> rows(s, static_cast<float*>(scratch(static_cast<size_t>((s.K + 1) * step) * sizeof(float))), step);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / s.N, n = row - b * s.N;
    update(s, row, static_cast<H*>(s.newest) + b * s.stride_b + n * s.stride_n);
    T* const out = static_cast<T*>(s.out) + row * s.D;
    rows.row(
        b, n, n + 1 < s.N && row + 1 < end,
        [&](int64_t i, Two v, auto) MASKACCEL_HOT { put2(out + i, v, s.past_cache); },
        [&](int64_t i, V v, auto part, auto) MASKACCEL_HOT { put(out + i, v, part, s.past_cache); });
  }
  if (s.past_cache) stream_end();
}

template <class H>
void scatter_from(const ScatterCombine& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { scatter_rows<H, decltype(t)>(s, begin, end); });
}

void scatter_combine(const ScatterCombine& s, int64_t begin, int64_t end) {
  with_dtype(s.history_dtype, [&](auto t) { scatter_from<decltype(t)>(s, begin, end); });
}

}  // namespace

const ScatterKernels scatter_kernels = {group_means, scatter_combine};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
