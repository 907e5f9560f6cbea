// kmeans on CPU tensors; the contract is in maskaccel/ops/steps/schema.py.
#include "cpu_kmeans.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kmeans_args.h"

namespace maskaccel {
namespace {

Output integers(std::initializer_list<int64_t> sizes) {
  return Output(sizes.begin(), static_cast<int>(sizes.size()), codes().i32, int64_t{sizeof(int32_t)});
}

// The member nearest to each centroid; for an empty cluster the nearest token that represents none yet.
void represent(const int32_t* labels, const float* distance, int64_t N, int64_t k, int32_t* chosen) {
  std::fill_n(chosen, k, -1);
  for (int64_t n = 0; n < N; ++n) {
    int32_t& best = chosen[labels[n]];
    if (best < 0 || distance[n * k + labels[n]] < distance[best * k + labels[n]]) best = static_cast<int32_t>(n);
  }
  std::vector<char> taken(static_cast<size_t>(N), 0);
  for (int64_t c = 0; c < k; ++c)
    if (chosen[c] >= 0) taken[chosen[c]] = 1;
  for (int64_t c = 0; c < k; ++c) {
    if (chosen[c] >= 0) continue;
    int32_t best = -1;
    for (int64_t n = 0; n < N; ++n)
      if (!taken[n] && (best < 0 || distance[n * k + c] < distance[best * k + c])) best = static_cast<int32_t>(n);
    chosen[c] = best;
    taken[best] = 1;
  }
}

void kmeans(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const KMeansArgs a = read_kmeans(in);
  const int64_t B = a.B, N = a.N, D = a.D, k = a.k;
  Output labels = integers({B, N}), chosen = integers({B, k}), centroids({B, k, D}, Dtype::f32);
  const KMeansKernels& kernels = kmeans_kernels();
  if (a.init) {
    std::memcpy(centroids.data(), a.init.data, static_cast<size_t>(B * k * D) * sizeof(float));
  }
  Assign s;
  s.x = a.x.data;
  s.stride_b = a.x.stride(0);
  s.stride_n = a.x.stride(1);
  s.N = N;
  s.D = D;
  s.k = k;
  s.dtype = dtype_of_arg(a.x);
  s.metric = static_cast<Metric>(a.metric);
  // At most 32 chunks: their sums are written and read once more.
  s.chunk = std::max<int64_t>(64, (N + 31) / 32);
  s.chunks = (N + s.chunk - 1) / s.chunk;
  s.centroids = centroids.floats();
  s.labels = static_cast<int32_t*>(labels.data());
  if (!a.init) parallel(B * k, grain_for(D), [&](int64_t begin, int64_t end) { kernels.start(s, begin, end); });
  std::vector<float> scale(s.metric == Metric::cosine ? static_cast<size_t>(B * k) : 0);
  s.scale = scale.data();
  const auto measure = [&] {
    for (size_t c = 0; c < scale.size(); ++c) {
      double square = 0.0;
      for (int64_t d = 0; d < D; ++d) square += static_cast<double>(s.centroids[c * D + d]) * s.centroids[c * D + d];
      scale[c] = square > 0.0 ? static_cast<float>(1.0 / std::sqrt(square)) : 0.0f;
    }
  };
  const auto assign = [&](int64_t begin, int64_t end) { kernels.assign(s, begin, end); };
  if (a.iters > 0) {
    const Output sums({B, s.chunks, k, D}, Dtype::f32), counts = integers({B, s.chunks, k});
    s.sums = sums.floats();
    s.counts = static_cast<int32_t*>(counts.data());
    Center center;
    center.D = D;
    center.k = k;
    center.chunks = s.chunks;
    center.sums = s.sums;
    center.counts = s.counts;
    center.centroids = centroids.floats();
    for (int64_t i = 0; i < a.iters; ++i) {
      measure();
      parallel(B * s.chunks, 1, assign);
      parallel(B * k, grain_for(D), [&](int64_t begin, int64_t end) { kernels.center(center, begin, end); });
    }
    s.sums = nullptr;
  }
  measure();
  const Output distance({B, N, k}, Dtype::f32);
  s.distance = distance.floats();
  parallel(B * s.chunks, 1, assign);
  for (int64_t b = 0; b < B; ++b)
    represent(s.labels + b * N, s.distance + b * N * k, N, k, static_cast<int32_t*>(chosen.data()) + b * k);
  stack[0] = labels.release();
  stack[1] = centroids.release();
  stack[2] = chosen.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("kmeans", kmeans); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
