// Device properties and launch errors. The CUDA runtime is linked statically and shares torch's primary context.
#include <mutex>
#include <torch/headeronly/util/Exception.h>

#include "cuda_common.cuh"

namespace maskaccel::cuda {

#ifdef MASKACCEL_EMULATE

// A tiny device, so that small tests walk several rows per CTA.
DeviceInfo device_info(int) {
  const char* shared = std::getenv("MASKACCEL_EMULATE_SHARED");
  return DeviceInfo{1, shared != nullptr ? std::atoi(shared) : 96 * 1024};
}
void check_launch(const char*) {}
void set_shared_limit(const void*, int) {}

#else

namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(error));
}

}  // namespace

DeviceInfo device_info(int device) {
  constexpr int kMaxDevices = 64;
  static DeviceInfo known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device index out of range: ", device);
  std::call_once(once[device], [&] {
    DeviceInfo info{};
    check(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device query");
    check(cudaDeviceGetAttribute(&info.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device query");
    known[device] = info;
  });
  return known[device];
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": kernel launch failed: ", cudaGetErrorString(error),
                  error == cudaErrorNoKernelImageForDevice ? " (this build has no code for this GPU)" : "");
}

void set_shared_limit(const void* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory limit");
}

#endif

}  // namespace maskaccel::cuda
