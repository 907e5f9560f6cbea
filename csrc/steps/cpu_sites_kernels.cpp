// The forecast of a whole stack in one pass. Compiled once per instruction set; see common/isa.h.
#include "cpu_sites.h"
#include "cpu_weighted.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// fp32 sums of a tile of tokens: they stay in the second cache while every site is read once, in runs long enough for
// the prefetcher. Too many streams would be open if one token were finished after the other.
constexpr int64_t kTileElements = 8192;

// sums += gate * sum_k weights[k] * history[k] of one site and token.
template <class T, class H>
MASKACCEL_INLINE void add_site(const Past<H>& past, const float* gate, float* sums, int64_t d) {
  weighted_row<T>(
      past, d,
      [&](int64_t i, Two v, auto) MASKACCEL_HOT {
        const Two sum = load2(sums + i);
        if (gate != nullptr) {
          const Two g = load2(gate + i);
          store2(sums + i, {fma(g.lo, v.lo, sum.lo), fma(g.hi, v.hi, sum.hi)});
        } else {
          store2(sums + i, {add(sum.lo, v.lo), add(sum.hi, v.hi)});
        }
      },
      [&](int64_t i, V v, auto part, auto) MASKACCEL_HOT {
        const V sum = load(sums + i, part);
        store(sums + i, gate != nullptr ? fma(load(gate + i, part), v, sum) : add(sum, v), part);
      });
}

template <class H, class T>
void sites_rows(const CombineSites& s, int64_t begin, int64_t end) {
  const int64_t d = s.D, step = (d + 15) & ~int64_t{15};
  const int64_t tile = kTileElements / d > 1 ? kTileElements / d : 1;
  float* const sums = static_cast<float*>(scratch(static_cast<size_t>((tile + s.K + 1) * step) * sizeof(float)));
  float* const gate = sums + tile * step;
  float* const channels = gate + step;
  Past<H> past;
  past.count = s.K;
  for (int64_t row = begin; row < end;) {
    const int64_t b = row / s.N, first = row - b * s.N;
    int64_t count = s.N - first < end - row ? s.N - first : end - row;  // tokens of one sample
    if (count > tile) count = tile;
    for (int64_t i = 0; i < count * step; ++i) sums[i] = 0.0f;
    for (int64_t site = 0; site < s.S; ++site) {
      const H* const base = static_cast<const H*>(s.history) + site * s.history_site + b * s.stride_b + first * s.stride_n;
      past.ahead = site + 1 < s.S ? s.history_site : 0;
      past.weights = s.weights + site * s.weight_site;
      past.weight_stride = 0;
      if (s.weight_stride != 0) {
        for (int64_t k = 0; k < s.K; ++k)
          widen_row(channels + k * step, {past.weights + k * s.weight_stride, Dtype::f32}, d, T{});
        past.weights = channels;
        past.weight_stride = step;
      }
      const char* gate_row = nullptr;
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t k = 0; k < s.K; ++k) past.row[k] = base + k * s.stride_k + t * s.stride_n;
        if (s.gate != nullptr) {
          const int64_t at = site * s.gate_site + b * s.gate_b + (first + t) / s.group * s.gate_row;
          const char* const wanted = static_cast<const char*>(s.gate) + at * size_of(s.gate_dtype);
          if (wanted != gate_row) widen_row(gate, {wanted, s.gate_dtype}, d, T{});
          gate_row = wanted;
        }
        add_site<T>(past, s.gate != nullptr ? gate : nullptr, sums + t * step, d);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const T* const x = s.x != nullptr ? static_cast<const T*>(s.x) + b * s.x_b + (first + t) * s.x_n : nullptr;
      T* const out = static_cast<T*>(s.out) + (row + t) * d;
      const float* const from = sums + t * step;
      sweep2(
          d,
          [&](int64_t i, auto) MASKACCEL_HOT {
            Two v = load2(from + i);
            if (x != nullptr) {
              const Two r = load2(x + i);
              v = {add(v.lo, r.lo), add(v.hi, r.hi)};
            }
            put2(out + i, v, s.past_cache);
          },
          [&](int64_t i, auto part, auto) MASKACCEL_HOT {
            V v = load(from + i, part);
            if (x != nullptr) v = add(v, load(x + i, part));
            put(out + i, v, part, s.past_cache);
          });
    }
    row += count;
  }
  if (s.past_cache) stream_end();
}

template <class H>
void sites_from(const CombineSites& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { sites_rows<H, decltype(t)>(s, begin, end); });
}

void combine_sites(const CombineSites& s, int64_t begin, int64_t end) {
  with_dtype(s.history_dtype, [&](auto t) { sites_from<decltype(t)>(s, begin, end); });
}

}  // namespace

const SitesKernels sites_kernels = {combine_sites};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
