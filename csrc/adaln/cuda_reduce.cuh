// Adds rows of fp32 partial sums in a fixed order: the second half of every backward.
#pragma once

#include "../common/cuda_common.cuh"

namespace maskaccel::cuda {

/// out[g, :] = sum over `outer` x `inner` rows of `in`: row (o, g, i) is at in + (o * outer_step + g * group_step + i) *
/// stride. A group is all partial rows of one modulation row.
struct ReduceTask {
  const float* in = nullptr;
  float* out = nullptr;
  int64_t stride = 0;
  int64_t outer_step = 0, group_step = 0;
  int outer = 1, inner = 1, groups = 0, width = 0;
};

constexpr int kMaxTasks = 8;
constexpr int kReduceLanes = 16;  // threads that share a column

struct ReduceTasks {
  ReduceTask task[kMaxTasks];
};

static __global__ void __launch_bounds__(kWarp* kReduceLanes) reduce_kernel(const __grid_constant__ ReduceTasks tasks) {
  __shared__ float buffer[kReduceLanes][kWarp];
  const ReduceTask& t = tasks.task[blockIdx.z];
  const int column = threadIdx.x % kWarp, lane = threadIdx.x / kWarp;
  const int d = blockIdx.x * kWarp + column;
  for (int g = blockIdx.y; g < t.groups; g += gridDim.y) {
    float sum = 0.f;
    if (d < t.width) {
      const int64_t count = int64_t(t.outer) * t.inner;
#pragma unroll 4
      for (int64_t k = lane; k < count; k += kReduceLanes) {
        sum += t.in[(k / t.inner * t.outer_step + g * t.group_step + k % t.inner) * t.stride + d];
      }
    }
    buffer[lane][column] = sum;
    sync_threads();
    if (lane == 0 && d < t.width) {
      for (int i = 1; i < kReduceLanes; ++i) sum += buffer[i][column];
      t.out[int64_t(g) * t.width + d] = sum;
    }
    sync_threads();
  }
}

inline void run_reduce(const char* op, const ReduceTask* tasks, int count, Stream stream) {
  ReduceTasks batch;
  int width = 0, groups = 0;
  for (int k = 0; k < count; ++k) {
    batch.task[k] = tasks[k];
    width = width > tasks[k].width ? width : tasks[k].width;
    groups = groups > tasks[k].groups ? groups : tasks[k].groups;
  }
  if (count == 0 || width == 0 || groups == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(width, kWarp)), static_cast<unsigned>(groups < 65535 ? groups : 65535),
                  static_cast<unsigned>(count));
  launch(op, reduce_kernel, grid, kWarp * kReduceLanes, 0, stream, batch);
}

}  // namespace maskaccel::cuda
