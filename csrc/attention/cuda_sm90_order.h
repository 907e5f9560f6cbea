// Finds accesses to shared memory that no barrier puts in order, on the host: vector clocks, for every interleaving
// that the barriers of a run allow, not only the one that was run. Only built with MASKACCEL_EMULATE.
//
// What can be known to have happened: steps of each thread, passes of each mbarrier (with the bytes that TMA wrote for
// them), groups of products that each warp waited for. A thread's clock says how much of each it knows of; barriers and
// __syncwarp pass clocks on, shuffles do not.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "cuda_sm90_memory.h"

namespace maskaccel::cuda::sm90 {

using Clock = std::vector<uint32_t>;

inline void join(Clock& to, const Clock& from) {
  if (from.empty()) return;
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

/// The `value`-th of what is counted at `at` in clocks.
struct Event {
  int at = -1;
  uint32_t value = 0;
};

/// What arrives at a barrier in one phase, and what those learn who wait for it.
struct Meeting {
  Clock gathering, passed;
  void pass() {
    passed.swap(gathering);
    gathering.clear();
  }
};

class Order {
 public:
  /// Of 16 bytes of shared memory.
  struct Cell {
    Event written, loaded;       // by a thread, by TMA
    Clock read;                  // of each thread, its last read
    std::vector<uint32_t> used;  // of each warp, its last group of products that reads it
  };

  void begin(int threads) {
    *this = Order();
    threads_ = threads;
    clocks_.assign(threads, Clock(threads));
    for (int t = 0; t < threads; ++t) clocks_[t][t] = 1;
    fences_.resize(threads);
    cells_.resize(shared_size() / 16 + 1);
  }

  // Barriers. Those who arrive release what they know, those who waited acquire it.
  void release(Meeting& meeting) {
    join(meeting.gathering, mine());
    ++mine()[me()];
  }
  void acquire(const Meeting& meeting) { join(mine(), meeting.passed); }
  /// Counts passes of an mbarrier, `number`-th of the CTA.
  void passed(Meeting& meeting, int number, uint32_t phases) {
    meeting.pass();
    know(meeting.passed, Event{threads_ + kWarps + number, phases});
  }
  void fence_async() {
    fences_[me()].push_back(mine()[me()]);
    ++mine()[me()];
  }

  // Threads.
  void read(const void* from, size_t bytes) {
    for (Cell* cell : cells(shared_address(from), bytes)) {
      if (cell->loaded.at < 0 && cell->written.at < 0) stop("a read of what nothing was written to");
      expect(cell->written, "a read", "a write");
      expect(cell->loaded, "a read", "a load");
      note(cell->read, me(), mine()[me()]);
    }
  }
  void write(const void* to, size_t bytes) {
    for (Cell* cell : cells(shared_address(to), bytes)) {
      expect_quiet(*cell, "a write");
      cell->written = Event{me(), mine()[me()]};
    }
  }

  // TMA, for the phase of the `number`-th mbarrier after `phases` of them.
  void load(uint32_t to, size_t bytes, int number, uint32_t phases) {
    for (Cell* cell : cells(to, bytes)) {
      expect_quiet(*cell, "a load");
      if (cell->written.at >= 0) expect_fenced(cell->written, "a load");
      cell->loaded = Event{threads_ + kWarps + number, phases + 1};
    }
  }

  // wgmma. Groups of a warp are numbered from 1.
  struct Reading {
    std::vector<Event> loads, writes;
  };
  /// That group `group` of a warp reads these 16 bytes.
  void collect(Reading& reading, uint32_t address, int warp, uint32_t group) {
    Cell& cell = cells_.at((address - shared_begin()) / 16);
    if (cell.loaded.at < 0 && cell.written.at < 0) stop("a product reads what nothing was written to");
    for (const auto& [event, list] : {std::pair{cell.loaded, &reading.loads}, {cell.written, &reading.writes}}) {
      const auto same = [e = event](const Event& other) { return e.at == other.at && e.value == other.value; };
      if (event.at >= 0 && std::none_of(list->rbegin(), list->rend(), same)) list->push_back(event);
    }
    note(cell.used, warp, group);
  }
  /// By every lane of the warp.
  void start(const Reading& reading) {
    for (const Event& e : reading.loads) expect(e, "a product", "a load");
    for (const Event& e : reading.writes) expect_fenced(e, "a product");
  }
  /// By every lane of the warp.
  void finish(int warp, uint32_t groups) { know(mine(), Event{threads_ + warp, groups}); }

 private:
  static constexpr int kWarps = 32;
  int threads_ = 0;
  std::vector<Clock> clocks_;  // of each thread: threads, then warps, then mbarriers
  std::vector<std::vector<uint32_t>> fences_;
  std::vector<Cell> cells_;

  static int me() { return emulation::current(); }
  Clock& mine() { return clocks_[me()]; }
  std::vector<Cell*> cells(uint32_t address, size_t bytes) {
    std::vector<Cell*> found;
    const uint32_t first = (address - shared_begin()) / 16;
    for (uint32_t at = first; at <= (address + bytes - 1 - shared_begin()) / 16; ++at) found.push_back(&cells_.at(at));
    return found;
  }
  static void note(std::vector<uint32_t>& list, size_t at, uint32_t value) {
    if (list.size() <= at) list.resize(at + 1);
    list[at] = value;
  }
  static void know(Clock& clock, const Event& e) {
    if (clock.size() <= static_cast<size_t>(e.at)) clock.resize(e.at + 1);
    clock[e.at] = std::max(clock[e.at], e.value);
  }
  bool knows(const Event& e) {
    return e.value == 0 || (static_cast<size_t>(e.at) < mine().size() && mine()[e.at] >= e.value);
  }
  void expect(const Event& e, const char* what, const char* after) {
    if (!knows(e)) stop("%s of shared memory by thread %d is not ordered after %s", what, me(), after);
  }
  /// A thread's write has to be followed by its proxy fence, and that known.
  void expect_fenced(const Event& e, const char* what) {
    const auto& fences = fences_[e.at];
    const auto fence = std::lower_bound(fences.begin(), fences.end(), e.value);
    if (fence == fences.end() || !knows(Event{e.at, *fence}))
      stop("%s by thread %d is not ordered after the proxy fence of a write", what, me());
  }
  /// That all accesses before are over.
  void expect_quiet(const Cell& cell, const char* what) {
    expect(cell.written, what, "a write");
    expect(cell.loaded, what, "a load");
    for (size_t t = 0; t < cell.read.size(); ++t) expect(Event{static_cast<int>(t), cell.read[t]}, what, "a read");
    for (size_t w = 0; w < cell.used.size(); ++w)
      expect(Event{threads_ + static_cast<int>(w), cell.used[w]}, what, "the product that reads it");
  }
};

}  // namespace maskaccel::cuda::sm90
