// Flag bits of the adaLN ops; the same values as maskaccel/ops/adaln/schema.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace maskaccel {

enum AdalnFlags : int {
  kNormMask = 3,
  kNormLayer = 0,
  kNormRms = 1,
  kNormNone = 2,
  kNarrow = 4,
  kWeightPlusOne = 8,
  kGateActMask = 48,
  kGateNone = 0,
  kGateTanh = 16,
  kGateClampTanh = 32,
  kGateSigmoid1m = 48,
  kPostMask = 192,
  kPostNone = 0,
  kPostRms = 64,
  kPostLayer = 128,
  kClip = 256,
  kNoResidual = 512,
};

enum QkFlags : int { kAcrossHeads = 16, kRopeHalf = 32 };

enum ActivationFlags : int { kActivationMask = 3, kSwiglu = 0, kGeglu = 1, kGeluTanh = 2, kGateFirst = 4 };

// The numbers of a forward op. A bare op takes them packed into one: flags, offset in bit 16, eps as fp32 above bit 32.
struct Numbers {
  double eps = 0, post_eps = 0, offset = 0;
  int64_t flags = 0;
};
inline Numbers unpacked(int64_t packed) {
  const auto bits = static_cast<uint32_t>(packed >> 32);
  float eps = 0;
  std::memcpy(&eps, &bits, sizeof eps);
  return {eps, eps, packed >> 16 & 1 ? 1.0 : 0.0, packed & 0xffff};
}

enum Needs : int {
  kNeedX = 1,
  kNeedA = 2,
  kNeedGate = 4,
  kNeedScale = 8,
  kNeedShift = 16,
  kNeedScale2 = 32,
  kNeedShift2 = 64,
  kNeedWeight = 128,
  kNeedBias = 256,
  kNeedPost = 512,
};

}  // namespace maskaccel
