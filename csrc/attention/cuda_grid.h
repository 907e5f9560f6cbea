// Which line of tiles a CTA of a grid works on: kernels of sm_80, one CTA a line. Free of CUDA and of torch.
#pragma once

#ifndef MASKACCEL_ANY
#ifdef __CUDACC__
#define MASKACCEL_ANY __host__ __device__ __forceinline__
#else
#define MASKACCEL_ANY inline
#endif
#endif

namespace maskaccel::cuda {

/// A line of tiles: a row of them, or a column.
struct Line {
  int b, h, line;
};

/// The `item`-th line to start, of `heads` heads with `lines` lines each. Lists are taken in their order, longest
/// first, within each group of samples and heads that share them: neighbouring CTAs read the same keys where a mask is
/// shared, and short lines come last everywhere.
MASKACCEL_ANY Line line_of(const int* order, int mask_batch, int mask_heads, int lines, int heads, int item) {
  // The lists of a key head whose query heads have one each are several lines of it: they have no order here.
  if (order == nullptr || (mask_heads != 1 && mask_heads != heads)) {
    const int bh = item / lines;
    return Line{bh / heads, bh % heads, item % lines};
  }
  const int listed = mask_batch * mask_heads * lines, id = order[item % listed], copy = item / listed;
  const int copies = mask_heads == 1 ? heads : 1, head = id / lines % mask_heads, sample = id / lines / mask_heads;
  return Line{mask_batch == 1 ? copy / copies : sample, mask_heads == 1 ? copy % copies : head, id % lines};
}

}  // namespace maskaccel::cuda
