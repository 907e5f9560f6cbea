// Shared memory as TMA and wgmma of sm_90a address it, on the host: what CUDA's driver API and the PTX ISA document of
// tensor maps, swizzles and matrix descriptors, and nothing of CuTe. Only built with MASKACCEL_EMULATE.
//
// TMA writes the bytes of a box where its tensor map says, wgmma reads its operands where their descriptors say: if the
// two disagree, the product is wrong. MASKACCEL_EMULATE_FAULT names one thing that the machine does wrong, so that a
// test can show that it would be seen.
#pragma once

#include <cuda.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace maskaccel::cuda::sm90 {

inline bool fault(const char* name) {
  const char* const asked = std::getenv("MASKACCEL_EMULATE_FAULT");
  return asked != nullptr && std::strcmp(asked, name) == 0;
}

[[noreturn]] inline void stop(const char* format, ...) {
  std::va_list values;
  va_start(values, format);
  std::fputs("emulation: ", stderr);
  std::vfprintf(stderr, format, values);
  std::fputc('\n', stderr);
  va_end(values);
  std::abort();
}

/// Dynamic shared memory in the window of the CTA: 1 KiB belongs to the system. Addresses are as far from multiples of
/// 1024 as those of the host.
inline uint32_t shared_begin() {
  return 1024 + static_cast<uint32_t>(reinterpret_cast<uintptr_t>(emulation::machine().dynamic_shared.data()) % 1024);
}
inline uint32_t shared_size() {
  return static_cast<uint32_t>(emulation::machine().dynamic_shared.size() * sizeof(float));
}
inline uint32_t shared_address(const void* pointer) {
  const auto* begin = reinterpret_cast<const char*>(emulation::machine().dynamic_shared.data());
  const auto offset = static_cast<const char*>(pointer) - begin;
  if (offset < 0 || offset >= shared_size()) stop("a pointer that is not to shared memory");
  return shared_begin() + static_cast<uint32_t>(offset);
}
inline char* shared_pointer(uint32_t address, uint32_t bytes) {
  if (address < shared_begin() || address + bytes > shared_begin() + shared_size())
    stop("shared address %u is outside of the CTA's memory", address);
  return reinterpret_cast<char*>(emulation::machine().dynamic_shared.data()) + (address - shared_begin());
}

/// What a tensor map of up to four dims holds, in place of the driver's encoding.
struct MapFields {
  const char* data;
  uint64_t sizes[4], strides[4];  // strides[0]: of an element; bytes
  uint16_t box[4];
  uint16_t span;
};
static_assert(sizeof(MapFields) <= sizeof(CUtensorMap));

inline MapFields fields(const CUtensorMap& map) {
  MapFields f;
  std::memcpy(&f, &map, sizeof f);
  return f;
}

/// cuTensorMapEncodeTiled for 16-bit elements without interleaving: refuses what its documentation does.
///
/// It also documents strides that grow with the dims, which neither the driver nor the hardware asks for: heads of a
/// (B, S, H, D) tensor lie closer together than its tokens.
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool known = (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                     rank >= 1 && rank <= 4 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!known || reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(data) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  MapFields f{};
  f.data = static_cast<const char*>(data);
  f.span = static_cast<uint16_t>(16 << (swizzle - CU_TENSOR_MAP_SWIZZLE_NONE));
  for (cuuint32_t i = 0; i < 4; ++i) {
    f.sizes[i] = i < rank ? sizes[i] : 1;
    f.strides[i] = i == 0 ? 2 : i < rank ? strides[i - 1] : 16;
    f.box[i] = static_cast<uint16_t>(i < rank ? box[i] : 1);
    const bool one = i >= rank || steps[i] == 1;  // others are documented, and not emulated
    if (f.sizes[i] == 0 || f.sizes[i] > uint64_t{1} << 32 || f.box[i] == 0 || f.box[i] > 256 || !one)
      return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (f.strides[i] % 16 != 0 || f.strides[i] >= uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  const int row = 2 * f.box[0];
  if (row % 16 != 0 || (f.span > 16 && row > f.span)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &f, sizeof f);
  return CUDA_SUCCESS;
}

inline int box_bytes(const MapFields& f) { return 2 * f.box[0] * f.box[1] * f.box[2] * f.box[3]; }

/// Calls `visit(shared address, address in the tensor or null where it has no element)` for every element of the box at
/// `first`, whose dense rows begin at `to` in shared memory.
template <typename Visit>
void for_each_element(const MapFields& f, uint32_t to, const int (&first)[4], Visit visit) {
  if (f.span > 16 && 2 * f.box[0] != f.span) stop("a box of %d columns does not fill its swizzle", f.box[0]);
  // PTX: 128 bytes. A pattern that does not begin at a multiple of its size would need a base offset in wgmma.
  if (to % 128 != 0 || to % (8 * f.span) != 0) stop("a box at shared address %u, swizzle of %d bytes", to, f.span);
  const uint32_t span = fault("tma-swizzle") ? f.span / 2 : f.span;
  uint32_t place = to;
  int at[4];
  for (at[3] = 0; at[3] < f.box[3]; ++at[3])
    for (at[2] = 0; at[2] < f.box[2]; ++at[2])
      for (at[1] = 0; at[1] < f.box[1]; ++at[1])
        for (at[0] = 0; at[0] < f.box[0]; ++at[0], place += 2) {
          const char* from = f.data;
          for (int i = 0; i < 4; ++i) {
            const int64_t index = int64_t{first[i]} + at[i];
            if (index < 0 || index >= static_cast<int64_t>(f.sizes[i])) from = nullptr;
            if (from != nullptr) from += index * static_cast<int64_t>(f.strides[i]);
          }
          visit(swizzled(place, span), from);
        }
}

/// An operand of wgmma in shared memory, 16-bit elements: PTX ISA, "Matrix Descriptor Format" and "Strides" of
/// wgmma.mma_async. Rows are those of M or N, columns of K.
struct Matrix {
  uint32_t start, leading, stride, span;
  bool across;  // M or N are contiguous, not K

  Matrix(uint64_t descriptor, bool across_) : across(across_) {
    const auto bytes = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    constexpr uint32_t kSpans[4] = {16, 128, 64, 32};
    start = bytes(0), leading = bytes(16), stride = bytes(32), span = kSpans[descriptor >> 62];
    if (descriptor >> 49 & 7) stop("a descriptor with a base offset is not emulated");
    if (fault("wgmma-swizzle") && span > 32) span /= 2;
    if (fault("wgmma-leading")) leading += 16;
    if (fault("wgmma-stride")) stride += 16;
    if (fault("wgmma-start")) start &= ~255u;
  }

  uint32_t address(uint32_t row, uint32_t column) const {
    uint32_t offset;
    if (!across && span == 16) {  // cores of 8 rows of 16 bytes
      offset = row % 8 * 16 + row / 8 * stride + column / 8 * leading + column % 8 * 2;
    } else if (!across) {  // 8 rows of a span, dense; the leading offset is not used
      offset = row % 8 * span + row / 8 * stride + column * 2;
    } else if (span == 16) {
      offset = column % 8 * 16 + column / 8 * leading + row / 8 * stride + row % 8 * 2;
    } else {
      offset = column % 8 * span + column / 8 * stride + row / (span / 2) * leading + row % (span / 2) * 2;
    }
    return swizzled(start + offset, span);
  }
  /// Calls `visit(address)` for the 16-byte chunks of `rows` rows from `first` on, 16 columns.
  template <typename Visit>
  void for_each_chunk(int first, int rows, Visit visit) const {
    for (int row = first; row < first + rows; row += across ? 8 : 1)
      for (int column = 0; column < 16; column += across ? 1 : 8) visit(address(row, column));
  }
};

}  // namespace maskaccel::cuda::sm90
