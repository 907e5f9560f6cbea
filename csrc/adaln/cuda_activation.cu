// Bindings of gated_activation and its backward to CUDA.
#include <algorithm>

#include "../common/cuda_binding.h"
#include "cuda_activation.cuh"

namespace maskaccel::cuda {
namespace {

template <bool kBackward>
Result run(const Call& call, const Arg& x, const Arg* dy, int64_t flags) {
  const Dtype dtype = dtype_of_arg(x);
  const int kind = static_cast<int>(flags & kActivationMask);
  call.check(kind != 3, "unknown activation in flags ", flags);
  const bool gated = kind != kGeluTanh;
  ActivationParams p;
  call.check(x.dim >= 1 && x.dim <= kMostDims && x.dense_last() && x.as_rows(p.rows, p.x_stride), x.name,
             " must have a contiguous last dim and leading dims of one common stride, got ", shape_text(x));
  const int64_t full = x.size(-1), width = gated ? full / 2 : full;
  call.check(!gated || full % 2 == 0, x.name, " must have an even last dim, got ", full);
  call.check(full < int64_t{1} << 31, x.name, " is too wide: ", full);
  p.x = x.data;
  p.width = static_cast<int>(width);
  p.kind = kind;
  p.gate_first = flags & kGateFirst;
  p.x_vec = rows_aligned(x) && width % kVec == 0;
  p.out_vec = width % kVec == 0;
  if (dy != nullptr) {
    call.same_device(*dy);
    int64_t dy_rows = 0;
    call.check(dy->dim == x.dim && std::equal(x.sizes, x.sizes + x.dim - 1, dy->sizes) && dy->size(-1) == width &&
                   dy->code == x.code && dy->dense_last() && dy->as_rows(dy_rows, p.dy_stride),
               dy->name, " must be like the result (last dim ", width,
               ") with a contiguous last dim and leading dims of one common stride, got ", shape_text(*dy));
    p.dy = dy->data;
    p.dy_vec = rows_aligned(*dy);
  }
  int64_t sizes[kMostDims];
  std::copy_n(x.sizes, x.dim, sizes);
  if (!kBackward) sizes[x.dim - 1] = width;
  Result out(call, sizes, static_cast<int>(x.dim), dtype);
  p.out = out.data();
  const int64_t vectors = p.rows * ceil_div(width, kVec);
  if (vectors == 0) return out;
  const int64_t ctas = std::min<int64_t>(ceil_div(vectors, 256), int64_t(call.info().multiprocessors) * 64);
  by_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(call.op(), activation_kernel<T, kBackward>, dim3(static_cast<unsigned>(ctas)), 256, 0, call.stream(), p);
  });
  return out;
}

void gated_activation(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x");
  const int64_t flags = in.integer();
  const Call call("gated_activation", x);
  stack[0] = run<false>(call, x, nullptr, flags).release();
}

void gated_activation_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dy = in.tensor("dy"), x = in.tensor("x");
  const int64_t flags = in.integer();
  const Call call("gated_activation_backward", x);
  stack[0] = run<true>(call, x, &dy, flags).release();
}

void register_ops(Library& m) {
  m.impl("gated_activation", &gated_activation);
  m.impl("gated_activation_backward", &gated_activation_backward);
}

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
