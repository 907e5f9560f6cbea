// The hot bf16 kernels by name, their attributes on this device, and raw launches.
#include "kernels.h"

#include <map>
#include <stdexcept>

#include "../adaln/cuda_backward.cuh"
#include "../adaln/cuda_forward.cuh"
#include "../adaln/cuda_qk.cuh"

namespace maskaccel::inspect {
namespace {

using namespace maskaccel::cuda;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

const std::map<std::string, const void*>& table() {
  static const std::map<std::string, const void*> all = {
      {"forward_kernel<bfloat16_t, 2, true, 1, 1>",
       reinterpret_cast<const void*>(&forward_kernel<bf16, 2, true, kResidual, kPlain>)},
      {"forward_kernel<bfloat16_t, 2, true, 2, 1>",
       reinterpret_cast<const void*>(&forward_kernel<bf16, 2, true, kNormalise, kPlain>)},
      {"forward_kernel<bfloat16_t, 2, true, 3, 1>",
       reinterpret_cast<const void*>(&forward_kernel<bf16, 2, true, kBoth, kPlain>)},
      {"forward_kernel<bfloat16_t, 4, false, 2, 0>",
       reinterpret_cast<const void*>(&forward_kernel<bf16, 4, false, kNormalise, kGeneral>)},
      {"forward_kernel<bfloat16_t, 4, false, 3, 0>",
       reinterpret_cast<const void*>(&forward_kernel<bf16, 4, false, kBoth, kGeneral>)},
      {"backward_kernel<bfloat16_t, 2>", reinterpret_cast<const void*>(&backward_kernel<bf16, kNormalise>)},
      {"backward_kernel<bfloat16_t, 3>", reinterpret_cast<const void*>(&backward_kernel<bf16, kBoth>)},
      {"qk_head_kernel<bfloat16_t, false>", reinterpret_cast<const void*>(&qk_head_kernel<bf16, false>)},
      {"qk_head_kernel<bfloat16_t, true>", reinterpret_cast<const void*>(&qk_head_kernel<bf16, true>)},
  };
  return all;
}

const void* find(const std::string& name) {
  const auto at = table().find(name);
  if (at == table().end()) {
    std::string known;
    for (const auto& [k, _] : table()) known += "\n  " + k;
    throw std::invalid_argument("unknown kernel '" + name + "'; known are" + known);
  }
  return at->second;
}

struct Buffer {
  void* data = nullptr;
  explicit Buffer(size_t bytes) {
    check(cudaMalloc(&data, bytes));
    check(cudaMemset(data, 0, bytes));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event)); }
  Event(const Event&) = delete;
  ~Event() { cudaEventDestroy(event); }
};

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& [name, _] : table()) names.push_back(name);
  return names;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

Attributes attributes(const std::string& kernel) {
  cudaFuncAttributes a;
  check(cudaFuncGetAttributes(&a, find(kernel)));
  return Attributes{a.numRegs, a.localSizeBytes, a.sharedSizeBytes, a.constSizeBytes, a.maxThreadsPerBlock, a.ptxVersion,
                    a.binaryVersion};
}

Occupancy occupancy(const std::string& kernel, int threads, size_t dynamic_shared) {
  if (threads <= 0 || threads % 32 != 0) throw std::invalid_argument("threads must be a positive multiple of 32");
  Occupancy o;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&o.ctas, find(kernel), threads, dynamic_shared));
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  o.fraction = double(o.ctas) * threads / most;
  return o;
}

std::vector<float> time_forward(int batch, int tokens, int width, bool residual, int launches) {
  if (batch <= 0 || tokens <= 0 || launches <= 0) throw std::invalid_argument("batch, tokens and launches must be positive");
  if (width <= 0 || width % kVec != 0 || width > kRowSteps * kMaxRowThreads * kVec) {
    throw std::invalid_argument("width must be a multiple of 8 up to 6144, which the fast kernels take");
  }
  int device = 0;
  check(cudaGetDevice(&device));
  const size_t bytes = size_t(batch) * tokens * width * 2, row = size_t(batch) * width * 2;
  const Buffer x(bytes), a(residual ? bytes : 16), r(residual ? bytes : 16), y(bytes), gate(row), scale(row), shift(row);
  ForwardParams p;
  p.c.batch = batch;
  p.c.tokens = tokens;
  p.c.width = width;
  p.c.total = int64_t(batch) * tokens;
  p.c.eps = 1e-6f;
  p.c.offset = 1.f;
  p.c.inv_width = 1.f / width;
  const Activation rows{x.data, int64_t(tokens) * width, width, true};
  p.x = rows;
  p.scale.data = scale.data;
  p.shift.data = shift.data;
  p.scale.group = p.shift.group = p.gate.group = tokens;
  p.scale.stride_b = p.shift.stride_b = p.gate.stride_b = width;
  p.scale.vec = p.shift.vec = p.gate.vec = true;
  p.y = y.data;
  p.out_vec = true;
  if (residual) {
    p.a = rows;
    p.a.data = a.data;
    p.gate.data = gate.data;
    p.r = r.data;
  }
  const DeviceInfo info = device_info(device);
  std::vector<float> times;
  const Event begin, end;
  for (int i = 0; i < launches + 1; ++i) {
    check(cudaEventRecord(begin.event));
    if (residual) {
      run_forward<bf16, kBoth>("time_forward", p, info, nullptr);
    } else {
      run_forward<bf16, kNormalise>("time_forward", p, info, nullptr);
    }
    check(cudaEventRecord(end.event));
    check(cudaEventSynchronize(end.event));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin.event, end.event));
    if (i > 0) times.push_back(ms);  // the first launch loads the module
  }
  return times;
}

}  // namespace maskaccel::inspect
