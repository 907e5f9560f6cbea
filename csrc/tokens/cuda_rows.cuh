// Rows by id, and how threads share rows. Moving rows is a copy of bytes: the same code for every dtype.
#pragma once

#include "../adaln/cuda_operands.cuh"

namespace maskaccel::cuda {

/// Ids (B, M), or (1, M) for all samples.
struct Index {
  const int* data = nullptr;
  int64_t stride_b = 0;
  int count = 0;

  __device__ __forceinline__ int at(int b, int m) const { return data[b * stride_b + m]; }
};

constexpr int kRowThreads = 256;
constexpr int kCopies = 4;  // words that a lane has under way

/// Threads that share a row of `words`: a power of two, with about four words each.
inline int lanes_of(int64_t words) {
  const int64_t wanted = words <= 8 ? words : words <= 8 * kCopies ? 8 : ceil_div(words, kCopies);
  int lanes = 1;
  while (lanes < wanted && lanes < kRowThreads) lanes *= 2;
  return lanes;
}

inline dim3 rows_grid(int64_t rows, int lanes) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kRowThreads / lanes)));
}

/// Result rows that are rows of `from` by index. Strides and sizes count words.
struct CopyParams {
  Index index;
  const void *from = nullptr,
             *other = nullptr;  // `other` at the row's own place where the index is negative; null: zeros
  int64_t from_b = 0, from_n = 0, other_b = 0, other_n = 0;
  int limit = 0;  // rows of `from`; an index beyond gives zeros
  void* out = nullptr;
  int64_t total = 0;  // B * M
  int words = 0, lanes = 1;
};

template <typename Word>
__device__ __forceinline__ Word load_word(const Word* from) {
#ifdef MASKACCEL_EMULATE
  return *from;
#else
  return __ldg(from);
#endif
}

/// A group of lanes takes one row; Word is 16 bytes where rows lie on them, else one element.
template <typename Word>
__global__ void __launch_bounds__(kRowThreads) copy_rows_kernel(const __grid_constant__ CopyParams p) {
  const unsigned lanes = p.lanes, lane = threadIdx.x % lanes;
  const int64_t row = int64_t(blockIdx.x) * (kRowThreads / lanes) + threadIdx.x / lanes;
  if (row >= p.total) return;
  const int b = static_cast<int>(row) / p.index.count, m = static_cast<int>(row) % p.index.count;
  const int id = p.index.at(b, m);
  const Word* from = nullptr;
  if (id >= 0 && id < p.limit) from = static_cast<const Word*>(p.from) + b * p.from_b + id * p.from_n;
  if (id < 0 && p.other != nullptr) from = static_cast<const Word*>(p.other) + b * p.other_b + m * p.other_n;
  Word* out = static_cast<Word*>(p.out) + row * p.words;
  for (int at = lane; at < p.words; at += lanes * kCopies) {
    Word held[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int word = at + i * lanes;
      held[i] = from != nullptr && word < p.words ? load_word(from + word) : Word{};
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (at + i * int(lanes) < p.words) out[at + i * lanes] = held[i];
    }
  }
}

struct SegmentParams {
  Activation x;
  Index order, offsets;  // offsets (B|1, S + 1)
  void* out = nullptr;
  int64_t total = 0;  // B * S
  int segments = 0, tokens = 0, width = 0, lanes = 1;
  bool mean = false, out_vec = false;
};

/// Sums of runs of rows, in their order. A group of lanes takes one result row; four rows of x are under way.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) segment_rows_kernel(const __grid_constant__ SegmentParams p) {
  const int lane = threadIdx.x % p.lanes;
  const int64_t row = int64_t(blockIdx.x) * (kRowThreads / p.lanes) + threadIdx.x / p.lanes;
  if (row >= p.total) return;
  const int b = static_cast<int>(row) / p.segments, s = static_cast<int>(row) % p.segments;
  int begin = p.offsets.at(b, s), end = p.offsets.at(b, s + 1);
  begin = begin < 0 ? 0 : begin;
  end = end > p.order.count ? p.order.count : end;
  const float scale = p.mean && end > begin ? static_cast<float>(end - begin) : 1.f;
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b;
  for (int d = lane * kVec; d < p.width; d += p.lanes * kVec) {
    Floats sum = zeros();
    for (int at = begin; at < end; at += kCopies) {
      Pack<T> held[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int id = at + i < end ? p.order.at(b, at + i) : -1;
        const bool inside = id >= 0 && id < p.tokens;
        held[i] = load_pack(x + (inside ? id : 0) * p.x.stride_n, d, inside ? p.width : 0, p.x.vec);
      }
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const Floats values = to_floats<T>(held[i]);
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[e] += values[e];
      }
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[e] /= scale;
    store_pack(static_cast<T*>(p.out) + row * p.width, d, p.width, p.out_vec, to_pack<T>(sum));
  }
}

}  // namespace maskaccel::cuda
