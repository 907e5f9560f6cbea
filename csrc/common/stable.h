// Boxed kernels on the stable ABI without its per-argument heap traffic: arguments are borrowed views that die with
// `Inputs`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>

#include "isa.h"
#include "types.h"

namespace maskaccel {

#define MASKACCEL_SHIM(call) STD_TORCH_CHECK((call) == AOTI_TORCH_SUCCESS, "torch refused: " #call)

constexpr int kMostDims = 8;  // of a result

// A tensor argument; `handle` null where an optional one is absent.
struct Arg {
  AtenTensorHandle handle = nullptr;
  const char* name = "";
  void* data = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t code = -1;  // torch's dtype code

  explicit operator bool() const { return handle != nullptr; }
  int64_t size(int64_t i) const { return sizes[i < 0 ? i + dim : i]; }
  int64_t stride(int64_t i) const { return strides[i < 0 ? i + dim : i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  // The leading dims as one: how many rows, and the stride between them. False if no single stride reaches them all.
  bool as_rows(int64_t& rows, int64_t& step) const {
    rows = 1;
    step = 0;
    for (int64_t i = dim - 2; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (rows == 1) step = strides[i];
      if (rows > 1 && strides[i] != rows * step && numel() != 0) return false;
      rows *= sizes[i];
    }
    return true;
  }
  // The tensor at index 0 of the first dim: the same data, one dim less.
  Arg first() const {
    Arg a = *this;
    if (a) --a.dim, ++a.sizes, ++a.strides;
    return a;
  }
  // A dim of one element may have any stride.
  bool dense_last() const { return dim > 0 && (stride(-1) == 1 || size(-1) <= 1); }
  bool contiguous() const {
    int64_t expect = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] > 1 && strides[i] != expect) return numel() == 0;
      expect *= sizes[i];
    }
    return true;
  }
};

struct DtypeCodes {
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16(),
          f64 = aoti_torch_dtype_float64(), i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64(),
          u8 = aoti_torch_dtype_uint8(), cpu = aoti_torch_device_type_cpu();
  int32_t of(Dtype dtype) const { return dtype == Dtype::f32 ? f32 : dtype == Dtype::bf16 ? bf16 : f16; }
};
inline const DtypeCodes& codes() {
  static const DtypeCodes all;
  return all;
}

inline Dtype dtype_of_arg(const Arg& a) {
  const DtypeCodes& c = codes();
  STD_TORCH_CHECK(a.code == c.f32 || a.code == c.bf16 || a.code == c.f16, a.name,
                  " must be float32, bfloat16 or float16");
  return a.code == c.f32 ? Dtype::f32 : a.code == c.bf16 ? Dtype::bf16 : Dtype::f16;
}

// Owns the arguments of one call; the stack is free for results once it is built.
class Inputs {
 public:
  static constexpr int kMost = 32;

  // `bare`: an op without the operands that few calls give.
  explicit Inputs(StableIValue* stack, bool bare = false) : stack_(stack), bare_(bare) {}
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;
  ~Inputs() {
    for (int i = 0; i < count_; ++i) aoti_torch_delete_tensor_object(owned_[i]);
  }

  Arg tensor(const char* name) { return view(name, as<AtenTensorHandle>(stack_[at_++])); }
  Arg optional(const char* name) {
    auto* const cell = as<StableIValue*>(stack_[at_++]);
    if (cell == nullptr) return absent(name);
    const auto handle = as<AtenTensorHandle>(*cell);
    delete cell;
    return view(name, handle);
  }
  Arg rare(const char* name) { return bare_ ? absent(name) : optional(name); }
  double number() { return as<double>(stack_[at_++]); }
  int64_t integer() { return as<int64_t>(stack_[at_++]); }
  bool boolean() { return as<bool>(stack_[at_++]); }

 private:
  template <class T>
  static T as(StableIValue v) {
    T out;
    static_assert(sizeof(T) <= sizeof(StableIValue));
    std::memcpy(&out, &v, sizeof out);
    return out;
  }
  static Arg absent(const char* name) {
    Arg none;
    none.name = name;
    return none;
  }
  Arg view(const char* name, AtenTensorHandle handle) {
    owned_[count_++] = handle;
    Arg a;
    a.handle = handle;
    a.name = name;
    int64_t *sizes = nullptr, *strides = nullptr;
    MASKACCEL_SHIM(aoti_torch_get_dim(handle, &a.dim));
    MASKACCEL_SHIM(aoti_torch_get_sizes(handle, &sizes));
    MASKACCEL_SHIM(aoti_torch_get_strides(handle, &strides));
    MASKACCEL_SHIM(aoti_torch_get_dtype(handle, &a.code));
    const void* data = nullptr;
    MASKACCEL_SHIM(torch_get_const_data_ptr(handle, &data));
    a.data = const_cast<void*>(data);
    a.sizes = sizes;
    a.strides = strides;
    return a;
  }

  StableIValue* stack_;
  bool bare_;
  int at_ = 0, count_ = 0;
  AtenTensorHandle owned_[kMost];
};

// A fresh contiguous result; freed unless it is handed over.
class Output {
 public:
  Output() = default;
  Output(std::initializer_list<int64_t> sizes, Dtype dtype)
      : Output(sizes.begin(), static_cast<int>(sizes.size()), dtype) {}
  Output(const int64_t* sizes, int dim, Dtype dtype) : Output(sizes, dim, codes().of(dtype), size_of(dtype)) {}
  // Of any dtype: torch's code, and the bytes of an element.
  Output(const int64_t* sizes, int dim, int32_t code, int64_t item) {
    int64_t strides[kMostDims];
    int64_t n = 1;
    for (int i = dim - 1; i >= 0; --i) {
      strides[i] = n;
      n *= sizes[i] > 0 ? sizes[i] : 1;
    }
    MASKACCEL_SHIM(aoti_torch_empty_strided(dim, sizes, strides, code, codes().cpu, 0, &handle_));
    MASKACCEL_SHIM(aoti_torch_get_data_ptr(handle_, &data_));
    bytes_ = n * item;
    if (bytes_ >= kHugeFrom) prefer_huge_pages(data_, static_cast<size_t>(bytes_));
  }
  Output(Output&& o) noexcept : handle_(o.handle_), data_(o.data_), bytes_(o.bytes_) { o.handle_ = nullptr; }
  Output& operator=(Output&& o) noexcept {
    std::swap(handle_, o.handle_);
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Output() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  int64_t bytes() const { return bytes_; }
  StableIValue release() {
    StableIValue v = 0;
    std::memcpy(&v, &handle_, sizeof handle_);
    handle_ = nullptr;
    return v;
  }

 private:
  static constexpr int64_t kHugeFrom = int64_t{4} << 20;
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Results this large do not stay in the cache anyway; writing past it saves reading each line first.
constexpr int64_t kPastCacheFrom = int64_t{8} << 20;

// Whether a result of rows of `row_bytes` is written past the cache.
inline bool past_cache(const Output& out, int64_t row_bytes) {
  return row_bytes % kLine == 0 && out.bytes() >= kPastCacheFrom;
}

inline Output nothing(Dtype dtype) { return Output({0}, dtype); }

// f(begin, end) over ranges of at least `grain`, on torch's threads.
template <class F>
void parallel(int64_t total, int64_t grain, const F& f) {
  if (total <= 0) return;
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  if (total <= grain) {
    f(int64_t{0}, total);
    return;
  }
  MASKACCEL_SHIM(torch_parallel_for(0, total, grain, call, const_cast<void*>(static_cast<const void*>(&f))));
}

// Refuses an index below 0 or not below `limit`.
inline void check_indices(const char* name, const int32_t* values, int64_t count, int64_t limit) {
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  STD_TORCH_CHECK(low >= 0 && high < limit, name, " holds values from ", low, " to ", high, "; allowed are 0 to ",
                  limit - 1);
}

// Items per task so that a task touches at least about 64 KiB; smaller ones cost more to hand out than to do.
inline int64_t grain_for(int64_t elements_per_item) {
  const int64_t g = 32768 / (elements_per_item > 0 ? elements_per_item : 1);
  return g > 1 ? g : 1;
}

}  // namespace maskaccel
