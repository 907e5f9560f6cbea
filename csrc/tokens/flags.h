// Modes and flag bits of the token ops; the same values as maskaccel/ops/tokens/schema.py.
#pragma once

#include "../adaln/flags.h"

namespace maskaccel {

enum class KeepMode : int { groups, rows_columns, classes };

enum class Merge : int { replace, add_gated, mask_token, blend, zero };

enum MergeNeeds : int { kNeedFull = 1, kNeedRows = 2, kNeedMergeGate = 4, kNeedMask = 8 };

enum TokenFlags : int {
  kThreshold = 1,     // select_active
  kNoRows = 1 << 10,  // gather_modulate, beside AdalnFlags
  kPreRope = 64,      // write_kv_rows, beside QkFlags
  kScaled = 4,        // sample_logits, beside a Confidence
};

enum class Confidence : int { probability, margin, negative_entropy, log_probability };

// Numbers of `random_keep_bare`, two in one each: batch and route, n and keep; the second of each from bit 32 on.
struct PackedKeep {
  int64_t batch, route, n, keep;
  PackedKeep(int64_t batch_route, int64_t n_keep)
      : batch(batch_route & 0xffffffff), route(batch_route >> 32), n(n_keep & 0xffffffff), keep(n_keep >> 32) {}
};

constexpr float kFp8Most = 448.0f;  // largest finite e4m3fn

}  // namespace maskaccel
