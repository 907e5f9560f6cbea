// What every CUDA op needs at the torch boundary: device, stream, checks that name op and argument, results.
#pragma once

#include <string>

#include "cuda_common.cuh"
#include "stable.h"

#ifdef MASKACCEL_EMULATE
#define MASKACCEL_CUDA_RAW_LIBRARY(function) STABLE_TORCH_LIBRARY_IMPL(maskaccel_emulated, CPU, m) { function(m); }
#define MASKACCEL_CUDA_LIBRARY(function) MASKACCEL_CUDA_RAW_LIBRARY(function)
#else
#define MASKACCEL_CUDA_RAW_LIBRARY(function) STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CUDA, m) { function(m); }
#define MASKACCEL_CUDA_LIBRARY(function)                         \
  STABLE_TORCH_LIBRARY_IMPL(maskaccel, CUDA, m) { function(m); } \
  MASKACCEL_CUDA_RAW_LIBRARY(function)
#endif

namespace maskaccel::cuda {

using Library = torch::stable::detail::StableLibrary;

inline std::string shape_text(const Arg& a) {
  std::string text = "(";
  for (int64_t i = 0; i < a.dim; ++i) text += (i ? ", " : "") + std::to_string(a.sizes[i]);
  return text + ")";
}

/// One call of one op: its name, device and stream. Makes the device current while it lives, where there are others.
class Call {
 public:
  Call(const char* op, const Arg& first) : op_(op) {
    MASKACCEL_SHIM(aoti_torch_get_device_type(first.handle, &device_type_));
    MASKACCEL_SHIM(aoti_torch_get_device_index(first.handle, &device_));
#ifndef MASKACCEL_EMULATE
    check(device_type_ == aoti_torch_device_type_cuda(), first.name, " must be a CUDA tensor");
    if (several_devices()) MASKACCEL_SHIM(aoti_torch_create_device_guard(device_, &guard_));
    stream_ = current_stream(device_);
#endif
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }

  template <typename... Parts>
  void check(bool ok, const Parts&... parts) const {
    STD_TORCH_CHECK(ok, op_, ": ", parts...);
  }
  void same_device(const Arg& a) const {
    int32_t type = 0, index = 0;
    MASKACCEL_SHIM(aoti_torch_get_device_type(a.handle, &type));
    MASKACCEL_SHIM(aoti_torch_get_device_index(a.handle, &index));
    check(type == device_type_ && index == device_, a.name, " is on another device than the first argument");
  }
  /// A (D,) contiguous vector.
  void vector(const Arg& a, int64_t size) const {
    same_device(a);
    check(a.dim == 1 && a.size(0) == size && a.contiguous(), a.name, " must be contiguous of shape (", size, ",), got ",
          shape_text(a));
  }
  /// All present operands of a kind share one dtype: that of x, or float32. Returns whether it is float32.
  bool one_dtype(Dtype x, std::initializer_list<const Arg*> args) const {
    int32_t code = -1;
    for (const Arg* a : args) {
      if (!*a) continue;
      const Dtype dtype = dtype_of_arg(*a);
      check(dtype == x || dtype == Dtype::f32, a->name, " must have the dtype of the activations or float32");
      check(code < 0 || code == a->code, a->name, " must have the dtype of the other operands of its kind");
      code = a->code;
    }
    return code < 0 || code == codes().f32;
  }

  const char* op() const { return op_; }
  Stream stream() const { return stream_; }
  int32_t device_type() const { return device_type_; }
  int32_t device() const { return device_; }
  DeviceInfo info() const { return device_info(device_); }

 private:
  const char* op_;
  int32_t device_type_ = 0, device_ = 0;
  DeviceGuardHandle guard_ = nullptr;
  Stream stream_ = nullptr;
};

/// A fresh contiguous tensor on the device of the call; freed unless it is handed over.
class Result {
 public:
  Result() = default;
  Result(const Call& call, const int64_t* sizes, int dim, Dtype dtype)
      : Result(call, sizes, dim, codes().of(dtype), size_of(dtype)) {}
  /// Of any dtype: torch's code, and the bytes of an element.
  Result(const Call& call, const int64_t* sizes, int dim, int32_t code, int64_t item) {
    int64_t strides[kMostDims], count = 1, step = 1;
    for (int i = dim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= sizes[i] > 0 ? sizes[i] : 1;
      count *= sizes[i];
    }
    MASKACCEL_SHIM(
        aoti_torch_empty_strided(dim, sizes, strides, code, call.device_type(), call.device(), &handle_));
#ifdef MASKACCEL_EMULATE
    if (count > 0) ++emulation::machine().allocations;
#endif
    MASKACCEL_SHIM(aoti_torch_get_data_ptr(handle_, &data_));
    bytes_ = count * item;
  }
  Result(const Call& call, std::initializer_list<int64_t> sizes, Dtype dtype)
      : Result(call, sizes.begin(), static_cast<int>(sizes.size()), dtype) {}
  /// What stands for a result that was not asked for. Each is a tensor of its own: schemas promise that results share
  /// no storage, of no elements either.
  static Result nothing(const Call& call, Dtype dtype) { return Result(call, {0}, dtype); }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  Result(Result&& o) noexcept { *this = std::move(o); }
  Result& operator=(Result&& o) noexcept {
    std::swap(handle_, o.handle_);
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Result() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  void clear(const Call& call) {
    if (bytes_ == 0) return;
#ifdef MASKACCEL_EMULATE
    (void)call;
    ++emulation::machine().memsets;
    std::memset(data_, 0, static_cast<size_t>(bytes_));
#else
    if (cudaMemsetAsync(data_, 0, static_cast<size_t>(bytes_), call.stream()) != cudaSuccess) check_launch(call.op());
#endif
  }
  StableIValue release() {
    StableIValue v = 0;
    std::memcpy(&v, &handle_, sizeof handle_);
    handle_ = nullptr;
    return v;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// An int32 result.
inline Result integers(const Call& call, std::initializer_list<int64_t> sizes) {
  return Result(call, sizes.begin(), static_cast<int>(sizes.size()), codes().i32, int64_t{sizeof(int)});
}

/// Workspace of one call. Memory goes back to torch's caching allocator on the stream that used it.
class Workspace {
 public:
  explicit Workspace(const Call& call) : call_(call) {}
  float* operator()(int64_t count) {
    pieces_[used_] = Result(call_, {count}, Dtype::f32);
    return pieces_[used_++].floats();
  }

 private:
  const Call& call_;
  Result pieces_[12];
  int used_ = 0;
};

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

/// Whether rows at these element strides start on 16 bytes. Strides of dims of one element do not matter.
inline bool rows_aligned(const Arg& a) {
  const int64_t bytes = a.code == codes().f32 ? 4 : 2;
  if (!aligned(a.data) || a.size(-1) % kVec != 0) return false;
  for (int64_t i = 0; i + 1 < a.dim; ++i) {
    if (a.size(i) > 1 && a.stride(i) * bytes % 16 != 0) return false;
  }
  return true;
}

template <typename T>
struct Tag {
  using type = T;
};

template <typename F>
void by_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(Tag<float>{});
    case Dtype::bf16: return f(Tag<bf16>{});
    case Dtype::f16: return f(Tag<fp16>{});
  }
}

}  // namespace maskaccel::cuda
