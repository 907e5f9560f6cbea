// Reads and checks the arguments that the token ops share for the CUDA kernels; the contract is in
// maskaccel/ops/tokens/schema.py.
#pragma once

#include <algorithm>

#include "../common/cuda_binding.h"
#include "cuda_rows.cuh"
#include "flags.h"

namespace maskaccel::cuda {

constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;

inline Result long_integers(const Call& call, std::initializer_list<int64_t> sizes) {
  return Result(call, sizes.begin(), static_cast<int>(sizes.size()), codes().i64, int64_t{sizeof(int64_t)});
}
inline Result none(const Call& call, Dtype dtype) { return Result::nothing(call, dtype); }

/// A contiguous tensor (B|1, count) of one dtype. Any count where it is negative.
inline void check_table(const Call& call, const Arg& a, int32_t code, const char* dtype, int64_t batch, int64_t count) {
  call.same_device(a);
  const bool sized = a.dim == 2 && (a.size(0) == 1 || a.size(0) == batch) && (count < 0 || a.size(1) == count);
  call.check(a.code == code && sized && a.contiguous() && a.size(1) <= kMostRows, a.name, " must be contiguous ", dtype,
             " (", batch, "|1, ", count < 0 ? std::string("any") : std::to_string(count), "), got ", shape_text(a));
}

inline Index read_index(const Call& call, const Arg& a, int64_t batch, int64_t count = -1) {
  check_table(call, a, codes().i32, "int32", batch, count);
  return Index{static_cast<const int*>(a.data), a.size(0) == 1 ? 0 : a.size(1), static_cast<int>(a.size(1))};
}

/// Rows (B, N, D) with a dense last dim; sizes that are negative may be any.
inline Activation read_rows(const Call& call, const Arg& a, int64_t batch, int64_t rows, int64_t width) {
  call.same_device(a);
  call.check(a.dim == 3 && (batch < 0 || a.size(0) == batch) && (rows < 0 || a.size(1) == rows) &&
                 (width < 0 || a.size(2) == width),
             a.name, " must be (", batch < 0 ? "B" : std::to_string(batch), ", ", rows < 0 ? "N" : std::to_string(rows),
             ", ", width < 0 ? "D" : std::to_string(width), "), got ", shape_text(a));
  call.check(a.dense_last(), a.name, " must have a contiguous last dim, got stride ", a.stride(-1));
  call.check(a.size(0) * a.size(1) <= kMostRows && a.size(2) < int64_t{1} << 28, a.name,
             " is out of range: ", shape_text(a));
  return Activation{a.data, a.stride(0), a.stride(1), rows_aligned(a)};
}

/// As `read_rows` for what may be given once for all samples, and (kOne) once for all rows.
inline Activation read_shared_rows(const Call& call, const Arg& a, int64_t batch, int64_t rows, int64_t width,
                                   bool one) {
  call.same_device(a);
  call.check(a.dim == 3 && (a.size(0) == 1 || a.size(0) == batch) && (a.size(1) == rows || (one && a.size(1) == 1)) &&
                 a.size(2) == width,
             a.name, " must be (", batch, "|1, ", one ? "1|" : "", rows, ", ", width, "), got ", shape_text(a));
  call.check(a.dense_last(), a.name, " must have a contiguous last dim, got stride ", a.stride(-1));
  return Activation{a.data, a.size(0) == 1 ? 0 : a.stride(0), one && a.size(1) == 1 ? 0 : a.stride(1), rows_aligned(a)};
}

inline const int64_t* read_step(const Call& call, const Arg& step) {
  call.same_device(step);
  call.check(step.code == codes().i64 && step.dim == 1 && step.size(0) == 1, "step must be int64 of one element, got ",
             shape_text(step));
  return static_cast<const int64_t*>(step.data);
}

/// Launches the copy for `dtype` in words of 16 bytes where all rows lie on them (`vec`). Strides are given in
/// elements.
void copy_rows(const Call& call, CopyParams p, Dtype dtype, int64_t width, bool vec);

}  // namespace maskaccel::cuda
