// Tensor maps of the operands of attention on sm_90a.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "cuda_sm90_machine.cuh"

namespace maskaccel::cuda::sm90 {

struct Sizes {
  int64_t batch, tokens, heads;
};

/// Whether TMA can read it: rows on 16 bytes, and no dim of several elements that all lie at one place.
inline bool readable(const Rows& rows, const Sizes& n) {
  constexpr int64_t kLimit = int64_t{1} << 39;  // elements of 2 bytes
  const auto good = [&](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < kLimit); };
  return rows.vec && good(n.batch, rows.stride_b) && good(n.tokens, rows.stride_s) && good(n.heads, rows.stride_h);
}

/// Boxes of `box` rows and `slab` columns of one head. What lies outside the tensor arrives as zeros.
inline TensorMap describe(const char* op, const char* name, const Rows& rows, const Sizes& n, const AttentionArgs& a,
                          int slab, int box) {
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
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": no TMA descriptor for ", name, ": CUDA driver error ", int{result});
  return map;
}

}  // namespace maskaccel::cuda::sm90
