// What the CPU kernels of the adaLN ops are told, and the tables by which the bindings reach them. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"
#include "flags.h"

namespace maskaccel {

// A (B, N, D) tensor with a dense last dim.
struct Rows {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;
};

// One modulation operand: value, table, or both; `group` tokens share a row.
struct Modulation {
  const void* value = nullptr;
  const void* table = nullptr;
  int64_t stride_b = 0, stride_row = 0, group = 1;
  bool present() const { return value != nullptr || table != nullptr; }
};

struct AdalnShape {
  int64_t B = 0, N = 0, D = 0;
  Dtype dtype = Dtype::f32, mod_dtype = Dtype::f32, affine_dtype = Dtype::f32;
  const int32_t* rows = nullptr;  // row index of a token; rows_stride is 0 if samples share it
  int64_t rows_stride = 0;
  float eps = 0, post_eps = 0, offset = 0;
  int flags = 0;
};

struct AdalnForward : AdalnShape {
  Rows x, a;  // `a` null: no gate stage, the norm reads x
  Modulation gate, scale, shift, scale2, shift2;
  const void *weight = nullptr, *bias = nullptr, *post_weight = nullptr;
  void *r = nullptr, *y = nullptr, *y2 = nullptr;  // null: not wanted
  bool past_cache = false;
};

// Partial sums of one gradient. A chunk owns the slots from `b * per_sample + c * per_chunk` on, one for each
// modulation row that its tokens touch. Where every row lies within one chunk the slots are the rows of the result
// themselves.
struct Partial {
  float* data = nullptr;  // null: gradient not wanted
  int64_t per_sample = 0, per_chunk = 0;
  int64_t group = 1;  // tokens that share a row; N for per-sample modulation and for weights
};

struct AdalnBackward : AdalnShape {
  Rows dr, dy, dy2, x, a;  // x: what the norm read. Null dr: zero. Null dy: no norm stage.
  Modulation gate, scale, shift, scale2, shift2;
  const void *weight = nullptr, *bias = nullptr, *post_weight = nullptr;
  void *dx = nullptr, *da = nullptr;
  Partial dgate, dscale, dshift, dscale2, dshift2, dweight, dbias, dpost;
  int64_t chunk = 0, chunks = 0;  // tokens of a chunk, chunks of a sample
  bool past_cache = false;
};

// out[o, :] = sum of the partial slots of row o: samples first (if they share the row), then chunks, in order.
struct AdalnReduce {
  const float* partial = nullptr;
  float* out = nullptr;
  int64_t B = 0, N = 0, D = 0, chunk = 0, per_sample = 0, per_chunk = 0, group = 1, out_b = 1;
};

struct QkNormRope {
  // (B, S, H, Dh) tensors by their strides; index 0 is q, 1 is k
  struct Side {
    const void* x = nullptr;
    int64_t stride_b = 0, stride_s = 0, stride_h = 0, S = 0, H = 0;
    const void *weight = nullptr, *bias = nullptr;
    void* out = nullptr;
    const void* dy = nullptr;  // backward
    int64_t dy_b = 0, dy_s = 0, dy_h = 0;
    float *dweight = nullptr, *dbias = nullptr;  // backward: one partial row per chunk
  } side[2];
  int64_t B = 0, Dh = 0;
  Dtype dtype = Dtype::f32, affine_dtype = Dtype::f32, table_dtype = Dtype::f32;
  const void *cos = nullptr, *sin = nullptr;
  int64_t cos_stride[4] = {}, sin_stride[4] = {};  // b, s, h, last
  int64_t T = 0;
  bool table_per_head = false;
  const int32_t* positions = nullptr;
  int64_t positions_stride = 0;
  float eps = 0;
  int flags = 0;
  bool past_cache = false;
  int64_t chunk = 0, chunks = 0;  // backward: tokens of a chunk, chunks of a sample
};

struct GatedActivation {
  const void *x = nullptr, *dy = nullptr;
  int64_t stride_x = 0, stride_dy = 0, width = 0;  // width of the result
  void* out = nullptr;                             // y, or dx
  Dtype dtype = Dtype::f32;
  int flags = 0;
};

// Ranges are rows (b * N + n), chunks, or output rows; any split gives the same result.
struct AdalnKernels {
  void (*forward)(const AdalnForward&, int64_t begin, int64_t end);
  void (*backward)(const AdalnBackward&, int64_t begin, int64_t end);
  void (*reduce)(const AdalnReduce&, int64_t begin, int64_t end);
  void (*qk_forward)(const QkNormRope&, int side, int64_t begin, int64_t end);  // side 2: both
  void (*qk_backward)(const QkNormRope&, int side, int64_t begin, int64_t end);
  void (*activation)(const GatedActivation&, int64_t begin, int64_t end);
  void (*activation_backward)(const GatedActivation&, int64_t begin, int64_t end);
};

MASKACCEL_DISPATCH(AdalnKernels, adaln_kernels)

}  // namespace maskaccel
