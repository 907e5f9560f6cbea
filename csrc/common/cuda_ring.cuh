// Rows on their way from memory to shared memory, while the rows before them are worked on.
//
// A thread copies the vectors that it will read itself, so a row needs no barrier, and what is under way takes no registers.
#pragma once

#include <algorithm>

#include "cuda_common.cuh"

namespace maskaccel::cuda {

constexpr int kMostStages = 2;  // rows of a ring

/// The shared memory of this thread alone: a ring of rows, then what its rows share. It is an odd number of 16-byte pieces
/// long, so that no two threads meet in a bank, and all places in it are constants away from one address.
__device__ __forceinline__ char* own_memory(int bytes) {
  return reinterpret_cast<char*>(dynamic_shared()) + static_cast<int>(threadIdx.x) * bytes;
}

/// A ring of `stages` rows. A row is kVectors vectors of 8 elements a thread, over all its tensors.
///
/// The copies and waits clobber memory: no barrier stands between them and the reads.
template <typename T, int kVectors>
struct RowRing {
  static constexpr int kVector = sizeof(Pack<T>), kStage = kVectors * kVector;  // bytes
  char *first, *row;  // the first row, and the one whose turn it is
  int stages;

  __device__ __forceinline__ RowRing(char* own, int stages_) : first(own), row(own), stages(stages_) {}
  /// Copies 8 elements from `at` into the place of the row that was read last, or of the next one before the first read; zeros
  /// where they are not `inside` of the tensor's row (`at` then is any address of it on 16 bytes).
  __device__ __forceinline__ void copy(int vector, const T* at, bool inside) const {
    char* to = row + vector * kVector;
    const char* from = reinterpret_cast<const char*>(at);
#pragma unroll
    for (int i = 0; i < kVector; i += 16) {
#ifdef MASKACCEL_EMULATE
      emulation::start_copy(to + i, from + i, inside);
#else
      const auto place = static_cast<unsigned>(__cvta_generic_to_shared(to + i));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from + i), "r"(inside ? 16 : 0) : "memory");
#endif
    }
  }
  /// Ends the copies of a row, also of one that is not there: waits count rows.
  __device__ __forceinline__ void close() {
#ifdef MASKACCEL_EMULATE
    emulation::close_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    static_assert(kMostStages == 2, "the turns below");
    row = stages == 2 && row == first ? first + kStage : first;
  }
  /// Until the next row is there.
  __device__ __forceinline__ void wait() const {
#ifdef MASKACCEL_EMULATE
    emulation::wait_copies(stages - 1);
#else
    if (stages == 2) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
#endif
  }
  __device__ __forceinline__ Pack<T> read(int vector) const {
    return *reinterpret_cast<const Pack<T>*>(row + vector * kVector);
  }
};

constexpr int kFloatsBytes = 4 * kVec;

__device__ __forceinline__ void keep_floats(char* to, const Floats& v) {
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ Floats kept_floats(const char* from) {
  const float4 l = reinterpret_cast<const float4*>(from)[0], h = reinterpret_cast<const float4*>(from)[1];
  Floats v;
  v[0] = l.x, v[1] = l.y, v[2] = l.z, v[3] = l.w, v[4] = h.x, v[5] = h.y, v[6] = h.z, v[7] = h.w;
  return v;
}

/// How CTAs share rows: each takes a run of neighbouring rows.
struct RowPlan {
  int run = 1, stages = 1;
  bool keep = false;  // what rows share stays in shared memory
  int own = 0;        // bytes of a thread
  size_t shared = 0;  // bytes of a CTA

  /// `stage` and `kept`: bytes of a thread for a row of the ring, and for what is kept; `registers` of a thread, about. Runs
  /// are as long as leaves one wave of CTAs, or several full ones where that is more than 32 rows.
  static RowPlan of(const DeviceInfo& device, int64_t rows, int threads, int registers, int stage, int kept) {
    const int by_registers = std::max(1, 65536 / (registers * threads));
    const auto own_of = [&](int stages, bool keep) { return ((stages * stage + (keep ? kept : 0)) / 16 | 1) * 16; };
    const auto resident = [&](int stages, bool keep) {
      const int cta = own_of(stages, keep) * threads;
      return cta + 1024 > device.shared_bytes ? 0 : std::min(by_registers, (device.shared_bytes + 1024) / (cta + 1536));
    };
    RowPlan plan;
    plan.keep = resident(1, true) >= std::min(by_registers, 2);
    plan.stages = resident(kMostStages, plan.keep) >= std::min(by_registers, 3) ? kMostStages : 1;
    plan.own = own_of(plan.stages, plan.keep);
    plan.shared = size_t(plan.own) * threads;
    const int64_t slots = int64_t{device.multiprocessors} * std::max(1, resident(plan.stages, plan.keep));
    const int64_t waves = (rows + slots * 32 - 1) / (slots * 32);
    plan.run = static_cast<int>((rows + slots * waves - 1) / (slots * waves));
    return plan;
  }
};

}  // namespace maskaccel::cuda
