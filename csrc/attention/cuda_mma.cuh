// Instructions of the sm_80 matrix path, warp-wide: m16n8k16 products, ldmatrix, cp.async. On the host each has a body
// that moves the same registers between lanes, so that fragments and waits can be tested without a GPU.
#pragma once

#include <limits>
#include <type_traits>

#include "../common/cuda_common.cuh"

#ifndef MASKACCEL_EMULATE
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#endif

namespace maskaccel::cuda {

/// c (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds
///   a: rows g, g + 8, g, g + 8 of columns 2t, 2t + 1 (the last two: + 8);
///   b: rows 2t, 2t + 1 (the second: + 8) of column g;  c: rows g, g, g + 8, g + 8 of columns 2t, 2t + 1, 2t, 2t + 1.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MASKACCEL_EMULATE
  struct Held {
    uint32_t a[4], b[2];
  };
  const Held mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  emulation::Mail<Held> held(mine);
  const auto half_of = [](uint32_t word, int i) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = half_of(held[4 * g + k % 8 / 2].a[i / 2 + k / 8 * 2], k % 2);
      c[i] += left * half_of(held[4 * column + k % 8 / 2].b[k / 8], k % 2);
    }
  }
#else
  if constexpr (std::is_same_v<T, bf16>) {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2],
                                              c[3]);
  } else {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2],
                                            c[3]);
  }
#endif
}

/// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m. A lane gets columns 2t,
/// 2t + 1 of row g of each; transposed, rows 2t, 2t + 1 of column g.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef MASKACCEL_EMULATE
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  emulation::Mail<const void*> rows(emulation::aligned(row));
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = kTransposed ? 2 * t + i : g, c = kTransposed ? g : 2 * t + i;
      pair[i] = static_cast<const uint16_t*>(rows[8 * m + r])[c];
    }
    out[m] = pair[0] | uint32_t{pair[1]} << 16;
  }
#else
  const auto& source = *static_cast<const cute::uint128_t*>(row);
  if constexpr (kTransposed) {
    cute::SM75_U16x8_LDSM_T::copy(source, out[0], out[1], out[2], out[3]);
  } else {
    cute::SM75_U32x4_LDSM_N::copy(source, out[0], out[1], out[2], out[3]);
  }
#endif
}

/// Starts a copy of 16 bytes to shared memory; zeros where it is not `valid`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#ifdef MASKACCEL_EMULATE
  emulation::start_copy(to, from, valid);
#else
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*static_cast<const cute::uint128_t*>(from),
                                                               *static_cast<cute::uint128_t*>(to), valid);
#endif
}

/// Closes the group of the copies started since the last one.
__device__ __forceinline__ void close_copies() {
#ifdef MASKACCEL_EMULATE
  emulation::close_copies();
#else
  cute::cp_async_fence();
#endif
}

/// Until at most `kOpen` groups of this thread are under way.
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
#ifdef MASKACCEL_EMULATE
  emulation::wait_copies(kOpen);
#else
  cute::cp_async_wait<kOpen>();
#endif
}

__device__ __forceinline__ void sync_warp() {
#ifdef MASKACCEL_EMULATE
  emulation::shuffle(0.f, 0);
#else
  __syncwarp();
#endif
}

/// A barrier of the CTA that tells every thread whether any gave true.
__device__ __forceinline__ bool sync_threads_or(bool value) {
#ifdef MASKACCEL_EMULATE
  return emulation::sync_threads_or(value);
#else
  return __syncthreads_or(value);
#endif
}

__device__ __forceinline__ void or_to_global(int* to, int bits) {
#ifdef MASKACCEL_EMULATE
  *to |= bits;
#else
  atomicOr(to, bits);
#endif
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifndef MASKACCEL_EMULATE
  cutlass::NumericArrayConverter<T, float, 2> convert;
  cutlass::Array<float, 2> values;
  values[0] = low, values[1] = high;
  const auto pair = convert(values);
#else
  const T pair[2] = {T(low), T(high)};
#endif
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

/// 2^v to within 2 ulp; exactly 0 for -inf.
__device__ __forceinline__ float exp2_fast(float v) {
#ifdef MASKACCEL_EMULATE
  return std::exp2(v);
#else
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#endif
}

__host__ __device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

/// A value that the compiler takes for a new one: what is computed from it is computed here and not held in registers
/// from before a loop.
__device__ __forceinline__ int fresh(int value) {
#ifndef MASKACCEL_EMULATE
  asm volatile("" : "+r"(value));
#endif
  return value;
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace maskaccel::cuda
