// Arguments of the adaLN ops, checked against the contract in maskaccel/ops/adaln/schema.py before anything is
// computed.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "../common/stable.h"
#include "cpu_args.h"

namespace maskaccel {

class Checked {
 public:
  // `x` fixes B, N, D and the dtype.
  Checked(AdalnShape& s, const Arg& x) : s_(s) {
    STD_TORCH_CHECK(x.dim == 3, x.name, " must be (B, N, D), got ", x.dim, " dimensions");
    s.B = x.size(0);
    s.N = x.size(1);
    s.D = x.size(2);
    STD_TORCH_CHECK(s.D > 0, x.name, " must have a last dim of at least 1");
    s.dtype = s.mod_dtype = s.affine_dtype = dtype_of_arg(x);
  }

  Rows activation(const Arg& a) const {
    if (!a) return {};
    STD_TORCH_CHECK(a.dim == 3 && a.size(0) == s_.B && a.size(1) == s_.N && a.size(2) == s_.D, a.name,
                    " must have shape (", s_.B, ", ", s_.N, ", ", s_.D, ")");
    STD_TORCH_CHECK(dtype_of_arg(a) == s_.dtype, a.name, " must have the dtype of the activations");
    STD_TORCH_CHECK(a.dense_last(), a.name, " must be contiguous in its last dim");
    return {a.data, a.stride(0), a.stride(1)};
  }

  void rows(const Arg& rows) {
    if (!rows) return;
    STD_TORCH_CHECK(rows.code == codes().i32 && rows.contiguous(), "rows must be contiguous int32");
    const bool shared = rows.dim == 1 && rows.size(0) == s_.N;
    STD_TORCH_CHECK(shared || (rows.dim == 2 && rows.size(0) == s_.B && rows.size(1) == s_.N),
                    "rows must have shape (N,) or (B, N)");
    s_.rows = static_cast<const int32_t*>(rows.data);
    s_.rows_stride = shared ? 0 : s_.N;
    has_rows_ = true;
  }

  Modulation modulation(const Arg& value, const Arg& table = {}) {
    Modulation m;
    if (table) {
      vector(table);
      same(table, s_.mod_dtype, mod_seen_);
      m.table = table.data;
    }
    if (!value) return m;
    same(value, s_.mod_dtype, mod_seen_);
    STD_TORCH_CHECK(value.dim == 2 || (value.dim == 3 && !has_rows_), value.name,
                    " must be (B, D) or (B, F, D), or (R, D) with rows");
    STD_TORCH_CHECK(value.size(-1) == s_.D && value.dense_last(), value.name, " must have a contiguous last dim of ",
                    s_.D);
    m.value = value.data;
    m.group = 1;
    if (has_rows_) {
      m.stride_row = value.stride(0);
      row_count_ = std::min(row_count_, value.size(0));
      return m;
    }
    STD_TORCH_CHECK(value.size(0) == s_.B || value.size(0) == 1, value.name, " must have a batch of ", s_.B,
                    " or 1, got ", value.size(0));
    m.stride_b = value.size(0) == 1 ? 0 : value.stride(0);
    const int64_t groups = value.dim == 3 ? value.size(1) : 1;
    STD_TORCH_CHECK(groups > 0 ? s_.N % groups == 0 : s_.N == 0, value.name, " has ", groups,
                    " rows a sample, which must divide the ", s_.N, " tokens");
    m.group = groups > 0 && s_.N > 0 ? s_.N / groups : 1;
    m.stride_row = value.dim == 3 ? value.stride(1) : 0;
    return m;
  }

  const void* affine(const Arg& v) {
    if (!v) return nullptr;
    vector(v);
    same(v, s_.affine_dtype, affine_seen_);
    return v.data;
  }

  void numbers(const Numbers& n) {
    s_.eps = static_cast<float>(n.eps);
    s_.post_eps = static_cast<float>(n.post_eps);
    s_.offset = static_cast<float>(n.offset);
    flags(n.flags);
  }

  void flags(int64_t flags) {
    STD_TORCH_CHECK(flags >= 0 && flags < 1024 && (flags & kNormMask) != 3 && (flags & kPostMask) != kPostMask,
                    "unknown flags ", flags);
    s_.flags = static_cast<int>(flags);
  }

  // Every value of `rows` names a row of every modulation tensor. Call after these.
  void row_values() const {
    if (!has_rows_ || row_count_ == kAnyCount) return;
    check_indices("rows", s_.rows, s_.rows_stride == 0 ? s_.N : s_.B * s_.N, row_count_);
  }

  bool empty() const { return s_.B == 0 || s_.N == 0; }

 private:
  void vector(const Arg& v) const {
    STD_TORCH_CHECK(v.dim == 1 && v.size(0) == s_.D && v.dense_last(), v.name, " must be contiguous of shape (", s_.D,
                    ",)");
  }
  // All operands of a kind share one dtype: that of x, or fp32.
  void same(const Arg& v, Dtype& kind, bool& seen) const {
    const Dtype d = dtype_of_arg(v);
    STD_TORCH_CHECK(seen ? d == kind : (d == s_.dtype || d == Dtype::f32), v.name,
                    " must be float32 or of the dtype of x, as all operands of its kind");
    kind = d;
    seen = true;
  }

  static constexpr int64_t kAnyCount = std::numeric_limits<int64_t>::max();
  AdalnShape& s_;
  int64_t row_count_ = kAnyCount;  // rows of the shortest modulation tensor
  bool has_rows_ = false, mod_seen_ = false, affine_seen_ = false;
};

}  // namespace maskaccel
