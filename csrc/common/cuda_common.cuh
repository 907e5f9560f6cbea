// Vector types, rounding, reductions and launches shared by the CUDA kernels. No torch here.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef MASKACCEL_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>
#endif

namespace maskaccel::cuda {

using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;

constexpr int kVec = 8;  // elements a thread holds side by side: 16 bytes of a 16-bit type
constexpr int kWarp = 32;

template <typename T>
using Pack = cutlass::AlignedArray<T, kVec, 16>;
using Floats = cutlass::Array<float, kVec>;

/// A value of T rounded to nearest even; no rounding for float.
template <typename T>
__device__ __forceinline__ float round_to(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
#ifndef MASKACCEL_EMULATE
  } else if constexpr (std::is_same_v<T, bf16>) {
    // The upper half of a pair is the float itself. The conversion of a single value is four times slower.
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, 0f00000000;" : "=r"(bits) : "f"(v));
    return __uint_as_float(bits);
#endif
  } else {
    return static_cast<float>(T(v));
  }
}

/// Rounds to T where `on`. `on` is the same for the whole grid, so the branch costs a predicate.
template <typename T>
__device__ __forceinline__ float round_if(float v, bool on) {
  return on ? round_to<T>(v) : v;
}

/// Rounds all to T where `on`.
template <typename T>
__device__ __forceinline__ void round_all(Floats& v, bool on) {
  if (sizeof(T) == 4 || !on) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = round_to<T>(v[i]);
}

template <typename T>
__device__ __forceinline__ Floats to_floats(const Pack<T>& pack) {
  Floats out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = static_cast<float>(pack[i]);
  return out;
}

template <typename T>
__device__ __forceinline__ Pack<T> to_pack(const Floats& values) {
  Pack<T> out;
#ifndef MASKACCEL_EMULATE
  if constexpr (sizeof(T) < 4) {  // two values an instruction
    cutlass::NumericArrayConverter<T, float, kVec> convert;
    static_cast<cutlass::Array<T, kVec>&>(out) = convert(values);
    return out;
  }
#endif
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = T(values[i]);
  return out;
}

__device__ __forceinline__ Floats zeros() {
  Floats out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = 0.f;
  return out;
}

/// 16-byte words of global memory that nothing writes during the kernel: the read-only path lets the compiler move the
/// load above earlier stores.
template <typename T>
__device__ __forceinline__ Pack<T> load_words(const T* from) {
#ifdef MASKACCEL_EMULATE
  return *static_cast<const Pack<T>*>(emulation::aligned(from));
#else
  union {
    uint4 words[sizeof(Pack<T>) / 16];
    Pack<T> pack;
  };
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Pack<T>) / 16); ++i) {
    words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  return pack;
#endif
}

/// Elements [d, d + 8) of a row of `width`; zeros past its end. `vec` promises 16-byte alignment and width % 8 == 0.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int d, int width, bool vec) {
  Pack<T> out;
  if (vec) {
    if (d < width) {
      out = load_words(row + d);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) out[i] = T(0.f);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = d + i < width ? row[d + i] : T(0.f);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* row, int d, int width, bool vec, const Pack<T>& pack) {
  if (vec) {
#ifdef MASKACCEL_EMULATE
    emulation::aligned(row + (d < width ? d : 0));
#endif
    if (d < width) *reinterpret_cast<Pack<T>*>(row + d) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (d + i < width) row[d + i] = pack[i];
    }
  }
}

/// Elements [d, d + 8) at element offset `at` of an operand that is fp32 (`wide`) or T.
template <typename T>
__device__ __forceinline__ Floats load_operand(const void* base, int64_t at, bool wide, int d, int width, bool vec) {
  if (sizeof(T) == 4 || wide) return to_floats<float>(load_pack(static_cast<const float*>(base) + at, d, width, vec));
  return to_floats<T>(load_pack(static_cast<const T*>(base) + at, d, width, vec));
}

template <typename T>
__device__ __forceinline__ float load_scalar(const void* base, int64_t at, bool wide) {
  if (sizeof(T) == 4 || wide) return static_cast<const float*>(base)[at];
  return static_cast<float>(static_cast<const T*>(base)[at]);
}

__device__ __forceinline__ float inverse_sqrt(float v) {
#ifdef MASKACCEL_EMULATE
  return 1.f / std::sqrt(v);
#else
  return rsqrtf(v);
#endif
}

__device__ __forceinline__ void sync_threads() {
#ifdef MASKACCEL_EMULATE
  emulation::sync_threads();
#else
  __syncthreads();
#endif
}

template <typename T>  // float or double
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
#ifdef MASKACCEL_EMULATE
  return emulation::shuffle(v, (threadIdx.x & 31) ^ mask);
#else
  return __shfl_xor_sync(0xffffffffu, v, mask);
#endif
}

/// One bit for each lane of the warp; every lane takes part.
__device__ __forceinline__ unsigned warp_ballot(bool bit) {
#ifdef MASKACCEL_EMULATE
  unsigned bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) bits |= emulation::shuffle(bit ? 1.f : 0.f, lane) > 0.f ? 1u << lane : 0u;
  return bits;
#else
  return __ballot_sync(0xffffffffu, bit);
#endif
}

__device__ __forceinline__ int lowest_bit(unsigned bits) {
#ifdef MASKACCEL_EMULATE
  return __builtin_ctz(bits);
#else
  return __ffs(static_cast<int>(bits)) - 1;
#endif
}

__device__ __forceinline__ int count_bits(unsigned bits) {
#ifdef MASKACCEL_EMULATE
  return __builtin_popcount(bits);
#else
  return __popc(bits);
#endif
}

/// Sum over groups of `width` lanes (a power of two); every lane of the warp takes part.
template <typename T>  // float or double
__device__ __forceinline__ T warp_sum(T v, int width = kWarp) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    if (mask < width) v += shuffle_xor(v, mask);
  }
  return v;
}

/// Two values; reduced together so that a row pays one barrier for both.
struct Two {
  float a, b;
};

/// Sums over the threads that share a row: a warp, or a whole CTA. Every thread gets the result, in one fixed order.
///
/// Consecutive block reductions alternate between two buffers, so each needs one barrier: a thread can only be one
/// reduction ahead of the slowest reader.
template <bool kWholeCta>
struct RowReduce {
  Two (*shared)[kWarp];  // [2][32]
  int at = 0;

  __device__ __forceinline__ Two sum(float a, float b) {
    a = warp_sum(a);
    b = warp_sum(b);
    if constexpr (kWholeCta) {
      const int lane = threadIdx.x & 31, warps = (blockDim.x + 31) / 32;
      if (warps > 1) {
        Two* buffer = shared[at];
        at ^= 1;
        if (lane == 0) buffer[threadIdx.x / 32] = Two{a, b};
        sync_threads();
        a = over_warps(warps, lane, [&](int warp) { return buffer[warp].a; });
        b = over_warps(warps, lane, [&](int warp) { return buffer[warp].b; });
      }
    }
    return Two{a, b};
  }

  __device__ __forceinline__ float sum(float a) {
    a = warp_sum(a);
    if constexpr (kWholeCta) {
      const int lane = threadIdx.x & 31, warps = (blockDim.x + 31) / 32;
      if (warps > 1) {
        Two* buffer = shared[at];
        at ^= 1;
        if (lane == 0) buffer[threadIdx.x / 32].a = a;
        sync_threads();
        a = over_warps(warps, lane, [&](int warp) { return buffer[warp].a; });
      }
    }
    return a;
  }

 private:
  /// Groups of 8 or 16 lanes form the same sum where there are no more warps: fewer exchanges.
  template <typename Of>
  __device__ __forceinline__ float over_warps(int warps, int lane, Of&& of) const {
    const int mine = warps <= 8 ? lane & 7 : (warps <= 16 ? lane & 15 : lane);
    float v = mine < warps ? of(mine) : 0.f;
    if (warps > 16) v += shuffle_xor(v, 16);
    if (warps > 8) v += shuffle_xor(v, 8);
#pragma unroll
    for (int mask = 4; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
  }
};

#ifdef MASKACCEL_EMULATE
using Stream = void*;
inline float* dynamic_shared() { return emulation::machine().dynamic_shared.data(); }
#else
using Stream = cudaStream_t;
__device__ __forceinline__ float* dynamic_shared() {
  extern __shared__ __align__(16) float maskaccel_dynamic_shared[];
  return maskaccel_dynamic_shared;
}
#endif

/// What the launch plans need to know of the device.
struct DeviceInfo {
  int multiprocessors;
  int shared_bytes;  // the most dynamic shared memory one CTA may ask for
  int capability;    // 90 for compute capability 9.0
};

DeviceInfo device_info(int device);
/// Torch's current stream of a device.
Stream current_stream(int device);
void check_launch(const char* op);
/// Allows a kernel so much dynamic shared memory on the current device; asks CUDA only where it was allowed less.
void set_shared_limit(const void* kernel, int bytes);
bool several_devices();
/// A number in device memory that is 0, for a kernel that leaves it so; of its own for each launch under way. Null
/// while the stream is captured, as a replay may run beside other launches, and where there is no memory for them.
int* held_counter(int device, Stream stream);

/// Dynamic shared memory that a kernel gets without asking: 48 KB hold its static shared memory too.
constexpr size_t kUnaskedShared = 40 * 1024;

/// Launches and reports a refused launch under the name of the op.
template <typename Kernel, typename... Args>
void launch(const char* op, Kernel kernel, dim3 grid, int threads, size_t shared, Stream stream, const Args&... args) {
  if (shared > kUnaskedShared) set_shared_limit(reinterpret_cast<const void*>(kernel), static_cast<int>(shared));
#ifdef MASKACCEL_EMULATE
  (void)op;
  (void)stream;
  if constexpr (sizeof...(Args) == 1) {
    const bool recorded =
        (emulation::record_launch(reinterpret_cast<void*>(kernel), grid, threads, shared, &args, sizeof(args)) || ...);
    if (recorded) return;
  }
  emulation::run_grid(grid, threads, shared, [&] { kernel(args...); });
#else
  kernel<<<grid, threads, shared, stream>>>(args...);
  check_launch(op);
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace maskaccel::cuda
