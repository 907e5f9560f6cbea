// Each token's most similar one among others. Compiled once per instruction set; see common/isa.h.
#include "../attention/cpu_gemm.h"
#include "cpu_match.h"
#include "cpu_words.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

constexpr int64_t kTileRows = 48;  // of a tile of similarities, which stays in the nearest cache

// Rows by id, one after the other, zeros where there is none and past C; one over the length of each.
template <class T>
void gather(const MatchTokens& s, int64_t b, const int32_t* ids, int64_t count, T* to, float* inverse) {
  for (int64_t i = 0; i < count; ++i, to += s.width) {
    std::memset(to, 0, static_cast<size_t>(s.width) * sizeof(T));
    inverse[i] = 0.0f;
    if (ids[i] < 0 || ids[i] >= s.N) continue;
    const T* const from = static_cast<const T*>(s.metric.data) + b * s.metric.stride_b + ids[i] * s.metric.stride_n;
    Sum squares = Sum::zero();
    sweep(s.C, [&](int64_t j, auto part, auto chain) MASKACCEL_HOT {
      const V v = load(from + j, part);
      squares.part[chain.k] = fma(v, v, squares.part[chain.k]);
    });
    std::memcpy(to, from, static_cast<size_t>(s.C) * sizeof(T));
    const float square = squares.total();
    inverse[i] = square == 0.0f ? 0.0f : 1.0f / __builtin_sqrtf(square);
  }
}

template <class T>
void pack_of(const MatchTokens& s, int64_t begin, int64_t end) {
  using O = OperandOf<T>;
  T* const rows = static_cast<T*>(scratch(static_cast<size_t>(kMatchColumns * s.width) * sizeof(T)));
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / s.column_blocks, from = (at - b * s.column_blocks) * kMatchColumns;
    const int64_t count = s.Nd - from < kMatchColumns ? s.Nd - from : kMatchColumns;
    gather(s, b, s.dst + b * s.dst_stride + from, count, rows, s.inverse + at * kMatchColumns);
    pack_transposed<O>(rows, s.width, count, s.width, s.packed + at * s.width * kMatchColumns, kMatchColumns);
  }
}

// The best column of each lane so far, of each row.
struct Best {
  alignas(64) float value[kMatchRows][W], column[kMatchRows][W];  // the columns are integers
};

MASKACCEL_INLINE void keep_best(Best& best, int64_t row, const float* scores, const float* inverse, int64_t first,
                                int64_t count) {
  V value = load(best.value[row], Full{}), column = load(best.column[row], Full{});
  for (int64_t j = 0; j < count; j += W) {
    V v = mul(load(scores + j, Full{}), load(inverse + j, Full{}));
    const Words here = count_from(static_cast<uint32_t>(first + j));
    if (count - j < W) {  // lanes past the last column
      const V lane = to_floats(count_from(0));
      v = less(lane, set1(static_cast<float>(count - j)), v, set1(-__builtin_inff()));
    }
    column = less(value, v, as_floats(here), column);
    value = less(value, v, v, value);
  }
  store(best.value[row], value, Full{});
  store(best.column[row], column, Full{});
}

template <class T>
void match_of(const MatchTokens& s, int64_t begin, int64_t end) {
  using O = OperandOf<T>;
  const int64_t steps = s.width / O::kDepth;
  const int64_t tile = kTileRows * kMatchColumns;
  float* const scores = static_cast<float*>(
      scratch(static_cast<size_t>(tile + kMatchRows * (steps + s.width) + kMatchRows) * sizeof(float)));
  float *const left = scores + tile, *const inverse = left + kMatchRows * steps;
  T* const rows = reinterpret_cast<T*>(inverse + kMatchRows);
  Best best;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t b = at / s.row_blocks, from = (at - b * s.row_blocks) * kMatchRows;
    const int64_t count = s.Ns - from < kMatchRows ? s.Ns - from : kMatchRows;
    gather(s, b, s.src + b * s.src_stride + from, count, rows, inverse);
    pack_rows<O>(rows, s.width, count, s.width, left, steps);
    for (int64_t i = 0; i < count; ++i) {
      store(best.value[i], set1(-__builtin_inff()), Full{});
      store(best.column[i], set1(0.0f), Full{});
    }
    for (int64_t c = 0; c < s.column_blocks; ++c) {
      const int64_t block = b * s.column_blocks + c, first = c * kMatchColumns;
      const int64_t columns = s.Nd - first < kMatchColumns ? s.Nd - first : kMatchColumns;
      for (int64_t r = 0; r < count; r += kTileRows) {
        const int64_t high = count - r < kTileRows ? count - r : kTileRows;
        product<O>(high, whole_vectors(columns), steps, left + r * steps, steps, 1,
                   s.packed + block * s.width * kMatchColumns, kMatchColumns, scores, kMatchColumns);
        for (int64_t i = 0; i < high; ++i)
          keep_best(best, r + i, scores + i * kMatchColumns, s.inverse + block * kMatchColumns, first, columns);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float value = -__builtin_inff();
      int32_t column = 0;
      for (int j = 0; j < W; ++j) {
        int32_t here = 0;
        std::memcpy(&here, &best.column[i][j], sizeof here);
        const float v = best.value[i][j];
        if (v < value || (v == value && (here >= column || v == -__builtin_inff()))) continue;
        value = v;
        column = here;
      }
      s.best[b * s.Ns + from + i] = column;
      s.similarity[b * s.Ns + from + i] = value == -__builtin_inff() ? __builtin_nanf("") : value * inverse[i];
    }
  }
}

void pack(const MatchTokens& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { pack_of<decltype(t)>(s, begin, end); });
}

void match(const MatchTokens& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { match_of<decltype(t)>(s, begin, end); });
}

}  // namespace

const MatchKernels match_kernels = {pack, match};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
