// Gated activations: swiglu, geglu (exact erf) and gelu_tanh, forward and backward.
#pragma once

#include "../common/cuda_common.cuh"
#include "flags.h"

namespace maskaccel::cuda {

struct ActivationParams {
  const void *x = nullptr, *dy = nullptr;
  void* out = nullptr;
  int64_t rows = 0, x_stride = 0, dy_stride = 0;
  int width = 0;  // of y
  int kind = 0;
  bool gate_first = false, x_vec = false, dy_vec = false, out_vec = false;
};

struct Slope {
  float value, derivative;
};

__device__ __forceinline__ Slope activate(float v, int kind) {
  if (kind == kSwiglu) {
    const float s = 1.f / (1.f + expf(-v));
    return Slope{v * s, s * (1.f + v * (1.f - s))};
  }
  if (kind == kGeglu) {
    const float phi = 0.5f * (1.f + erff(v * 0.70710678118654752f));
    return Slope{v * phi, phi + v * 0.39894228040143268f * expf(-0.5f * v * v)};
  }
  constexpr float kBeta = 0.79788456080286536f, kCube = 0.044715f;
  const float t = tanhf(kBeta * (v + kCube * v * v * v));
  return Slope{0.5f * v * (1.f + t), 0.5f * (1.f + t) + 0.5f * v * (1.f - t * t) * kBeta * (1.f + 3.f * kCube * v * v)};
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(256) activation_kernel(const __grid_constant__ ActivationParams p) {
  const int vectors = (p.width + kVec - 1) / kVec;
  const int64_t total = p.rows * vectors;
  const bool gated = p.kind != kGeluTanh;
  const int value_at = p.gate_first ? p.width : 0, gate_at = gated && !p.gate_first ? p.width : 0;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < total; k += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = k / vectors;
    const int d = static_cast<int>(k % vectors) * kVec;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const Floats gate = to_floats<T>(load_pack(x + gate_at, d, p.width, p.x_vec));
    Floats value = zeros(), out;
    if (gated) value = to_floats<T>(load_pack(x + value_at, d, p.width, p.x_vec));
    if constexpr (!kBackward) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float a = activate(gate[i], p.kind).value;
        out[i] = gated ? value[i] * a : a;
      }
      store_pack(static_cast<T*>(p.out) + row * p.width, d, p.width, p.out_vec, to_pack<T>(out));
    } else {
      const Floats dy = to_floats<T>(load_pack(static_cast<const T*>(p.dy) + row * p.dy_stride, d, p.width, p.dy_vec));
      Floats dvalue;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const Slope a = activate(gate[i], p.kind);
        dvalue[i] = dy[i] * a.value;
        out[i] = dy[i] * a.derivative * (gated ? value[i] : 1.f);
      }
      T* dx = static_cast<T*>(p.out) + row * p.width * (gated ? 2 : 1);
      store_pack(dx + gate_at, d, p.width, p.out_vec, to_pack<T>(out));
      if (gated) store_pack(dx + value_at, d, p.width, p.out_vec, to_pack<T>(dvalue));
    }
  }
}

}  // namespace maskaccel::cuda
