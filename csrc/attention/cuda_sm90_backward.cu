// Host side of the backward on sm_90a: which calls it serves, launches; and the kernel that brings dq in order.
#include "cuda_sm90_backward_consume.cuh"
#include "cuda_sm90_describe.h"

namespace maskaccel::cuda {
namespace {

using namespace sm90;

constexpr const char* kOp = "tile_attention_backward";
constexpr int kGrids = 2 * kGroup;  // threads of query_gradient_kernel
constexpr int64_t kMostCtas = (int64_t{1} << 31) - 1;

/// The call with the kernel's own tiles where there is no mask.
AttentionArgs with_tiles(AttentionArgs a) {
  if (a.lists_t.index != nullptr) return a;
  a.bm = a.bn = kRows;
  a.tile_rows = static_cast<int>(ceil_div(a.queries, kRows));
  a.tile_columns = static_cast<int>(ceil_div(a.keys, kRows));
  return a;
}

int64_t padded_queries(const AttentionArgs& a) { return ceil_div(a.queries, kRows) * kRows; }
int64_t ctas(const AttentionArgs& a) { return int64_t{a.batch} * a.key_heads * a.tile_columns * (a.bn / kRows); }

/// f of the shapes that hold the head.
template <typename T, typename F>
void by_shape(int dim, F&& f) {
  if (dim <= 64) return f(BackwardShapes<T, 64>{});
  if (dim <= 80) return f(BackwardShapes<T, 80>{});
  if (dim <= 96) return f(BackwardShapes<T, 96>{});
  f(BackwardShapes<T, 128>{});
}
template <typename F>
void by_shape(const AttentionArgs& a, F&& f) {
  if (a.dtype == Dtype::bf16) return by_shape<bf16>(a.dim, f);
  by_shape<fp16>(a.dim, f);
}
int columns_of(const AttentionArgs& a) {
  int columns = 0;
  by_shape(a, [&](auto shapes) { columns = decltype(shapes)::kDim; });
  return columns;
}

/// dq of kRows queries of one head: the sums of `query_sums`, times the scale.
template <typename S>
__global__ void __launch_bounds__(kGrids) query_gradient_kernel(const __grid_constant__ BackwardParams p) {
  const AttentionArgs& a = p.a;
  const int blocks = p.padded / kRows, thread = threadIdx.x % kGroup;
  const int64_t batch_head = blockIdx.x / blocks;
  const int first = blockIdx.x % blocks * kRows + threadIdx.x / kGroup * 64;
  const float* const from = p.dq + query_sums<S>(batch_head, p.padded, first, thread);
  float dq[S::kOut];
#pragma unroll
  for (int i = 0; i < S::kOut; i += 4) {
    const float4 sums = *reinterpret_cast<const float4*>(from + i * kGroup);
    dq[i] = sums.x * a.scale, dq[i + 1] = sums.y * a.scale, dq[i + 2] = sums.z * a.scale, dq[i + 3] = sums.w * a.scale;
  }
  const int query = first + thread / kWarp * 16 + thread % kWarp / 4;
  const int64_t batch = batch_head / a.heads, head = batch_head % a.heads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = query + 8 * r;
    typename S::T* const to = static_cast<typename S::T*>(a.dq) + ((batch * a.queries + row) * a.heads + head) * a.dim;
    write_row(dq, r, row < a.queries, to, a.dim);
  }
}

template <typename S>
void launch_shape(const AttentionArgs& a, const RowTerms& terms, float* sums, Stream stream) {
  const Sizes queries{a.batch, a.queries, a.heads}, keys{a.batch, a.keys, a.key_heads};
  BackwardParams p;
  p.q = describe(kOp, "q", a.q, queries, a, S::kSlab, S::kStep);
  p.dout = describe(kOp, "dout", a.dout, queries, a, S::kSlab, S::kStep);
  p.k = describe(kOp, "k", a.k, keys, a, S::kSlab, kRows);
  p.v = describe(kOp, "v", a.v, keys, a, S::kSlab, kRows);
  p.a = a;
  p.lse = terms.lse, p.delta = terms.delta;
  p.dq = sums;
  p.padded = terms.padded;
  constexpr int kShared = kSharedBytes<BackwardStorage<S>>;
  static_assert(kShared <= 227 * 1024);
  launch(kOp, sm90_backward_kernel<S>, dim3(static_cast<unsigned>(ctas(a))), kThreads, kShared, stream, p);
  const int64_t blocks = int64_t{a.batch} * a.heads * (terms.padded / kRows);
  launch(kOp, query_gradient_kernel<S>, dim3(static_cast<unsigned>(blocks)), kGrids, 0, stream, p);
}

}  // namespace

bool sm90_backward_serves(const AttentionArgs& call) {
  if (call.needs != (kNeedQ | kNeedK | kNeedV) || call.bias.data != nullptr || call.relpos_table != nullptr)
    return false;
  if (call.dim > 128) return false;
  if (call.lists_t.index != nullptr && (call.bm % kRows != 0 || call.bn % kRows != 0)) return false;
  const AttentionArgs a = with_tiles(call);
  if (ctas(a) > kMostCtas || int64_t{a.batch} * a.heads * (padded_queries(a) / kRows) > kMostCtas) return false;
  const Sizes queries{a.batch, a.queries, a.heads}, keys{a.batch, a.keys, a.key_heads};
  return readable(a.q, queries) && readable(a.dout, queries) && readable(a.k, keys) && readable(a.v, keys) &&
         encoder() != nullptr;
}

int64_t sm90_backward_workspace(const AttentionArgs& a) { return 2 * int64_t{a.batch} * a.heads * padded_queries(a); }
int64_t sm90_backward_sums(const AttentionArgs& a) {
  return int64_t{a.batch} * a.heads * padded_queries(a) * columns_of(a);
}

void launch_sm90_backward(const AttentionArgs& call, float* workspace, float* sums, Stream stream) {
  const AttentionArgs a = with_tiles(call);
  RowTerms terms;
  terms.padded = static_cast<int>(padded_queries(a));
  terms.lse = workspace;
  terms.delta = workspace + int64_t{a.batch} * a.heads * terms.padded;
  launch_row_terms(a, terms, stream);
  by_shape(a, [&](auto shapes) { launch_shape<decltype(shapes)>(a, terms, sums, stream); });
}

}  // namespace maskaccel::cuda
