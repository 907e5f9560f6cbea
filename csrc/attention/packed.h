// The numbers of a bare op of attention (maskaccel/ops/attention/schema.py), packed into one.
#pragma once

#include <cstdint>
#include <cstring>

namespace maskaccel {

// bm / 16 in bits 0 to 15, bn / 32 in bits 16 to 31, scale as fp32 above.
struct PackedTiles {
  int64_t bm, bn;
  float scale;
  explicit PackedTiles(int64_t packed) : bm((packed & 0xffff) * 16), bn((packed >> 16 & 0xffff) * 32) {
    const auto bits = static_cast<uint32_t>(packed >> 32);
    std::memcpy(&scale, &bits, sizeof scale);
  }
};

// Flags in bits 0 to 15, the threshold as fp32 from bit 32 on.
struct PackedTest {
  int64_t flags;
  float threshold;
  explicit PackedTest(int64_t packed) : flags(packed & 0xffff) {
    const auto bits = static_cast<uint32_t>(packed >> 32);
    std::memcpy(&threshold, &bits, sizeof threshold);
  }
};

// What a call of `tile_attention` gives: every argument; few; few, and the test of tiles.
enum class AttentionCall { whole, bare, tested };

}  // namespace maskaccel
