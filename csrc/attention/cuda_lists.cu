// Binding of tile_lists to CUDA.
#include <algorithm>

#include "../common/cuda_binding.h"
#include "cuda_lists.cuh"

namespace maskaccel::cuda {
namespace {

void tile_lists(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg bits = in.tensor("bits"), pattern_of = in.optional("pattern_of");
  const int64_t tiles = in.integer();
  const bool transpose = in.boolean();
  const Call call("tile_lists", bits);
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  call.check(tiles >= 0 && tiles <= kMost - 64, "tiles is ", tiles, "; allowed are 0 to ", kMost - 64);
  call.check(bits.code == codes().i32 && bits.dim == 4 && bits.contiguous() && bits.size(3) == ceil_div(tiles, 32),
             "bits must be contiguous int32 (B, H, M, ", ceil_div(tiles, 32), "), got ", shape_text(bits));
  const int64_t slabs = bits.size(0) * bits.size(1), rows = bits.size(2);
  call.check(slabs * std::max(rows, tiles) <= kMost / kWarp, "bits has too many rows or tiles: ", shape_text(bits));
  ListParams p;
  p.heads = static_cast<int>(bits.size(1)), p.rows = static_cast<int>(rows), p.tiles = static_cast<int>(tiles);
  p.words = static_cast<int>(bits.size(3));
  p.transpose = transpose;
  p.lines = transpose ? p.tiles : p.rows, p.length = transpose ? p.rows : p.tiles;
  p.all_lines = static_cast<int>(slabs * p.lines);
  p.bits = static_cast<const unsigned*>(bits.data);
  if (pattern_of) {
    call.same_device(pattern_of);
    call.check(pattern_of.code == codes().i32 && pattern_of.contiguous() && pattern_of.dim == 4 &&
                   (pattern_of.size(0) == 1 || pattern_of.size(0) == bits.size(0)) &&
                   (pattern_of.size(1) == 1 || pattern_of.size(1) == bits.size(1)) && pattern_of.size(2) == rows &&
                   pattern_of.size(3) == tiles,
               "pattern_of must be contiguous int32 (1|", bits.size(0), ", 1|", bits.size(1), ", ", rows, ", ", tiles,
               "), got ", shape_text(pattern_of));
    p.pattern_of = static_cast<const int*>(pattern_of.data);
    p.pattern_stride_h = pattern_of.size(1) == 1 ? 0 : rows * tiles;
    p.pattern_stride_b = pattern_of.size(0) == 1 ? 0 : rows * tiles * pattern_of.size(1);
  }
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return Result(call, sizes.begin(), static_cast<int>(sizes.size()), codes().i32, int64_t{sizeof(int)});
  };
  Result index = integers({bits.size(0), bits.size(1), p.lines, p.length}),
         count = integers({bits.size(0), bits.size(1), p.lines, 2});
  Result order = integers({p.all_lines});
  const Result total = integers({p.all_lines});
  p.index = static_cast<int*>(index.data()), p.count = static_cast<int*>(count.data());
  p.order = static_cast<int*>(order.data()), p.total = static_cast<int*>(total.data());
  if (p.all_lines > 0) {
    const auto blocks = [&](int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kListThreads))); };
    launch(call.op(), tile_lists_kernel, blocks(int64_t{p.all_lines} * kWarp), kListThreads, 0, call.stream(), p);
    const dim3 slabs_and_parts(static_cast<unsigned>(slabs), static_cast<unsigned>(ceil_div(p.lines, kOrderThreads)));
    launch(call.op(), tile_order_kernel, slabs_and_parts, kOrderThreads, 0, call.stream(), p);
  }
  stack[0] = index.release();
  stack[1] = count.release();
  stack[2] = order.release();
}

void register_ops(Library& m) { m.impl("tile_lists", &tile_lists); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
