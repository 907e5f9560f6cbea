// Flag bits of the adaLN ops; the same values as maskaccel/ops/adaln/schema.py.
#pragma once

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
