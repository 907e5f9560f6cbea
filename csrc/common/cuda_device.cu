// Device properties and launch errors. The CUDA runtime is linked statically and shares torch's primary context.
#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <torch/headeronly/util/Exception.h>

#include "cuda_common.cuh"

namespace maskaccel::cuda {
namespace {

constexpr int kMaxDevices = 64;

/// How much dynamic shared memory each kernel was allowed on each device. Reading takes no lock; whoever raises a limit
/// holds one, so that no thread lowers what another has just asked for.
class SharedLimits {
 public:
  template <typename Ask>
  void raise(const void* kernel, int device, int bytes, const Ask& ask) {
    std::atomic<int>* const limit = find(kernel, device);
    if (limit != nullptr && limit->load(std::memory_order_acquire) >= bytes) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (limit != nullptr && limit->load(std::memory_order_relaxed) >= bytes) return;
    ask();
    if (limit != nullptr) limit->store(bytes, std::memory_order_release);
  }

 private:
  static constexpr size_t kSlots = 1024;  // kernels that ask are fewer by far; one without a slot asks every time
  struct Slot {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<int> bytes[kMaxDevices] = {};
  };

  std::atomic<int>* find(const void* kernel, int device) {
    const size_t start = reinterpret_cast<uintptr_t>(kernel) / 16;
    for (size_t i = 0; i < kSlots; ++i) {
      Slot& slot = slots_[(start + i) % kSlots];
      const void* owner = slot.kernel.load(std::memory_order_acquire);
      if (owner == nullptr && slot.kernel.compare_exchange_strong(owner, kernel)) owner = kernel;
      if (owner == kernel) return &slot.bytes[device];
    }
    return nullptr;
  }

  Slot slots_[kSlots];
  std::mutex mutex_;
};

SharedLimits& shared_limits() {
  static SharedLimits limits;
  return limits;
}

}  // namespace

#ifdef MASKACCEL_EMULATE

// A tiny device, so that small tests walk several rows per CTA.
DeviceInfo device_info(int) {
  const auto setting = [](const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text != nullptr ? std::atoi(text) : otherwise;
  };
  return DeviceInfo{setting("MASKACCEL_EMULATE_MULTIPROCESSORS", 1), setting("MASKACCEL_EMULATE_SHARED", 96 * 1024),
                    setting("MASKACCEL_EMULATE_CAPABILITY", 80)};
}

/// Threads of a CTA of the last launch: which kernel ran.
extern "C" int maskaccel_emulated_threads() { return static_cast<int>(emulation::machine().block_dim.x); }

Stream current_stream(int) { return nullptr; }
void check_launch(const char*) {}
void set_shared_limit(const void* kernel, int bytes) {
  shared_limits().raise(kernel, 0, bytes, [] { ++emulation::machine().attributes; });
  emulation::machine().shared_limit = static_cast<size_t>(bytes);
}

int* held_counter(int, Stream) {
  static int counters[4] = {};
  static unsigned next = 0;
  return std::getenv("MASKACCEL_EMULATE_CAPTURE") != nullptr ? nullptr : &counters[next++ % 4];
}

/// Launches, memsets, attribute calls and allocations so far.
extern "C" void maskaccel_emulated_counts(long* counts) {
  const emulation::Machine& m = emulation::machine();
  counts[0] = m.launches, counts[1] = m.memsets, counts[2] = m.attributes, counts[3] = m.allocations;
}

#else

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // reported here, and not by the next launch too
  STD_TORCH_CHECK(error == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(error));
}

}  // namespace

DeviceInfo device_info(int device) {
  static DeviceInfo known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device index out of range: ", device);
  std::call_once(once[device], [&] {
    DeviceInfo info{};
    check(cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device query");
    check(cudaDeviceGetAttribute(&info.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device query");
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device query");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device query");
    info.capability = 10 * major + minor;
    known[device] = info;
  });
  return known[device];
}

// Asked of the loaded libtorch_cuda by name. Linking it would keep this library from loading on a CPU-only torch, and a
// weak symbol would stay null on every torch: libtorch_cuda is neither in the global scope nor among our dependencies.
Stream current_stream(int device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr) {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      if (library != nullptr) symbol = dlsym(library, kName);
    }
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter != nullptr, "torch has no CUDA library loaded (libtorch_cuda.so)");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "torch gives no CUDA stream for device ", device);
  return static_cast<Stream>(stream);
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": kernel launch failed: ", cudaGetErrorString(error),
                  error == cudaErrorNoKernelImageForDevice ? " (this build has no code for this GPU)" : "");
}

void set_shared_limit(const void* kernel, int bytes) {
  int device = 0;
  if (several_devices()) check(cudaGetDevice(&device), "device query");
  STD_TORCH_CHECK(device < kMaxDevices, "device index out of range: ", device);
  shared_limits().raise(kernel, device, bytes, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory limit");
  });
}

int* held_counter(int device, Stream stream) {
  constexpr unsigned kCounters = 1 << 14;  // more than launches can be under way
  struct Ring {
    std::once_flag once;
    int* data = nullptr;
    std::atomic<unsigned> next{0};
  };
  static Ring rings[kMaxDevices];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  if (status != cudaStreamCaptureStatusNone) return nullptr;
  Ring& ring = rings[device];
  std::call_once(ring.once, [&] {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // else no memory while any thread captures
    cudaThreadExchangeStreamCaptureMode(&mode);
    void* data = nullptr;
    const bool cleared = cudaMalloc(&data, kCounters * sizeof(int)) == cudaSuccess &&
                         cudaMemsetAsync(data, 0, kCounters * sizeof(int), stream) == cudaSuccess &&
                         cudaStreamSynchronize(stream) == cudaSuccess;  // other streams will read them
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (!cleared) cudaGetLastError();
    if (cleared) ring.data = static_cast<int*>(data);
  });
  if (ring.data == nullptr) return nullptr;
  return ring.data + ring.next++ % kCounters;
}

bool several_devices() {
  static const bool several = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "device query");
    return count > 1;
  }();
  return several;
}

#endif

}  // namespace maskaccel::cuda
