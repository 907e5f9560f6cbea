// Arguments of the token ops, checked against the contract in maskaccel/ops/tokens/schema.py before anything is
// computed.
#pragma once

#include <initializer_list>
#include <string>

#include "../common/stable.h"
#include "flags.h"

namespace maskaccel {

// A contiguous (B|1, K) tensor of int32 or uint8: of sample b at `data + b * stride`.
template <class T>
struct Samples {
  const T* data = nullptr;
  int64_t stride = 0, count = 0;  // count: K
  const T* of(int64_t b) const { return data == nullptr ? nullptr : data + b * stride; }
};

// `count` of -1 takes any.
template <class T>
Samples<T> samples(const Arg& a, int64_t batch, int64_t count, const char* count_name) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 1);
  if (!a) return {};
  constexpr bool wide = sizeof(T) == 4;
  STD_TORCH_CHECK(a.code == (wide ? codes().i32 : codes().u8) && a.dim == 2 && a.contiguous(), a.name,
                  " must be contiguous ", wide ? "int32" : "uint8", " (B, ", count_name, ") or (1, ", count_name, ")");
  STD_TORCH_CHECK(a.size(0) == batch || a.size(0) == 1, a.name, " has a batch of ", a.size(0), "; allowed are ", batch,
                  " and 1");
  STD_TORCH_CHECK(count < 0 || a.size(1) == count, a.name, " has ", a.size(1), " elements a sample; it must have ",
                  count);
  return {static_cast<const T*>(a.data), a.size(0) == 1 ? 0 : a.size(1), a.size(1)};
}

// Refuses values below `low` or not below `limit`.
inline void check_values(const Arg& a, int64_t low, int64_t limit) {
  const auto* const values = static_cast<const int32_t*>(a.data);
  int64_t least = low, most = low;
  for (int64_t i = 0, n = a.numel(); i < n; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  STD_TORCH_CHECK(a.numel() == 0 || (least >= low && most < limit), a.name, " holds values from ", least, " to ", most,
                  "; allowed are ", low, " to ", limit - 1);
}

inline void check_dense(const Arg& a, int32_t code, const char* what, std::initializer_list<int64_t> sizes) {
  if (!a) return;
  bool same = a.code == code && a.dim == static_cast<int64_t>(sizes.size()) && a.contiguous();
  for (int64_t i = 0; same && i < a.dim; ++i) same = a.size(i) == sizes.begin()[i];
  if (same) return;
  std::string shape;
  for (const int64_t n : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(n);
  STD_TORCH_CHECK(false, a.name, " must be contiguous ", what, " of shape (", shape, ")");
}

// The number of the step that a random op is told in a tensor.
inline int64_t read_step(const Arg& a) {
  STD_TORCH_CHECK(a.code == codes().i64 && a.dim == 1 && a.size(0) == 1, a.name, " must be int64 of shape (1,)");
  return *static_cast<const int64_t*>(a.data);
}

inline Output integers(std::initializer_list<int64_t> sizes) {
  return Output(sizes.begin(), static_cast<int>(sizes.size()), codes().i32, int64_t{sizeof(int32_t)});
}
inline Output long_integers(std::initializer_list<int64_t> sizes) {
  return Output(sizes.begin(), static_cast<int>(sizes.size()), codes().i64, int64_t{sizeof(int64_t)});
}
inline int32_t* ints(const Output& o) { return static_cast<int32_t*>(o.data()); }

}  // namespace maskaccel
