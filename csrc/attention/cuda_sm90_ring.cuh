// What the attention kernels on sm_90a share: stages in shared memory, loads of whole rows, results of a thread.
#pragma once

#include <cstring>

#include "cuda_sm90_products.cuh"

namespace maskaccel::cuda::sm90 {

constexpr int kConsumerWarps = 4 * kConsumers;

/// Bytes to ask for: the start of dynamic shared memory is only known to lie on 16 bytes.
template <typename Storage>
constexpr int kSharedBytes = sizeof(Storage) + 1024;

template <typename Storage>
__device__ __forceinline__ Storage& storage() {
  char* bytes = reinterpret_cast<char*>(dynamic_shared());
  return *reinterpret_cast<Storage*>(bytes + (1024 - shared_address(bytes) % 1024) % 1024);
}

/// A place in a ring of stages, and the parity of its present round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Loads rows from `first` on of one head, slab by slab.
template <int kRowsOfSlab, int kSlab, int kColumns, typename T>
__device__ __forceinline__ void load(const TensorMap& map, Barrier& full, bool once, T* to, int first, int head,
                                     int batch) {
#pragma unroll
  for (int c = 0; c < kColumns; c += kSlab) load_box(map, full, once, to + c * kRowsOfSlab, c, first, head, batch);
}

/// Once for a warp, after all its threads have come here.
__device__ __forceinline__ void arrive(Barrier& barrier) {
  sync_warp();
  if (threadIdx.x % kWarp == 0) barrier.arrive();
}

/// The four words of a thread become those of one block of eight columns: thread t of four gets block t.
__device__ __forceinline__ void transpose_of_four(uint32_t (&words)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const bool upper = t & step;
      const uint32_t got = shuffle_xor(upper ? words[i] : words[i ^ step], step);
      if (upper) {
        words[i] = got;
      } else {
        words[i ^ step] = got;
      }
    }
  }
}

/// Writes row r of the two rows of a thread, of `columns` elements, in pieces of 16 bytes where it is `inside`. By all
/// threads of a warp.
template <typename T, int kSize>
__device__ __forceinline__ void write_row(const float (&values)[kSize], int r, bool inside, T* to, int columns) {
  constexpr int kBlocks = kSize / 4;
#pragma unroll
  for (int group = 0; group < kBlocks; group += 4) {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4 && group + i < kBlocks; ++i) {
      const int at = (group + i) * 4 + r * 2;
      T pair[2];
      round_all({values[at], values[at + 1]}, pair);
      std::memcpy(&words[i], pair, sizeof pair);
    }
    transpose_of_four(words);
    const int column = (group + static_cast<int>(threadIdx.x) % 4) * 8;
    if (inside && column < columns)
      *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace maskaccel::cuda::sm90
