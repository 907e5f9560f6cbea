// Types shared by kernels and bindings. Free of torch.
#pragma once

#include <cstdint>

namespace maskaccel {

enum class Dtype : int { f32, bf16, f16 };

inline int64_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

// Storage only: arithmetic is fp32, kernels convert on load and store.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr Dtype dtype_of = Dtype::f32;
template <>
constexpr Dtype dtype_of<bf16> = Dtype::bf16;
template <>
constexpr Dtype dtype_of<f16> = Dtype::f16;

// f(T{}) for the storage type of the dtype.
template <class F>
decltype(auto) with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// Outputs whose rows are this aligned may be written past the cache.
constexpr int64_t kLine = 64;

}  // namespace maskaccel
