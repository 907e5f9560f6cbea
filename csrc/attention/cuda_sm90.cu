// Host side of the attention on sm_90a: which calls it serves, launches.
#include <algorithm>
#include <cmath>

#include "cuda_sm90_consume.cuh"
#include "cuda_sm90_describe.h"

namespace maskaccel::cuda {
namespace {

using namespace sm90;

constexpr const char* kOp = "tile_attention";
constexpr int64_t kMostInt = (int64_t{1} << 31) - 1;

/// Without lists and keep bits the tiles of the call do not matter: the kernel takes its own.
bool uses_mask_tiles(const AttentionArgs& a) { return a.lists.index != nullptr || a.flags != 0; }
int rows_of_tile(const AttentionArgs& a) { return uses_mask_tiles(a) ? a.bm : kRows; }
int keys_of_tile(const AttentionArgs& a) { return uses_mask_tiles(a) ? a.bn : block_keys(a.dim); }

Schedule schedule(const AttentionArgs& a) {
  Schedule s;
  const int bm = rows_of_tile(a);
  s.order = a.lists.order;
  s.tile_rows = static_cast<int>(ceil_div(a.queries, bm));
  s.subs = bm / kRows;
  s.batch = a.batch, s.heads = a.heads;
  s.mask_batch = a.lists.batch, s.mask_heads = a.lists.heads;
  s.window = a.lists.index != nullptr ? std::min(kTuning.window, s.lines()) : s.tile_rows;
  return s;
}

template <typename S>
void launch_shape(const AttentionArgs& a, Stream stream) {
  const Sizes queries{a.batch, a.queries, a.heads}, keys{a.batch, a.keys, a.key_heads};
  Params p;
  p.q = describe(kOp, "q", a.q, queries, a, S::kSlab, kRows);
  p.k = describe(kOp, "k", a.k, keys, a, S::kSlab, S::kKeys);
  p.v = describe(kOp, "v", a.v, keys, a, S::kSlabV, S::kKeys);
  p.a = a;
  p.scale_log2 = a.scale * kLog2e;
  p.bm = rows_of_tile(a);
  p.bn = keys_of_tile(a);
  p.schedule = schedule(a);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.schedule.items(), a.multiprocessors)));
  constexpr int kShared = kSharedBytes<Storage<S>>;
  static_assert(kShared <= 227 * 1024);
  if constexpr (S::kKeys == kRows && kTuning.dim == 0) {
    if (a.flags != 0) return launch(kOp, sm90_forward_kernel<S, true>, grid, kThreads, kShared, stream, p);
  }
  launch(kOp, sm90_forward_kernel<S, false>, grid, kThreads, kShared, stream, p);
}

/// The head dim of the kernel that serves a head.
constexpr int width_of(int dim) { return dim <= 64 ? 64 : dim <= 80 ? 80 : dim <= 96 ? 96 : dim <= 128 ? 128 : 256; }

/// Whether a kernel of this head dim has blocks of 64 keys too, for tiles that are no multiple of 128: the usual heads.
constexpr bool has_short_blocks(int width) { return kTuning.dim == 0 && (width == 64 || width == 128); }
bool needs_short_blocks(const AttentionArgs& a) { return uses_mask_tiles(a) && a.bn % block_keys(a.dim) != 0; }

template <typename T, int kDim>
void launch_width(const AttentionArgs& a, Stream stream) {
  if constexpr (kTuning.dim == 0 || kTuning.dim == kDim) {
    if (width_of(a.dim) != kDim) return;
    if constexpr (has_short_blocks(kDim)) {
      if (needs_short_blocks(a)) return launch_shape<Shapes<T, kDim, 64>>(a, stream);
    }
    launch_shape<Shapes<T, kDim>>(a, stream);
  }
}
template <typename T, int... kDims>
void launch_widths(const AttentionArgs& a, Stream stream) {
  (launch_width<T, kDims>(a, stream), ...);
}

/// Whether this build has the kernel.
bool compiled(const AttentionArgs& a) {
  return kTuning.dim == 0 || (width_of(a.dim) == kTuning.dim && a.dtype == Dtype::bf16 && a.flags == 0);
}

}  // namespace

bool sm90_serves(const AttentionArgs& a) {
  if (a.queries == 0 || a.keys == 0 || a.bias.data != nullptr || a.relpos_table != nullptr) return false;
  // The largest of the unscaled scores is that of the scaled ones only for a positive scale.
  if (!(a.scale > 0.f) || !std::isfinite(a.scale)) return false;
  if (!compiled(a)) return false;
  if (uses_mask_tiles(a) && a.bm % kRows != 0) return false;
  if (needs_short_blocks(a) && (a.bn % 64 != 0 || !has_short_blocks(width_of(a.dim)))) return false;
  // The test of keep bits is for whole mask tiles: the rows of a warp group pair, the keys of a block.
  if (a.flags != 0 && (a.bm != kRows || a.bn != block_keys(a.dim) || a.dim > 128)) return false;
  const int64_t lines = ceil_div(a.queries, rows_of_tile(a)) * a.batch * a.heads;
  if (lines > kMostInt / 2 || schedule(a).items() > kMostInt / 2) return false;
  if (int64_t{a.keys} + keys_of_tile(a) > kMostInt || int64_t{a.queries} + rows_of_tile(a) > kMostInt) return false;
  const Sizes queries{a.batch, a.queries, a.heads}, keys{a.batch, a.keys, a.key_heads};
  return readable(a.q, queries) && readable(a.k, keys) && readable(a.v, keys) && encoder() != nullptr;
}

void launch_sm90(const AttentionArgs& a, Stream stream) {
  if (a.dtype == Dtype::bf16) return launch_widths<bf16, 64, 80, 96, 128, 256>(a, stream);
  if constexpr (kTuning.dim == 0) launch_widths<fp16, 64, 80, 96, 128, 256>(a, stream);
}

}  // namespace maskaccel::cuda
