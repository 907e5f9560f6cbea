// scatter_combine on CPU tensors; the contract is in maskaccel/ops/steps/schema.py.
#include "cpu_scatter.h"

#include <algorithm>
#include <vector>

#include "cpu_combine.h"
#include "scatter_args.h"

namespace maskaccel {
namespace {

// The fresh rows of all samples by cluster, and the group of each token.
struct Groups {
  std::vector<int32_t> order, begin, of_token;
};

Groups group(const ScatterArgs& a, int64_t B, int64_t N) {
  Groups g;
  g.order.resize(static_cast<size_t>(B * a.rows));
  g.of_token.resize(static_cast<size_t>(B * N));
  std::vector<int32_t> known;  // clusters of a sample that have fresh rows, ascending
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* const index = static_cast<const int32_t*>(a.index.data) + b * a.rows;
    const int32_t* const labels = static_cast<const int32_t*>(a.labels.data) + b * N;
    const int32_t start = static_cast<int32_t>(b * a.rows), first = static_cast<int32_t>(g.begin.size());
    int32_t* const order = g.order.data() + start;
    for (int64_t m = 0; m < a.rows; ++m) order[m] = start + static_cast<int32_t>(m);
    const auto label = [&](int32_t row) { return labels[index[row - start]]; };
    std::stable_sort(order, order + a.rows, [&](int32_t i, int32_t j) { return label(i) < label(j); });
    known.clear();
    for (int64_t m = 0; m < a.rows; ++m) {
      if (m > 0 && label(order[m]) == known.back()) continue;
      known.push_back(label(order[m]));
      g.begin.push_back(start + static_cast<int32_t>(m));
    }
    int32_t* const of_token = g.of_token.data() + b * N;
    for (int64_t n = 0; n < N; ++n) {
      if (n > 0 && labels[n] == labels[n - 1]) {  // neighbours often share a cluster
        of_token[n] = of_token[n - 1];
        continue;
      }
      const auto at = std::lower_bound(known.begin(), known.end(), labels[n]);
      const bool found = at != known.end() && *at == labels[n];
      of_token[n] = found ? first + static_cast<int32_t>(at - known.begin()) : -1;
    }
  }
  g.begin.push_back(static_cast<int32_t>(B * a.rows));
  return g;
}

void scatter_combine(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const ScatterArgs a = read_scatter(in);
  ScatterCombine s;
  static_cast<CombineHistory&>(s) = read_combine(a.history, a.weights, a.x, a.gate);
  const auto* const index = static_cast<const int32_t*>(a.index.data);
  check_indices("index", index, s.B * a.rows, s.N);
  STD_TORCH_CHECK(s.B * (s.N > a.rows ? s.N : a.rows) < int64_t{1} << 31, "history or fresh has too many rows");
  Output out({s.B, s.N, s.D}, s.dtype);
  s.out = out.data();
  s.past_cache = past_cache(out, s.D * size_of(s.dtype));
  s.newest = a.data;
  s.fresh = a.fresh.data;
  s.gamma = static_cast<float>(a.gamma);
  std::vector<int32_t> row(static_cast<size_t>(s.B * s.N), -1);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t m = 0; m < a.rows; ++m) row[b * s.N + index[b * a.rows + m]] = static_cast<int32_t>(b * a.rows + m);
  s.row = row.data();
  const ScatterKernels& kernels = scatter_kernels();
  Groups groups;
  Output mean;
  if (s.gamma > 0.0f && s.D > 0 && a.rows > 0) {
    groups = group(a, s.B, s.N);
    const int64_t count = static_cast<int64_t>(groups.begin.size()) - 1;
    mean = Output({count, s.D}, Dtype::f32);
    GroupMeans m;
    m.fresh = s.fresh;
    m.order = groups.order.data();
    m.begin = groups.begin.data();
    m.D = s.D;
    m.dtype = s.history_dtype;
    m.mean = mean.floats();
    parallel(count, grain_for(s.D), [&](int64_t begin, int64_t end) { kernels.group_means(m, begin, end); });
    s.group = groups.of_token.data();
    s.mean = m.mean;
  }
  if (s.D > 0)
    parallel(s.B * s.N, grain_for(s.D * (s.K + 2) / 2),
             [&](int64_t begin, int64_t end) { kernels.scatter_combine(s, begin, end); });
  stack[0] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("scatter_combine", scatter_combine); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
