// The machine of cuda_sm90_machine.cuh on the host, for fibers (../common/cuda_emulation.h).
//
// wgmma takes the descriptors and registers that CuTe gives it on a device, and TMA the tensor maps
// (cuda_sm90_memory.h). Products are formed when they are waited for, from what shared memory and registers hold then;
// if that is not what they held at the start, the emulation stops. Registers of results hold NaN meanwhile. Loads land
// early or late. Accesses to shared memory that no barrier orders stop it too (cuda_sm90_order.h), as long as kernels
// access it through the functions here: shuffles and __syncthreads pass nothing on.
#pragma once

#include "cuda_sm90_order.h"

/// For CuTe's descriptors: the address of a pointer to shared memory.
inline size_t __cvta_generic_to_shared(const void* pointer) { return maskaccel::cuda::sm90::shared_address(pointer); }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#include <cmath>
#include <cute/tensor.hpp>
#include <functional>
#include <utility>

namespace maskaccel::cuda::sm90 {

inline Encode encoder() { return &encode_tiled; }

/// mbarrier: arrivals and bytes of the present phase.
struct Barrier {
  int bytes;
  int16_t pending;
  uint8_t expected, phase;

  void init(int count) { *this = Barrier{0, static_cast<int16_t>(count), static_cast<uint8_t>(count), 0}; }
  void wait(uint32_t parity);
  void arrive();
  void arrive_and_expect_tx(int count) { bytes += count, arrive(); }
  void complete(int count) { bytes -= count, settle(); }

 private:
  void settle();
};
static_assert(sizeof(Barrier) == 8);

/// A wgmma.mma_async of 64 x n x 16 for the 16 rows of one warp. Descriptors are of all lanes, registers of each.
struct Product {
  int n;
  bool fresh, in_registers, a_across, b_across;
  uint64_t a, b;
  float (*widen)(const char*);
  const char* registers[32];  // A, 8 elements of a lane, where it is in registers
  float* c[32];               // n / 2 elements of a lane
  std::vector<float> operands;

  /// Calls `visit(address)` for the 16-byte chunks of its operands in shared memory.
  template <typename Visit>
  void for_each_chunk(int warp, Visit visit) const {
    if (!in_registers) Matrix(a, a_across).for_each_chunk(warp % 4 * 16, 16, visit);
    Matrix(b, b_across).for_each_chunk(0, n, visit);
  }
  /// Rows of A, 16 x 16, and of B, n x 16, as they are now.
  std::vector<float> read(int warp) const {
    std::vector<float> values(16 * (16 + n));
    const auto of_shared = [&](const Matrix& m, int row, int k) { return widen(shared_pointer(m.address(row, k), 2)); };
    if (in_registers) {
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 8; ++i)
          values[fragment_row(lane, i) * 16 + fragment_column(lane, i)] = widen(registers[lane] + 2 * i);
    } else {
      const Matrix matrix(a, a_across);
      for (int i = 0; i < 256; ++i) values[i] = of_shared(matrix, warp % 4 * 16 + i / 16, i % 16);
    }
    const Matrix matrix(b, b_across);
    for (int i = 0; i < 16 * n; ++i) values[256 + i] = of_shared(matrix, i / 16, i % 16);
    return values;
  }
};

/// Unfinished products of a warp, in groups of one commit, and the results they go to.
struct TensorCore {
  struct Group {
    std::vector<Product> products;
    Order::Reading reading;
    int lanes = 0;  // that have started it
  };
  struct Result {  // registers of a lane that products are still to write
    int unfinished = 0;
    std::vector<float> values;
  };
  std::vector<Group> groups;
  std::map<float*, Result> results;
  size_t started[32] = {}, finished = 0;  // groups since the CTA began

  void start(Order& order, int warp, int lane, const std::vector<Product>& products) {
    const size_t at = started[lane]++ - finished;
    if (at == groups.size()) {
      groups.push_back(Group{products, {}});
      for (const Product& p : products) {
        const auto collect = [&](uint32_t address) {
          order.collect(groups[at].reading, address, warp, static_cast<uint32_t>(started[lane]));
        };
        p.for_each_chunk(warp, collect);
      }
    }
    Group& group = groups[at];
    order.start(group.reading);
    for (size_t i = 0; i < products.size(); ++i) {
      Product& all = group.products.at(i);
      const Product& mine = products[i];
      if (all.n != mine.n || all.a != mine.a || all.b != mine.b) stop("lanes of a warp start different products");
      all.registers[lane] = mine.registers[lane];
      all.c[lane] = mine.c[lane];
      Result& result = results[mine.c[lane]];
      if (result.unfinished++ > 0) continue;
      result.values.assign(mine.c[lane], mine.c[lane] + mine.n / 2);
      std::fill_n(mine.c[lane], mine.n / 2, std::nanf(""));
    }
    if (++group.lanes < 32) return;
    for (Product& p : group.products) p.operands = p.read(warp);
  }
  void finish(int warp, size_t pending) {
    for (; groups.size() > pending; ++finished) {
      for (const Product& p : groups.front().products) {
        const std::vector<float> now = p.read(warp);
        if (std::memcmp(now.data(), p.operands.data(), now.size() * sizeof(float)) != 0)
          stop("an operand of wgmma changed before the product was waited for");
        multiply(p);
      }
      groups.erase(groups.begin());
    }
  }

 private:
  void multiply(const Product& p) {
    for (int lane = 0; lane < 32; ++lane) {
      Result& result = results[p.c[lane]];
      for (int i = 0; i < p.n / 2; ++i) {
        const float* a = &p.operands[fragment_row(lane, i) * 16];
        const float* b = &p.operands[256 + fragment_column(lane, i) * 16];
        float sum = p.fresh ? 0.f : result.values[i];
        for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
        result.values[i] = sum;
      }
      if (--result.unfinished > 0) continue;
      std::copy(result.values.begin(), result.values.end(), p.c[lane]);
      results.erase(p.c[lane]);
    }
  }
};

/// Barriers, loads and products of the CTA.
struct Cta {
  struct Passes {
    int number = 0;  // of the mbarrier
    uint32_t phases = 0;
    Meeting meeting;
  };
  struct Named {
    int arrived = 0;
    unsigned generation = 0;
    bool any = false, result = false;
    Meeting meeting;
  };
  Order order;
  std::map<const Barrier*, Passes> barriers;
  Named named[16];
  std::vector<TensorCore> warps;
  std::vector<Meeting> meetings;                                        // of warps
  std::vector<std::pair<const Barrier*, std::function<void()>>> loads;  // on their way

  Passes& of(const Barrier* barrier) {
    return barriers.try_emplace(barrier, Passes{static_cast<int>(barriers.size())}).first->second;
  }
  /// Starts a load, which `land` finishes now or when `full` is waited for.
  void load(const Barrier& full, const void* to, int bytes, std::function<void()> land) {
    const Passes& passes = of(&full);
    order.load(shared_address(to), bytes, passes.number, passes.phases);
    if (emulation::random() % 2 == 0) return land();
    loads.emplace_back(&full, std::move(land));
  }
};

inline Cta& cta() {
  static Cta c;
  return c;
}

inline void Barrier::settle() {
  if (pending != 0 || bytes != 0) return;
  pending = expected;
  ++phase;
  Cta::Passes& passes = cta().of(this);
  cta().order.passed(passes.meeting, passes.number, ++passes.phases);
  ++emulation::machine().progress;
}

inline void Barrier::arrive() {
  cta().order.release(cta().of(this).meeting);
  --pending, settle();
}

inline void Barrier::wait(uint32_t parity) {
  if (fault("no-wait")) return;
  while ((phase & 1) == parity) {
    auto& loads = cta().loads;
    for (size_t i = 0; i < loads.size(); ++i) {
      if (loads[i].first != this) continue;
      ++emulation::machine().progress;
      if (emulation::random() % 2 == 0) continue;
      const auto land = std::move(loads[i].second);
      loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(i--));
      land();
    }
    if ((phase & 1) == parity) emulation::yield();
  }
  cta().order.acquire(cta().of(this).meeting);
}

/// By one thread, before the CTA begins.
inline void publish_barriers() {
  cta() = Cta{};
  const emulation::Machine& m = emulation::machine();
  cta().order.begin(static_cast<int>(m.fibers.size()));
  cta().warps.resize(m.warps.size());
  cta().meetings.resize(m.warps.size());
}

inline void prefetch(const TensorMap&) {}

inline void load_box(const TensorMap& map, Barrier& full, bool, void* to, int column, int row, int head, int batch) {
  cta().load(full, to, box_bytes(fields(map)),
             [f = fields(map), &full, to = shared_address(to), column, row, head, batch] {
               int inside = 0;
               for_each_element(f, to, {column, row, head, batch}, [&](uint32_t address, const char* from) {
                 char* element = shared_pointer(address, 2);
                 if (from != nullptr) std::memcpy(element, from, 2);
                 if (from == nullptr) std::memset(element, 0, 2);
                 inside += from != nullptr ? 2 : 0;
               });
               full.complete(fault("bytes-inside") ? inside : box_bytes(f));  // all of them, also those out of bounds
             });
}
inline void load_plain(const float* from, Barrier& full, float* to, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || shared_address(to) % 16 != 0 || bytes % 16 != 0)
    stop("a copy of %d bytes that does not lie on 16", bytes);
  cta().load(full, to, bytes, [=, &full] {
    std::memcpy(to, from, bytes);
    full.complete(bytes);
  });
}

inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  if (shared_address(row) % 16 != 0) stop("a row of a matrix that does not lie on 16 bytes");
  cta().order.write(row, 16);
  const int lane = emulation::current() % 32;
  emulation::Mail<char*> rows(static_cast<char*>(row));
  for (int m = 0; m < 4; ++m) std::memcpy(rows[8 * m + lane / 4] + lane % 4 * 4, &words[m], 4);
}
inline void publish_to_products() {
  if (!fault("no-fence")) cta().order.fence_async();
}

inline void add_to_global(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) stop("sums that do not lie on 16 bytes");
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

/// Whether M or N is contiguous in an operand of this kind of fragment.
template <typename Fragment>
constexpr bool kAcross = false;
template <>
constexpr bool kAcross<cute::SM90::GMMA::smem_desc<cute::SM90::GMMA::Major::MN>> = true;

template <int kSteps, typename Mma, typename A, typename B, typename C>
void start(Mma, const A& a, const B& b, C& c, bool fresh) {
  using namespace cute;
  using T = typename Mma::ValTypeB;
  constexpr bool kRegisters = !has_dereference<typename Mma::FrgTypeA>::value;
  constexpr int kSize = size<1>(typename Mma::AtomShape_MNK{});
  const int warp = emulation::current() / 32, lane = emulation::current() % 32;
  // As a CUTE_UNROLLed gemm would read them: descriptors of slices, or 16-bit elements side by side.
  const auto registers = [](const auto& fragment, int count) {
    for (int i = 1; i < count; ++i)
      if (&fragment(i) != &fragment(0) + i) stop("registers of wgmma that do not lie side by side");
    return &fragment(0);
  };
  std::vector<Product> products;
  for (int step = 0; step < kSteps; ++step)
    for (int m = 0; m < size<1>(c); ++m)
      for (int n = 0; n < size<2>(c); ++n) {
        Product p{};
        p.n = kSize;
        p.fresh = fresh && step == 0;
        p.b_across = kAcross<typename Mma::FrgTypeB>;
        p.b = uint64_t{*b(_, n, step).data()};
        p.widen = [](const char* bytes) {
          T value;
          std::memcpy(&value, bytes, sizeof value);
          return static_cast<float>(value);
        };
        if constexpr (kRegisters) {
          p.in_registers = true;
          p.registers[lane] = reinterpret_cast<const char*>(registers(a(_, m, step), 8));
        } else {
          p.a_across = kAcross<typename Mma::FrgTypeA>;
          p.a = uint64_t{*a(_, m, step).data()};
        }
        p.c[lane] = registers(c(_, m, n), kSize / 2);
        products.push_back(std::move(p));
      }
  cta().warps[warp].start(cta().order, warp, lane, products);
}

template <int kPending, int kSize>
void finish(float (&)[kSize]) {
  for (int i = 0; i < 3; ++i) {
    ++emulation::machine().progress;
    emulation::yield();
  }
  if (fault("no-finish")) return;
  const int warp = emulation::current() / 32;
  emulation::Barrier& lanes = emulation::machine().warps[warp];
  emulation::wait(lanes);
  TensorCore& core = cta().warps[warp];
  if (emulation::current() % 32 == 0) core.finish(warp, kPending);
  emulation::wait(lanes);
  cta().order.finish(warp, static_cast<uint32_t>(core.finished));
}
template <typename T, int kSize>
void pin(T (&)[kSize]) {}

inline void sync_warp() {
  emulation::Barrier& lanes = emulation::machine().warps[emulation::current() / 32];
  Meeting& meeting = cta().meetings[emulation::current() / 32];
  if (fault("no-syncwarp")) return;
  cta().order.release(meeting);
  if (lanes.arrived + 1 == lanes.size) meeting.pass();
  emulation::wait(lanes);
  cta().order.acquire(meeting);
}
inline void named_arrive(int id) {
  Cta::Named& n = cta().named[id];
  cta().order.release(n.meeting);
  if (++n.arrived < 2 * kGroup) return;
  n.arrived = 0;
  n.result = n.any, n.any = false;
  n.meeting.pass();
  ++n.generation;
  ++emulation::machine().progress;
}
inline void named_wait(int id) {
  if (fault("no-barrier")) return;
  const unsigned generation = cta().named[id].generation;
  named_arrive(id);
  while (cta().named[id].generation == generation) emulation::yield();
  cta().order.acquire(cta().named[id].meeting);
}
inline bool named_any(int id, bool mine) {
  cta().named[id].any |= mine;
  named_wait(id);
  return cta().named[id].result;
}
inline int warp_group() { return emulation::current() / kGroup; }
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

template <typename T>
void put(T& to, const T& value) {
  cta().order.write(&to, sizeof value);
  to = value;
}
template <typename T>
T get(const T& from) {
  cta().order.read(&from, sizeof from);
  return from;
}
template <typename T>
T read(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) stop("a read that does not lie on its size");
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
