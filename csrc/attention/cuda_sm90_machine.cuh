// What the attention kernel on sm_90a needs of the machine: wgmma, TMA, barriers. cuda_sm90_emulation.h has the same
// for the host; the kernel is written in terms of these alone.
#pragma once

#include "cuda_args.h"

namespace maskaccel::cuda::sm90 {

constexpr int kRows = 128;     // of a query tile
constexpr int kGroup = 128;    // threads of a warp group
constexpr int kThreads = 384;  // producer, two consumers

/// Sizes for heads of up to kDim elements. TMA fills what a head does not have with zeros.
///
/// Q and K lie in slabs of 64 columns with the 128-byte swizzle. V is read across its rows, and its slabs have the
/// widest swizzle that divides kDim: wgmma documents only whole swizzle atoms in that direction, so heads of 72 take 80
/// columns.
template <typename T_, int kDim_>
struct Shapes {
  using T = T_;
  static constexpr int kDim = kDim_, kWide = (kDim + 63) / 64 * 64;
  static constexpr int kKeys = kDim > 128 ? 64 : 128;  // of a block
  static constexpr int kStages = kDim > 128 ? 2 : kDim > 64 ? 3 : 4;
  static constexpr int kSlab = 64, kSlabV = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;
  static constexpr int kScores = 64 * kKeys / kGroup, kOut = 64 * kDim / kGroup;  // elements of a thread
  static constexpr int kBytesQ = kRows * kWide * 2, kBytesK = kKeys * kWide * 2, kBytesV = kKeys * kDim * 2;
};

}  // namespace maskaccel::cuda::sm90

#ifdef MASKACCEL_EMULATE
#include "cuda_sm90_emulation.h"
#else

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

namespace maskaccel::cuda::sm90 {

/// Whether TMA writes rows of `kColumns` elements where wgmma reads them: in slabs of kSlab columns, one after the
/// other, each of `kRowsOfSlab` dense rows. `place(row, column)` is the offset in elements, before the swizzle.
template <int kRowsOfSlab, int kSlab, int kColumns, typename Place>
constexpr bool in_slabs(Place place) {
  for (int row : {0, 1, 7, 8, kRowsOfSlab / 2 + 3, kRowsOfSlab - 1}) {
    for (int column = 0; column < kColumns; column += 8) {
      if (place(row, column) != column / kSlab * kSlab * kRowsOfSlab + row * kSlab + column % kSlab) return false;
    }
  }
  return true;
}

template <typename S>
struct Layouts {
  using T = typename S::T;
  template <int... kSizes>
  using Sizes = cute::Shape<cute::Int<kSizes>...>;
  using AtomK = cute::GMMA::Layout_K_SW128_Atom<T>;
  using AtomV = std::conditional_t<
      S::kSlabV == 64, cute::GMMA::Layout_MN_SW128_Atom<T>,
      std::conditional_t<S::kSlabV == 32, cute::GMMA::Layout_MN_SW64_Atom<T>, cute::GMMA::Layout_MN_SW32_Atom<T>>>;
  using Q = decltype(cute::tile_to_shape(AtomK{}, Sizes<kRows, S::kWide>{}));
  using K = decltype(cute::tile_to_shape(AtomK{}, Sizes<S::kKeys, S::kWide>{}));
  using V = decltype(cute::tile_to_shape(AtomV{}, Sizes<S::kDim, S::kKeys>{}, cute::Step<cute::_2, cute::_1>{}));
  static_assert(in_slabs<kRows, S::kSlab, S::kWide>([](int r, int c) { return int(Q{}.layout_b()(r, c)); }));
  static_assert(in_slabs<S::kKeys, S::kSlab, S::kWide>([](int r, int c) { return int(K{}.layout_b()(r, c)); }));
  static_assert(in_slabs<S::kKeys, S::kSlabV, S::kDim>([](int r, int c) { return int(V{}.layout_b()(c, r)); }));

  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, Sizes<64, S::kKeys, 16>, cute::GMMA::Major::K, cute::GMMA::Major::K>()));
  using Values = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, Sizes<64, S::kDim, 16>, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
};

using TensorMap = CUtensorMap;

/// mbarrier in shared memory. All that other threads wrote before they arrived is there after a wait; "memory" keeps
/// the compiler from moving reads and writes of cards across, which the barriers of CUTLASS leave to it.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect_tx(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra READY;\n"
        "bra AGAIN;\nREADY:\n}" ::"r"(address()),
        "r"(parity)
        : "memory");
  }

 private:
  __device__ __forceinline__ uint32_t address() const { return cute::cast_smem_ptr_to_uint(&word); }
};

__device__ __forceinline__ void publish_barriers() { cutlass::arch::fence_barrier_init(); }

/// Loads the box of `map` at these coordinates. `once`: nobody else will want it.
__device__ __forceinline__ void load_box(const TensorMap& map, Barrier& full, bool once, void* to, int column, int row,
                                         int head, int batch) {
  constexpr auto kOnce = cute::TMA::CacheHintSm90::EVICT_FIRST, kAgain = cute::TMA::CacheHintSm90::EVICT_LAST;
  cute::SM90_TMA_LOAD_4D::copy(&map, &full.word, static_cast<uint64_t>(once ? kOnce : kAgain), to, column, row, head,
                               batch);
}

/// Starts the products of kSteps slices of 16; `fresh`: into a cleared accumulator.
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

/// scores = Q K^T of the 64 rows of a consumer, unfinished. Element i of a thread: row i / 2 % 2 of its two, column
/// i / 4 * 8 + lane % 4 * 2 + i % 2.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void start_scores(const T* query, const T* keys, int group, float (&scores)[S::kScores]) {
  using namespace cute;
  using L = Layouts<S>;
  typename L::Scores mma;
  const Tensor rows = local_tile(make_tensor(make_smem_ptr(query), typename L::Q{}), Shape<_64, Int<S::kWide>>{},
                                 make_coord(group, _0{}));
  Tensor a = mma.get_slice(0).partition_fragment_A(rows);
  const Tensor b = mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(keys), typename L::K{}));
  asm volatile("" : "+r"(a.data().desc_.reg32_[0]));  // else the descriptors of all slices live in registers
  Tensor c = make_tensor(make_rmem_ptr(scores), partition_shape_C(mma, Shape<_64, Int<S::kKeys>>{}));
  start<S::kDim / 16>(mma, a, b, c, true);
}

/// out += weights V, unfinished. Weights as scores, columns of out as columns of scores.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void start_values(const T (&weights)[S::kScores], const T* values, float (&out)[S::kOut]) {
  using namespace cute;
  using L = Layouts<S>;
  typename L::Values mma;
  const auto shape = mma.get_slice(0).partition_fragment_A(make_tensor<T>(Shape<_64, Int<S::kKeys>>{})).layout();
  const Tensor a = make_tensor(make_rmem_ptr(weights), shape);
  const Tensor b = mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(values), typename L::V{}));
  Tensor c = make_tensor(make_rmem_ptr(out), partition_shape_C(mma, Shape<_64, Int<S::kDim>>{}));
  start<S::kKeys / 16>(mma, a, b, c, false);
}

template <int kSize>
__device__ __forceinline__ void pin(float (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(values[i]);
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
