// What attention kernels on sm_90a need of the machine: wgmma, TMA, barriers. cuda_sm90_emulation.h has the same for
// the host; the kernels are written in terms of these, of CuTe's layouts and of its operands of wgmma alone.
#pragma once

#include <cuda.h>

#include "cuda_args.h"

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED

namespace maskaccel::cuda::sm90 {

constexpr int kGroup = 128;  // threads of a warp group

/// Row within the warp group and column of element i of a thread's result of wgmma and, for i < 8, of its first operand
/// in registers (PTX ISA, register fragments of wgmma.mma_async.m64nNk16).
__host__ __device__ constexpr int fragment_row(int thread, int i) {
  return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8;
}
__host__ __device__ constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

/// Where TMA and wgmma have the byte of `address` in shared memory, with the swizzle of `span` bytes (32, 64, 128; 16:
/// none): the number of a 16-byte chunk is XORed with that of its 128-byte line, bits 4 and up with bits 7 and up, as
/// many as a span has. A pattern takes 8 spans.
__host__ __device__ constexpr uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ (address >> 7 & (span / 16 - 1)) << 4;
}

using TensorMap = CUtensorMap;
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

}  // namespace maskaccel::cuda::sm90

#ifdef MASKACCEL_EMULATE
#include "cuda_sm90_emulation.h"
#else

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

namespace maskaccel::cuda::sm90 {

/// cuTensorMapEncodeTiled, asked of the driver that is loaded, or null: linking it would keep this library from loading
/// where there is none.
inline Encode encoder() {
  static const Encode found = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(symbol) : nullptr;
  }();
  return found;
}

/// Address in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return cute::cast_smem_ptr_to_uint(pointer); }

/// mbarrier in shared memory. All that other threads wrote before they arrived is there after a wait; "memory" keeps
/// the compiler from moving reads and writes of cards across, which the barriers of CUTLASS leave to it.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word)) : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect_tx(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra READY;\n"
        "bra AGAIN;\nREADY:\n}" ::"r"(shared_address(&word)),
        "r"(parity)
        : "memory");
  }
};

/// To other threads after __syncthreads, and to TMA.
__device__ __forceinline__ void publish_barriers() {
  cutlass::arch::fence_barrier_init();
  cutlass::arch::fence_view_async_shared();
}
__device__ __forceinline__ void prefetch(const TensorMap& map) { cute::prefetch_tma_descriptor(&map); }

/// Loads the box of `map` at these coordinates. `once`: nobody else will want it.
__device__ __forceinline__ void load_box(const TensorMap& map, Barrier& full, bool once, void* to, int column, int row,
                                         int head, int batch) {
  constexpr auto kOnce = cute::TMA::CacheHintSm90::EVICT_FIRST, kAgain = cute::TMA::CacheHintSm90::EVICT_LAST;
  cute::SM90_TMA_LOAD_4D::copy(&map, &full.word, static_cast<uint64_t>(once ? kOnce : kAgain), to, column, row, head,
                               batch);
}

/// Loads plain bytes, a multiple of 16.
__device__ __forceinline__ void load_plain(const float* from, Barrier& full, float* to, int bytes) {
  cute::SM90_BULK_COPY_G2S::copy(from, &full.word, to, bytes);
}

/// Writes four 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m, words[m] are its
/// elements 2 (lane % 4) and the next of row lane / 4.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&words)[4]) {
  cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], *static_cast<cute::uint128_t*>(row));
}
/// What this thread wrote to shared memory is there for wgmma after the next barrier.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Adds to four sums in global memory, side by side, in no fixed order with other threads.
__device__ __forceinline__ void add_to_global(float* to, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

/// Starts the products of kSteps slices of 16, a(_, _, i) b(_, _, i): fragments of operands in shared memory or, for a,
/// in registers, which are to be pinned before and after the wait. `fresh`: into a cleared accumulator. By all threads
/// of a warp group.
template <int kSteps, typename Mma, typename A, typename B, typename C>
__device__ __forceinline__ void start(Mma mma, const A& a, const B& b, C& c, bool fresh) {
  using namespace cute;
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  mma.accumulate_ = fresh ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    gemm(mma, a(_, _, i), b(_, _, i), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

/// Keeps the compiler from moving what makes or uses these registers across.
template <typename T, int kSize>
__device__ __forceinline__ void pin(T (&values)[kSize]) {
  using Register = std::conditional_t<sizeof(T) == 4, float, uint32_t>;
#pragma unroll
  for (int i = 0; i < kSize * static_cast<int>(sizeof(T)) / 4; ++i)
    cute::warpgroup_fence_operand(reinterpret_cast<Register*>(values)[i]);
}

/// Waits until at most kPending of the products started are unfinished; `c` is of the last one finished.
template <int kPending, int kSize>
__device__ __forceinline__ void finish(float (&c)[kSize]) {
  cute::warpgroup_wait<kPending>();
  pin(c);
}

__device__ __forceinline__ void named_arrive(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void named_wait(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
/// Whether any thread of both consumers says yes.
__device__ __forceinline__ bool named_any(int id, bool mine) {
  int any;
  asm volatile("{\n.reg .pred a, b;\nsetp.ne.s32 a, %2, 0;\nbar.red.or.pred b, %1, 256, a;\nselp.s32 %0, 1, 0, b;\n}"
               : "=r"(any)
               : "r"(id), "r"(static_cast<int>(mine))
               : "memory");
  return any != 0;
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ int warp_group() { return cutlass::canonical_warp_group_idx(); }
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

/// A few words in shared memory, for other threads after a barrier.
template <typename T>
__device__ __forceinline__ void put(T& to, const T& value) {
  to = value;
}
template <typename T>
__device__ __forceinline__ T get(const T& from) {
  return from;
}

/// Words in global memory that nothing writes during the kernel.
template <typename T>
__device__ __forceinline__ T read(const T* from) {
  return __ldg(from);
}
__device__ __forceinline__ void set_bits(int* word, int bits) { atomicOr(word, bits); }
__device__ __forceinline__ int count_up(int* counter) { return atomicAdd(counter, 1); }
__device__ __forceinline__ float inverse(float x) { return __fdividef(1.f, x); }
/// 2^x in one instruction; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <typename T, int kSize>
__device__ __forceinline__ void round_all(const float (&from)[kSize], T (&to)[kSize]) {
  cutlass::NumericArrayConverter<T, float, kSize> convert;
  reinterpret_cast<cutlass::Array<T, kSize>&>(to) =
      convert(reinterpret_cast<const cutlass::Array<float, kSize>&>(from));
}

}  // namespace maskaccel::cuda::sm90

#endif  // MASKACCEL_EMULATE
