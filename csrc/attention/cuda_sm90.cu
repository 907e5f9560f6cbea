// Host side of the attention on sm_90a: which calls it serves, TMA descriptors, launches.
#include <algorithm>
#include <cmath>
#include <torch/headeronly/util/Exception.h>

#include "cuda_sm90_consume.cuh"

namespace maskaccel::cuda {
namespace {

using namespace sm90;

constexpr int64_t kMostInt = (int64_t{1} << 31) - 1;
constexpr int kWindow = 16;  // rows of a mask that heads share, before the next head takes its turn

struct Sizes {
  int64_t batch, tokens, heads;
};

/// Whether TMA can read it: rows on 16 bytes, and no dim of several elements that all lie at one place.
bool readable(const Rows& rows, const Sizes& n) {
  constexpr int64_t kLimit = int64_t{1} << 39;  // elements of 2 bytes
  const auto good = [&](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < kLimit); };
  return rows.vec && good(n.batch, rows.stride_b) && good(n.tokens, rows.stride_s) && good(n.heads, rows.stride_h);
}

/// Boxes of `box` rows and `slab` columns of one head. What lies outside the tensor arrives as zeros.
TensorMap describe(const char* name, const Rows& rows, const Sizes& n, const AttentionArgs& a, int slab, int box) {
  const auto bytes = [](int64_t size, int64_t stride) { return static_cast<cuuint64_t>(size == 1 ? 16 : stride * 2); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(a.dim), static_cast<cuuint64_t>(n.tokens),
                               static_cast<cuuint64_t>(n.heads), static_cast<cuuint64_t>(n.batch)};
  const cuuint64_t strides[3] = {bytes(n.tokens, rows.stride_s), bytes(n.heads, rows.stride_h),
                                 bytes(n.batch, rows.stride_b)};
  const cuuint32_t boxes[4] = {static_cast<cuuint32_t>(slab), static_cast<cuuint32_t>(box), 1, 1},
                   ones[4] = {1, 1, 1, 1};
  const auto type = a.dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = slab == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                       : slab == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : CU_TENSOR_MAP_SWIZZLE_32B;
  TensorMap map;
  const CUresult result =
      encoder()(&map, type, 4, const_cast<void*>(rows.data), sizes, strides, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "tile_attention: no TMA descriptor for ", name, ": CUDA driver error ",
                  int{result});
  return map;
}

/// Without lists and keep bits the tiles of the call do not matter: the kernel takes its own.
bool uses_mask_tiles(const AttentionArgs& a) { return a.lists.index != nullptr || a.flags != 0; }
int rows_of_tile(const AttentionArgs& a) { return uses_mask_tiles(a) ? a.bm : kRows; }
int keys_of_tile(const AttentionArgs& a) { return uses_mask_tiles(a) ? a.bn : kRows; }

Schedule schedule(const AttentionArgs& a) {
  Schedule s;
  const int bm = rows_of_tile(a);
  s.order = a.lists.order;
  s.tile_rows = static_cast<int>(ceil_div(a.queries, bm));
  s.subs = bm / kRows;
  s.batch = a.batch, s.heads = a.heads;
  s.mask_batch = a.lists.batch, s.mask_heads = a.lists.heads;
  s.window = a.lists.index != nullptr ? std::min(kWindow, s.lines()) : s.tile_rows;
  return s;
}

template <typename S>
void launch_shape(const AttentionArgs& a, Stream stream) {
  const Sizes queries{a.batch, a.queries, a.heads}, keys{a.batch, a.keys, a.key_heads};
  Params p;
  p.q = describe("q", a.q, queries, a, S::kSlab, kRows);
  p.k = describe("k", a.k, keys, a, S::kSlab, S::kKeys);
  p.v = describe("v", a.v, keys, a, S::kSlabV, S::kKeys);
  p.a = a;
  p.scale_log2 = a.scale * kLog2e;
  p.bm = rows_of_tile(a);
  p.bn = keys_of_tile(a);
  p.schedule = schedule(a);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.schedule.items(), a.multiprocessors)));
  constexpr int kShared = kSharedBytes<S>;
  static_assert(kShared <= 227 * 1024);
  if constexpr (S::kKeys == kRows) {
    if (a.flags != 0) return launch("tile_attention", sm90_forward_kernel<S, true>, grid, kThreads, kShared, stream, p);
  }
  launch("tile_attention", sm90_forward_kernel<S, false>, grid, kThreads, kShared, stream, p);
}

template <typename T>
void launch_dtype(const AttentionArgs& a, Stream stream) {
  if (a.dim <= 64) return launch_shape<Shapes<T, 64>>(a, stream);
  if (a.dim <= 80) return launch_shape<Shapes<T, 80>>(a, stream);
  if (a.dim <= 96) return launch_shape<Shapes<T, 96>>(a, stream);
  if (a.dim <= 128) return launch_shape<Shapes<T, 128>>(a, stream);
  launch_shape<Shapes<T, 256>>(a, stream);
}

}  // namespace

bool sm90_serves(const AttentionArgs& a) {
  if (a.queries == 0 || a.keys == 0 || a.bias.data != nullptr || a.relpos_table != nullptr) return false;
  // The largest of the unscaled scores is that of the scaled ones only for a positive scale.
  if (!(a.scale > 0.f) || !std::isfinite(a.scale)) return false;
  if (uses_mask_tiles(a) && (a.bm % kRows != 0 || a.bn % kRows != 0)) return false;
  // The test of keep bits is for whole mask tiles: the rows of a warp group pair, the keys of a block.
  if (a.flags != 0 && (a.bm != kRows || a.bn != kRows || a.dim > 128)) return false;
  const int64_t lines = ceil_div(a.queries, rows_of_tile(a)) * a.batch * a.heads;
  if (lines > kMostInt / 2 || schedule(a).items() > kMostInt / 2) return false;
  if (int64_t{a.keys} + keys_of_tile(a) > kMostInt || int64_t{a.queries} + rows_of_tile(a) > kMostInt) return false;
  const Sizes queries{a.batch, a.queries, a.heads}, keys{a.batch, a.keys, a.key_heads};
  return readable(a.q, queries) && readable(a.k, keys) && readable(a.v, keys) && encoder() != nullptr;
}

void launch_sm90(const AttentionArgs& a, Stream stream) {
  if (a.dtype == Dtype::bf16) return launch_dtype<bf16>(a, stream);
  launch_dtype<fp16>(a, stream);
}

}  // namespace maskaccel::cuda
