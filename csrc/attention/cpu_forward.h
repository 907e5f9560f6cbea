// Tiled attention, forward: what the CPU kernels are told beyond the problem itself. Free of torch.
#pragma once

#include "cpu_problem.h"

namespace maskaccel {

struct AttentionForward : AttentionProblem {
  void* out = nullptr;  // (B, Sq, H, D), contiguous
  float* lse = nullptr;
  int32_t* keep = nullptr;  // null: no keep bits
  int64_t keep_words = 0;   // of a row of tiles
  bool prune = false;
  float threshold = 0;
  const float* reference_lse = nullptr;
  const float* out_scale = nullptr;
  int64_t out_scale_b = 0, out_scale_h = 0, out_scale_s = 0;
  HeadRows out_add;
  Dtype out_add_dtype = Dtype::f32;

  // Mask tiles are cut into kernel tiles of tq queries and tk keys.
  int64_t tq = 0, tk = 0;
  // Sizes in floats that depend on the instruction set: of a key head's packed keys and values, of a worker's memory.
  int64_t keys_size = 0, values_size = 0, work_size = 0;
  // Packed operands of the key heads `first_head` on, counted over samples and heads.
  int64_t first_head = 0;
  float *packed_keys = nullptr, *packed_values = nullptr;
  const uint8_t* tiles_read = nullptr;  // (heads, Nk): mask tiles of keys that no query reads are not packed
  int64_t key_tiles() const { return (Sk + tk - 1) / tk; }
};

struct ForwardKernels {
  void (*plan)(AttentionForward&);                                    // fills the sizes
  void (*pack)(const AttentionForward&, int64_t begin, int64_t end);  // kernel key tiles of the packed heads
  void (*attend)(const AttentionForward&, float* work, int64_t b, int64_t h, int64_t m);  // a row of mask tiles
};

MASKACCEL_DISPATCH(ForwardKernels, forward_attention_kernels)

}  // namespace maskaccel
