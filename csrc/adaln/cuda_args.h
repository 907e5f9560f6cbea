// Reads and checks the arguments of the adaLN ops for the CUDA kernels.
#pragma once

#include "../common/cuda_binding.h"
#include "cuda_backward_plan.cuh"

namespace maskaccel::cuda {

struct Operands {
  const Call& call;
  Common c;
  Dtype dtype;

  Operands(const Call& call_, const Arg& x, int64_t flags) : call(call_), dtype(dtype_of_arg(x)) {
    call.check(x.dim == 3, x.name, " must be (B, N, D), got ", shape_text(x));
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    call.check(x.size(2) > 0 && x.size(0) * x.size(1) <= kMost && x.size(2) <= kMost / 8, x.name, " of shape ", shape_text(x),
               " is out of range: D must be positive and B * N below 2^31");
    c.batch = static_cast<int>(x.size(0));
    c.tokens = static_cast<int>(x.size(1));
    c.width = static_cast<int>(x.size(2));
    c.total = x.size(0) * x.size(1);
    c.inv_width = 1.f / static_cast<float>(c.width);
    c.flags = static_cast<int>(flags);
    call.check((flags & kNormMask) != 3 && (flags & kPostMask) != kPostMask, "unknown norm in flags ", flags);
  }

  Activation activation(const Arg& a) const {
    if (!a) return {};
    call.same_device(a);
    call.check(a.dim == 3 && a.size(0) == c.batch && a.size(1) == c.tokens && a.size(2) == c.width, a.name, " must be (", c.batch,
               ", ", c.tokens, ", ", c.width, "), got ", shape_text(a));
    call.check(dtype_of_arg(a) == dtype, a.name, " must have the dtype of the other activations");
    call.check(a.dense_last(), a.name, " must have a contiguous last dim, got stride ", a.stride(-1));
    return Activation{a.data, a.stride(0), a.stride(1), rows_aligned(a)};
  }

  void rows(const Arg& r) {
    if (!r) return;
    call.same_device(r);
    const bool shared = r.dim == 1 && r.size(0) == c.tokens;
    call.check((shared || (r.dim == 2 && r.size(0) == c.batch && r.size(1) == c.tokens)) && r.contiguous() &&
                   r.code == codes().i32,
               "rows must be contiguous int32 of shape (", c.tokens, ",) or (", c.batch, ", ", c.tokens, "), got ",
               shape_text(r));
    c.rows = static_cast<const int32_t*>(r.data);
    c.rows_stride_b = shared ? 0 : c.tokens;
  }

  Vector vector(const Arg& v) const {
    if (!v) return {};
    call.vector(v, c.width);
    return Vector{v.data, aligned(v.data) && c.width % kVec == 0};
  }

  /// Call after `rows`.
  Modulation modulation(const Arg& value, const Arg& table) const {
    Modulation m;
    m.group = c.tokens > 0 ? c.tokens : 1;
    if (table) {
      call.vector(table, c.width);
      m.table = table.data;
      m.table_vec = aligned(table.data) && c.width % kVec == 0;
    }
    if (!value) return m;
    call.same_device(value);
    call.check(value.dense_last(), value.name, " must have a contiguous last dim, got stride ", value.stride(-1));
    m.data = value.data;
    m.vec = rows_aligned(value);
    m.stride_b = value.stride(0);
    if (c.rows != nullptr) {
      call.check(value.dim == 2 && value.size(1) == c.width, value.name, " must be (R, ", c.width, ") with rows, got ",
                 shape_text(value));
      return m;
    }
    const int64_t frames = value.dim == 3 ? value.size(1) : 1;
    call.check((value.dim == 2 || value.dim == 3) && value.size(-1) == c.width &&
                   (value.size(0) == 1 || value.size(0) == c.batch) && (frames > 0 ? c.tokens % frames == 0 : c.tokens == 0),
               value.name, " must be (", c.batch, "|1, ", c.width, ") or (", c.batch, "|1, F, ", c.width,
               ") with F dividing ", c.tokens, ", got ", shape_text(value));
    if (value.size(0) == 1) m.stride_b = 0;
    m.stride_g = value.dim == 3 ? value.stride(1) : 0;
    if (c.tokens > 0) m.group = static_cast<int>(c.tokens / frames);
    return m;
  }

  /// The gradient of a modulation tensor: allocates it where it is wanted and says how it is summed.
  Result modulation_grad(bool wanted, const Arg& value, const Arg& table, const Modulation& m, Wanted& w) const {
    if (!wanted || !m.present()) return Result::nothing(call, Dtype::f32);
    Result out;
    if (!value) {
      out = Result(call, {1, 1, c.width}, Dtype::f32);
      w.everything = true;
    } else if (c.rows != nullptr) {
      out = Result(call, {c.batch, c.tokens, c.width}, Dtype::f32);
      w.per_token = true;
    } else {
      out = Result(call, {value.size(0), value.dim == 3 ? value.size(1) : 1, c.width}, Dtype::f32);
      w.over_batch = value.size(0) == 1 && c.batch > 1;
      w.group = m.group;
    }
    finish(out, w);
    return out;
  }

  Result vector_grad(bool wanted, const Arg& value, Wanted& w) const {
    if (!wanted || !value) return Result::nothing(call, Dtype::f32);
    Result out(call, {c.width}, Dtype::f32);
    w.everything = true;
    finish(out, w);
    return out;
  }

  Result like_x(bool wanted) const {
    return wanted ? Result(call, {c.batch, c.tokens, c.width}, dtype) : Result::nothing(call, dtype);
  }

 private:
  void finish(Result& out, Wanted& w) const {
    if (c.total == 0) {
      out.clear(call);  // nothing to sum
    } else {
      w.out = out.floats();
    }
  }
};

}  // namespace maskaccel::cuda
