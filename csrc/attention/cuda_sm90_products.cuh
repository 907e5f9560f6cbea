// Tiles of the attention on sm_90a in shared memory, and the products of wgmma over them.
//
// All of it runs on the host too (cuda_sm90_emulation.h), down to the matrix descriptors: there, TMA writes where the
// tensor maps say and wgmma reads where the descriptors say, so an operand whose two sides disagree shows in tests.
// To add an operand: a layout, tiled from the GMMA atom of its swizzle; a static_assert that TMA's slabs are that
// layout (in_slabs, is_swizzle); a fragment of it in a tiled MMA of the right majors, from shared memory (SS) or
// registers (RS) alike, whose registers are where fragment_row and fragment_column say (is_fragment); and start().
// describe() takes the width of its slabs.
#pragma once

#include "cuda_sm90_machine.cuh"
#include "cuda_sm90_tuning.h"

namespace maskaccel::cuda::sm90 {

constexpr int kConsumers = kTuning.consumers;
constexpr int kRows = 64 * kConsumers;               // of a query tile
constexpr int kThreads = kGroup * (1 + kConsumers);  // producer, consumers

/// Sizes for heads of up to kDim elements. TMA fills what a head does not have with zeros.
///
/// Q and K lie in slabs of 64 columns with the 128-byte swizzle. V is read across its rows, and its slabs have the
/// widest swizzle that divides kDim: wgmma documents only whole swizzle atoms in that direction, so heads of 72 take 80
/// columns.
template <typename T_, int kDim_, int kKeys_ = block_keys(kDim_)>
struct Shapes {
  using T = T_;
  static constexpr int kDim = kDim_, kWide = (kDim + 63) / 64 * 64;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = kTuning.stages != 0            ? kTuning.stages
                                 : kDim > 128                   ? 2
                                 : (kDim > 64 ? 3 : 4) * (kKeys == 64 ? 2 : 1);
  static constexpr int kSlab = 64, kSlabV = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;
  static constexpr int kScores = 64 * kKeys / kGroup, kOut = 64 * kDim / kGroup;  // elements of a thread
  static constexpr int kBytesQ = kRows * kWide * 2, kBytesK = kKeys * kWide * 2, kBytesV = kKeys * kDim * 2;
};

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

/// Whether CuTe's swizzle, of the layout of an operand, is the one of kSlab columns.
template <int kSlab, typename Swizzle>
constexpr bool is_swizzle(Swizzle swizzle) {
  for (uint32_t address = 0; address < 2048; address += 16) {
    if (swizzle(address) != swizzled(address, kSlab * 2)) return false;
  }
  return true;
}

/// Whether CuTe's (thread, element) layout of kColumns columns is that of fragment_row and fragment_column.
template <int kColumns, typename Layout>
constexpr bool is_fragment(Layout layout) {
  for (int thread : {0, 1, 2, 3, 4, 28, 31, 32, 64, 127}) {
    for (int i = 0; i < kColumns / 2; ++i) {
      if (layout(thread, i) != fragment_row(thread, i) + 64 * fragment_column(thread, i)) return false;
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
  static_assert(is_swizzle<S::kSlab>(Q{}.layout_a()) && is_swizzle<S::kSlab>(K{}.layout_a()));
  static_assert(is_swizzle<S::kSlabV>(V{}.layout_a()));

  using Scores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, Sizes<64, S::kKeys, 16>, cute::GMMA::Major::K, cute::GMMA::Major::K>()));
  using Values = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, Sizes<64, S::kDim, 16>, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(is_fragment<S::kKeys>(typename Scores::AtomLayoutC_TV{}));
  static_assert(is_fragment<S::kDim>(typename Values::AtomLayoutC_TV{}));
  static_assert(is_fragment<16>(typename Values::AtomLayoutA_TV{}));
};

/// scores = Q K^T of the 64 rows of a consumer, unfinished. Element i of a thread is that of fragment_row and
/// fragment_column.
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

/// out += weights V, unfinished. Weights as scores, columns of out as columns of scores. Who waits pins the weights.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void start_values(T (&weights)[S::kScores], const T* values, float (&out)[S::kOut]) {
  using namespace cute;
  using L = Layouts<S>;
  typename L::Values mma;
  const auto shape = mma.get_slice(0).partition_fragment_A(make_tensor<T>(Shape<_64, Int<S::kKeys>>{})).layout();
  const Tensor a = make_tensor(make_rmem_ptr(weights), shape);
  const Tensor b = mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(values), typename L::V{}));
  Tensor c = make_tensor(make_rmem_ptr(out), partition_shape_C(mma, Shape<_64, Int<S::kDim>>{}));
  pin(weights);
  start<S::kKeys / 16>(mma, a, b, c, false);
}

}  // namespace maskaccel::cuda::sm90
