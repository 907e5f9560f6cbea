// The machine of cuda_sm90_machine.cuh on the host, for fibers (../common/cuda_emulation.h).
//
// Products are formed when they are waited for, so a buffer or register that is given away before shows in the result.
// Loads arrive at once. Swizzles are left out on both sides, and what the descriptors of TMA and wgmma say is not
// tested.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

namespace maskaccel::cuda::sm90 {

/// A (B, S, H, D) tensor of 2-byte elements and the box that is loaded of it. Strides in elements.
struct TensorMap {
  const char* data;
  int64_t columns, rows, heads, batch, stride_row, stride_head, stride_batch;
  int slab, box;
};

/// mbarrier: arrivals and bytes of the present phase.
struct Barrier {
  int expected, pending, bytes;
  unsigned phase;

  void init(int count) { *this = Barrier{count, count, 0, 0}; }
  void wait(uint32_t parity);
  void arrive() { --pending, settle(); }
  void arrive_and_expect_tx(int count) { bytes += count, arrive(); }
  void complete(int count) { bytes -= count, settle(); }

 private:
  void settle() {
    if (pending != 0 || bytes != 0) return;
    pending = expected;
    ++phase;
    ++emulation::machine().progress;
  }
};

/// Barriers and unfinished products of the CTA.
struct Consumers {
  struct Named {
    int arrived = 0;
    unsigned generation = 0;
    bool any = false, result = false;
  };
  Named named[16];
  emulation::Barrier groups[2];
  std::vector<std::function<void()>> products[kThreads];
  std::vector<std::pair<const Barrier*, std::function<void()>>> loads;  // on their way
  float weights[2][64][128];
};

inline Consumers& consumers() {
  static Consumers c;
  return c;
}

inline void Barrier::wait(uint32_t parity) {
  while ((phase & 1) == parity) {
    auto& loads = consumers().loads;
    for (size_t i = 0; i < loads.size();) {
      if (loads[i].first == this) {
        loads[i].second();
        loads.erase(loads.begin() + i);
      } else {
        ++i;
      }
    }
    if ((phase & 1) == parity) emulation::yield();
  }
}

/// By one thread, before the CTA begins.
inline void publish_barriers() {
  for (auto& n : consumers().named) n = {};
  for (auto& g : consumers().groups) g = emulation::Barrier{kGroup, 0, 0};
}

inline void load_box(const TensorMap& map, Barrier& full, bool, void* to, int column, int row, int head, int batch) {
  const auto land = [&map, &full, to, column, row, head, batch] {
    for (int r = 0; r < map.box; ++r) {
      for (int c = 0; c < map.slab; ++c) {
        char* element = static_cast<char*>(to) + 2 * (r * map.slab + c);
        const bool inside = row + r < map.rows && column + c < map.columns;
        const int64_t at = batch * map.stride_batch + (row + r) * map.stride_row + head * map.stride_head + column + c;
        if (inside) std::memcpy(element, map.data + 2 * at, 2);
        if (!inside) std::memset(element, 0, 2);
      }
    }
    full.complete(2 * map.box * map.slab);
  };
  static unsigned state = 0;
  state = state * 1664525u + 1013904223u;
  if (state >> 31) return land();
  consumers().loads.emplace_back(&full, land);
}

inline int of_slabs(int row, int column, int slab, int rows) {
  return column / slab * slab * rows + row * slab + column % slab;
}
/// Row within the group and column of element i of this thread.
inline int row_of(int i) {
  return emulation::current() % kGroup / 32 * 16 + emulation::current() % 32 / 4 + i / 2 % 2 * 8;
}
inline int column_of(int i) { return i / 4 * 8 + emulation::current() % 4 * 2 + i % 2; }

template <typename S, typename T = typename S::T>
void start_scores(const T* query, const T* keys, int group, float (&scores)[S::kScores]) {
  consumers().products[emulation::current()].push_back([query, keys, group, &scores] {
    for (int i = 0; i < S::kScores; ++i) {
      float sum = 0.f;
      for (int c = 0; c < S::kDim; ++c) {
        sum += static_cast<float>(query[of_slabs(group * 64 + row_of(i), c, S::kSlab, kRows)]) *
               static_cast<float>(keys[of_slabs(column_of(i), c, S::kSlab, S::kKeys)]);
      }
      scores[i] = sum;
    }
  });
}

template <typename S, typename T = typename S::T>
void start_values(const T (&weights)[S::kScores], const T* values, float (&out)[S::kOut]) {
  consumers().products[emulation::current()].push_back([&weights, values, &out] {
    const int group = emulation::current() / kGroup - 1;
    auto& all = consumers().weights[group];
    for (int i = 0; i < S::kScores; ++i) all[row_of(i)][column_of(i)] = static_cast<float>(weights[i]);
    emulation::wait(consumers().groups[group]);
    for (int i = 0; i < S::kOut; ++i) {
      float sum = out[i];
      for (int key = 0; key < S::kKeys; ++key) {
        sum += all[row_of(i)][key] * static_cast<float>(values[of_slabs(key, column_of(i), S::kSlabV, S::kKeys)]);
      }
      out[i] = sum;
    }
    emulation::wait(consumers().groups[group]);
  });
}

template <int kPending, int kSize>
void finish(float (&)[kSize]) {
  for (int i = 0; i < 3; ++i) {
    ++emulation::machine().progress;
    emulation::yield();
  }
  auto& products = consumers().products[emulation::current()];
  while (products.size() > kPending) {
    products.front()();
    products.erase(products.begin());
  }
}
template <int kSize>
void pin(float (&)[kSize]) {}

inline void named_arrive(int id) {
  Consumers::Named& n = consumers().named[id];
  if (++n.arrived < 2 * kGroup) return;
  n.arrived = 0;
  n.result = n.any, n.any = false;
  ++n.generation;
  ++emulation::machine().progress;
}
inline void named_wait(int id) {
  const unsigned generation = consumers().named[id].generation;
  named_arrive(id);
  while (consumers().named[id].generation == generation) emulation::yield();
}
inline bool named_any(int id, bool mine) {
  consumers().named[id].any |= mine;
  named_wait(id);
  return consumers().named[id].result;
}
inline void sync_warp() { emulation::wait(emulation::machine().warps[emulation::current() / 32]); }
inline int warp_group() { return emulation::current() / kGroup; }
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

template <typename T>
T read(const T* from) {
  return *from;
}
inline void set_bits(int* word, int bits) { *word |= bits; }
inline int count_up(int* counter) { return (*counter)++; }
inline float inverse(float x) { return 1.f / x; }
inline float exp2_of(float x) { return std::exp2(x); }
template <typename T, int kSize>
void round_all(const float (&from)[kSize], T (&to)[kSize]) {
  for (int i = 0; i < kSize; ++i) to[i] = T(from[i]);
}

}  // namespace maskaccel::cuda::sm90
