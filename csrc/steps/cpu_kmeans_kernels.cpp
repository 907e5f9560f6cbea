// Clusters of tokens. Compiled once per instruction set; see common/isa.h.
#include <cmath>
#include <limits>

#include "../common/vec.h"
#include "cpu_kmeans.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// Tokens by centroids of a tile: its sums and one vector of each fit the vector registers.
constexpr int kRows = 4;
#if defined(__AVX512F__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

template <Metric METRIC>
MASKACCEL_INLINE V term(V x, V c, V sum) {
  if constexpr (METRIC == Metric::cosine) return fma(x, c, sum);
  const V d = sub(x, c);
  if constexpr (METRIC == Metric::l1) return add(sum, vabs(d));
  return fma(d, d, sum);
}

// out[i][j]: the sum over elements of tokens `x` (rows of `step` fp32 elements) and centroids `c`.
template <Metric METRIC>
void tile(const float* x, int64_t step, const float* const* c, int64_t d, float (*out)[kColumns]) {
  V sum[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sum[i][j] = set1(0.0f);
  const auto go = [&](int64_t at, auto part) MASKACCEL_HOT {
    V left[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) left[i] = load(x + i * step + at, Full{});
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const V right = load(c[j] + at, part);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = term<METRIC>(left[i], right, sum[i][j]);
    }
  };
  int64_t at = 0;
  for (; at + W <= d; at += W) go(at, Full{});
  if (at < d) go(at, Tail{static_cast<int>(d - at)});  // past the end both are zero
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) out[i][j] = hsum(sum[i][j]);
}

template <class T, Metric METRIC>
void assign_chunks(const Assign& s, int64_t begin, int64_t end) {
  const int64_t step = (s.D + 15) & ~int64_t{15};
  float* const rows = static_cast<float*>(scratch(static_cast<size_t>(kRows * (step + s.k)) * sizeof(float)));
  float* const distance = rows + kRows * step;
  for (int64_t i = 0; i < kRows * step; ++i) rows[i] = 0.0f;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t to = s.N - from < s.chunk ? s.N : from + s.chunk;
    const float* const centroids = s.centroids + b * s.k * s.D;
    float* const sums = s.sums != nullptr ? s.sums + c * s.k * s.D : nullptr;
    int32_t* const counts = s.sums != nullptr ? s.counts + c * s.k : nullptr;
    for (int64_t j = 0; counts != nullptr && j < s.k; ++j) counts[j] = 0;
    for (int64_t n = from; n < to; n += kRows) {
      const int count = static_cast<int>(to - n < kRows ? to - n : kRows);
      float length[kRows] = {};  // one over it
      for (int i = 0; i < count; ++i) {
        const T* const row = static_cast<const T*>(s.x) + b * s.stride_b + (n + i) * s.stride_n;
        Sum squares = Sum::zero();
        sweep(s.D, [&](int64_t at, auto part, auto chain) MASKACCEL_HOT {
          const V v = load(row + at, part);
          store(rows + i * step + at, v, part);
          if constexpr (METRIC == Metric::cosine) squares.part[chain.k] = fma(v, v, squares.part[chain.k]);
        });
        const float square = METRIC == Metric::cosine ? squares.total() : 0.0f;
        length[i] = square > 0.0f ? 1.0f / std::sqrt(square) : 0.0f;
      }
      for (int64_t first = 0; first < s.k; first += kColumns) {
        const float* column[kColumns];
        for (int j = 0; j < kColumns; ++j)
          column[j] = centroids + (first + j < s.k ? first + j : s.k - 1) * s.D;
        float out[kRows][kColumns];
        tile<METRIC>(rows, step, column, s.D, out);
        for (int i = 0; i < count; ++i)
          for (int j = 0; j < kColumns && first + j < s.k; ++j) {
            float v = out[i][j];
            if constexpr (METRIC == Metric::cosine) v = 1.0f - v * length[i] * s.scale[b * s.k + first + j];
            distance[i * s.k + first + j] = v;
          }
      }
      for (int i = 0; i < count; ++i) {
        const float* const of_row = distance + i * s.k;
        int64_t label = 0;
        float least = std::numeric_limits<float>::infinity();
        for (int64_t j = 0; j < s.k; ++j)
          if (of_row[j] < least) {
            least = of_row[j];
            label = j;
          }
        s.labels[b * s.N + n + i] = static_cast<int32_t>(label);
        if (s.distance != nullptr)
          for (int64_t j = 0; j < s.k; ++j) s.distance[(b * s.N + n + i) * s.k + j] = of_row[j];
        if (sums == nullptr) continue;
        float* const sum = sums + label * s.D;
        const bool first = counts[label]++ == 0;
        const V scale = set1(METRIC == Metric::cosine ? length[i] : 1.0f);
        sweep(s.D, [&](int64_t at, auto part, auto) MASKACCEL_HOT {
          V v = load(rows + i * step + at, part);
          if constexpr (METRIC == Metric::cosine) v = mul(v, scale);
          store(sum + at, first ? v : add(load(sum + at, part), v), part);
        });
      }
    }
  }
}

template <class T>
void assign_by(const Assign& s, int64_t begin, int64_t end) {
  switch (s.metric) {
    case Metric::l1:
      return assign_chunks<T, Metric::l1>(s, begin, end);
    case Metric::cosine:
      return assign_chunks<T, Metric::cosine>(s, begin, end);
    default:
      return assign_chunks<T, Metric::l2>(s, begin, end);
  }
}

void assign(const Assign& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { assign_by<decltype(t)>(s, begin, end); });
}

void start(const Assign& s, int64_t begin, int64_t end) {
  const int64_t item = size_of(s.dtype);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / s.k, token = (2 * (at - b * s.k) + 1) * s.N / (2 * s.k);
    const Source row{static_cast<const char*>(s.x) + (b * s.stride_b + token * s.stride_n) * item, s.dtype};
    float* const out = s.centroids + at * s.D;
    sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT { store(out + i, load(row, i, part), part); });
  }
}

// Adds the sums of the chunks in their order: the same bits for any number of threads.
void center(const Center& s, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / s.k, j = item - b * s.k;
    int64_t total = 0;
    for (int64_t c = 0; c < s.chunks; ++c) total += s.counts[(b * s.chunks + c) * s.k + j];
    if (total == 0) continue;
    const V share = set1(1.0f / static_cast<float>(total));
    float* const centroid = s.centroids + item * s.D;
    sweep(s.D, [&](int64_t at, auto part, auto) MASKACCEL_HOT {
      V sum = set1(0.0f);
      for (int64_t c = 0; c < s.chunks; ++c) {
        const int64_t of_chunk = (b * s.chunks + c) * s.k + j;
        if (s.counts[of_chunk] != 0) sum = add(sum, load(s.sums + of_chunk * s.D + at, part));
      }
      store(centroid + at, mul(sum, share), part);
    });
  }
}

}  // namespace

const KMeansKernels kmeans_kernels = {start, assign, center};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
