// Sizes of the backward on sm_90a, its operands in shared memory and its products. See cuda_sm90_products.cuh.
#pragma once

#include "cuda_sm90_products.cuh"

namespace maskaccel::cuda::sm90 {

static_assert(kConsumers == 2);

/// Sizes of the backward for heads of up to kDim elements. All operands lie in slabs of kSlab columns, with the widest
/// swizzle that divides kDim: each is read along its rows in one product and across them in another.
template <typename T_, int kDim_>
struct BackwardShapes {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kStep = 64, kParts = kRows / kStep;  // queries of a step, steps of a block
  static constexpr int kAhead = kDim > 64 ? 1 : 2;          // steps whose scores and dP registers hold at once
  static constexpr int kStages = kDim > 96 ? 3 : 4;
  static constexpr int kSlab = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;
  static constexpr int kScores = 64 * kStep / kGroup, kOut = 64 * kDim / kGroup;  // elements of a thread
  static constexpr int kBytesK = kRows * kDim * 2, kBytesQ = kStep * kDim * 2, kBytesTerm = kStep * 4;
};

/// Offset of element (key, query) of a slab of 64 queries of the score gradients, in elements: 128 bytes a key, with
/// the 128-byte swizzle.
__host__ __device__ constexpr int slope_at(int key, int query) {
  return key * 64 + ((query / 8 ^ key % 8) * 8 | query % 8);
}

template <typename S>
struct BackwardLayouts {
  using T = typename S::T;
  template <int... kSizes>
  using Sizes = cute::Shape<cute::Int<kSizes>...>;
  template <typename A, typename B, typename C>
  using BySlab = std::conditional_t<S::kSlab == 64, A, std::conditional_t<S::kSlab == 32, B, C>>;
  using Along =
      BySlab<cute::GMMA::Layout_K_SW128_Atom<T>, cute::GMMA::Layout_K_SW64_Atom<T>, cute::GMMA::Layout_K_SW32_Atom<T>>;
  using Across = BySlab<cute::GMMA::Layout_MN_SW128_Atom<T>, cute::GMMA::Layout_MN_SW64_Atom<T>,
                        cute::GMMA::Layout_MN_SW32_Atom<T>>;
  // Rows as they are, and their transpose.
  template <int kRowsOfTile>
  using Tile = decltype(cute::tile_to_shape(Along{}, Sizes<kRowsOfTile, S::kDim>{}));
  template <int kRowsOfTile>
  using Turned =
      decltype(cute::tile_to_shape(Across{}, Sizes<S::kDim, kRowsOfTile>{}, cute::Step<cute::_2, cute::_1>{}));
  using Slopes = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<T>{}, Sizes<64, kRows>{},
                                              cute::Step<cute::_2, cute::_1>{}));
  template <int kRowsOfTile>
  static constexpr bool fits() {
    return in_slabs<kRowsOfTile, S::kSlab, S::kDim>(
               [](int r, int c) { return int(Tile<kRowsOfTile>{}.layout_b()(r, c)); }) &&
           in_slabs<kRowsOfTile, S::kSlab, S::kDim>(
               [](int r, int c) { return int(Turned<kRowsOfTile>{}.layout_b()(c, r)); });
  }
  static_assert(fits<kRows>() && fits<S::kStep>());
  static_assert(in_slabs<kRows, 64, 64>([](int r, int c) { return int(Slopes{}.layout_b()(c, r)); }));

  template <int kColumns, cute::GMMA::Major kA, cute::GMMA::Major kB>
  using Shared =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<T, T, float, Sizes<64, kColumns, 16>, kA, kB>()));
  using Scores = Shared<S::kStep, cute::GMMA::Major::K, cute::GMMA::Major::K>;
  using Queries = Shared<S::kDim, cute::GMMA::Major::MN, cute::GMMA::Major::MN>;
  using Keys = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<T, T, float, Sizes<64, S::kDim, 16>, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
};

/// From the compiler, which would hold the descriptors of all slices in registers.
template <typename Fragment>
__device__ __forceinline__ void hide(Fragment& fragment) {
  asm volatile("" : "+r"(fragment.data().desc_.reg32_[0]));
}

/// scores = x y^T, unfinished: x the group's 64 of kRows keys, y kStep queries. Element i of a thread: row i / 2 % 2 of
/// its two, column i / 4 * 8 + lane % 4 * 2 + i % 2.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void start_turned_scores(const T* x, const T* y, int group, float (&scores)[S::kScores]) {
  using namespace cute;
  using L = BackwardLayouts<S>;
  typename L::Scores mma;
  const Tensor rows = local_tile(make_tensor(make_smem_ptr(x), typename L::template Tile<kRows>{}),
                                 Shape<_64, Int<S::kDim>>{}, make_coord(group, _0{}));
  Tensor a = mma.get_slice(0).partition_fragment_A(rows);
  const Tensor b =
      mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(y), typename L::template Tile<S::kStep>{}));
  hide(a);
  Tensor c = make_tensor(make_rmem_ptr(scores), partition_shape_C(mma, Shape<_64, Int<S::kStep>>{}));
  start<S::kDim / 16>(mma, a, b, c, true);
}

/// sum += weights y, unfinished. Weights as scores, y kStep queries, columns of the sum as columns of scores.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void start_sum(const T (&weights)[S::kScores], const T* y, float (&sum)[S::kOut]) {
  using namespace cute;
  using L = BackwardLayouts<S>;
  typename L::Keys mma;
  const auto shape = mma.get_slice(0).partition_fragment_A(make_tensor<T>(Shape<_64, Int<S::kStep>>{})).layout();
  const Tensor a = make_tensor(make_rmem_ptr(weights), shape);
  Tensor b =
      mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(y), typename L::template Turned<S::kStep>{}));
  hide(b);
  Tensor c = make_tensor(make_rmem_ptr(sum), partition_shape_C(mma, Shape<_64, Int<S::kDim>>{}));
  start<S::kStep / 16>(mma, a, b, c, false);
}

/// out = slopes^T keys, unfinished: the slopes of 64 queries, kRows keys.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void start_queries(const T* slopes, const T* keys, float (&out)[S::kOut]) {
  using namespace cute;
  using L = BackwardLayouts<S>;
  typename L::Queries mma;
  Tensor a = mma.get_slice(0).partition_fragment_A(make_tensor(make_smem_ptr(slopes), typename L::Slopes{}));
  const Tensor b =
      mma.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(keys), typename L::template Turned<kRows>{}));
  hide(a);
  Tensor c = make_tensor(make_rmem_ptr(out), partition_shape_C(mma, Shape<_64, Int<S::kDim>>{}));
  start<kRows / 16>(mma, a, b, c, true);
}

/// Writes the slopes of a warp's 16 keys, from `key` on, and kStep queries to slabs of 64 queries.
template <typename S, typename T = typename S::T>
__device__ __forceinline__ void store_slopes(const T (&slopes)[S::kScores], T* to, int key) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int query = 0; query < S::kStep; query += 16) {
    uint32_t words[4];
    std::memcpy(words, slopes + query / 2, sizeof words);
    store_matrices(to + query / 64 * 64 * kRows + slope_at(key + lane % 16, query % 64 + lane / 16 * 8), words);
  }
}

}  // namespace maskaccel::cuda::sm90
