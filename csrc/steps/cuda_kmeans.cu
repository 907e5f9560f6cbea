// Binding of kmeans to CUDA.
#include "cuda_kmeans.cuh"

#include "../common/cuda_binding.h"
#include "kmeans_args.h"

namespace maskaccel::cuda {
namespace {

template <typename T>
void assign(const Call& call, const ClusterParams& p, int64_t metric, unsigned batch) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.tokens, kTileTokens)), batch);
  if (metric == kL1) {
    launch(call.op(), assign_kernel<T, kL1>, grid, kAssignThreads, 0, call.stream(), p);
  } else if (metric == kCosine) {
    const dim3 centroids(static_cast<unsigned>(ceil_div(p.clusters, kClusterThreads / kWarp)), batch);
    launch(call.op(), centroid_scale_kernel, centroids, kClusterThreads, 0, call.stream(), p);
    launch(call.op(), assign_kernel<T, kCosine>, grid, kAssignThreads, 0, call.stream(), p);
  } else {
    launch(call.op(), assign_kernel<T, kL2>, grid, kAssignThreads, 0, call.stream(), p);
  }
}

void kmeans(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const KMeansArgs a = read_kmeans(in);
  const Call call("kmeans", a.x);
  if (a.init) call.same_device(a.init);
  call.check(a.B < 65536 && a.N < int64_t{1} << 31 && a.D < int64_t{1} << 28, "x is out of range: ", shape_text(a.x));
  Result labels = integers(call, {a.B, a.N}), chosen = integers(call, {a.B, a.k}), centroids(call, {a.B, a.k, a.D}, Dtype::f32);
  if (a.B > 0) {
    ClusterParams p;
    p.x = a.x.data;
    p.x_b = a.x.stride(0);
    p.x_n = a.x.stride(1);
    p.tokens = static_cast<int>(a.N);
    p.width = static_cast<int>(a.D);
    p.clusters = static_cast<int>(a.k);
    p.x_vec = rows_aligned(a.x);
    p.centroids_vec = a.D % kVec == 0;
    p.start = a.init ? static_cast<const float*>(a.init.data) : nullptr;
    p.centroids = centroids.floats();
    p.labels = static_cast<int*>(labels.data());
    p.chosen = static_cast<int*>(chosen.data());
    Workspace workspace(call);
    if (a.metric == kCosine) {
      p.x_scale = workspace(a.B * a.N);
      p.scale = workspace(a.B * a.k);
    }
    float* distance = workspace(a.B * a.N * a.k);
    const auto batch = static_cast<unsigned>(a.B), clusters = static_cast<unsigned>(a.k);
    by_dtype(dtype_of_arg(a.x), [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(call.op(), start_kernel<T>, dim3(clusters, batch), kClusterThreads, 0, call.stream(), p);
      if (p.x_scale != nullptr) {
        const dim3 rows(static_cast<unsigned>(ceil_div(a.N, kClusterThreads / kWarp)), batch);
        launch(call.op(), token_scale_kernel<T>, rows, kClusterThreads, 0, call.stream(), p);
      }
      const dim3 means(static_cast<unsigned>(ceil_div(a.D, kWarp * kVec)), clusters, batch);
      for (int64_t i = 0; i < a.iters; ++i) {
        assign<T>(call, p, a.metric, batch);
        launch(call.op(), center_kernel<T>, means, kClusterThreads, 0, call.stream(), p);
      }
      p.distance = distance;
      assign<T>(call, p, a.metric, batch);
    });
    launch(call.op(), member_kernel, dim3(clusters, batch), kClusterThreads, 0, call.stream(), p);
    launch(call.op(), free_kernel, dim3(batch), kClusterThreads, 0, call.stream(), p);
  }
  stack[0] = labels.release();
  stack[1] = centroids.release();
  stack[2] = chosen.release();
}

void register_ops(Library& m) { m.impl("kmeans", &kmeans); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
