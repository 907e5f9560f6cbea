// One launch of an attention kernel, block by block: who takes which row of tiles when, and what L2 has to fetch. The
// sequence of items and the walk through a row are the kernels' own headers; benchmarks/attention/schedule_model.py
// compiles this file and calls it.
#include <cstdint>
#include <functional>
#include <list>
#include <queue>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../csrc/attention/cuda_schedule.h"

namespace {

using maskaccel::cuda::Item;
using maskaccel::cuda::Schedule;
using maskaccel::cuda::Walk;

/// The least recently used of the tiles of keys and values leave L2 first.
class Cache {
 public:
  explicit Cache(int64_t tiles) : capacity_(tiles) {}
  bool miss(int64_t tile) {
    const auto found = places_.find(tile);
    if (found != places_.end()) {
      order_.splice(order_.begin(), order_, found->second);
      return false;
    }
    order_.push_front(tile);
    places_[tile] = order_.begin();
    if (static_cast<int64_t>(order_.size()) > capacity_) {
      places_.erase(order_.back());
      order_.pop_back();
    }
    return true;
  }

 private:
  int64_t capacity_;
  std::list<int64_t> order_;
  std::unordered_map<int64_t, std::list<int64_t>::iterator> places_;
};

}  // namespace

/// Sizes of a launch, as schedule_model.py has them.
struct Launch {
  int tile_rows, subs, batch, heads, mask_batch, mask_heads, window;  // of the Schedule
  int width, bn, block, keys, key_heads;                             // of the lists and the Walk
  int workers, cached_blocks;  // CTAs at a time; blocks of keys and values that L2 holds
  double per_item, per_block, per_partial;
};

struct Outcome {
  double makespan, busy;
  int64_t blocks, missed;
};

extern "C" int sequence(const Launch* l, const int* order, int* out) {
  const Schedule s{order, l->tile_rows, l->subs, l->batch, l->heads, l->mask_batch, l->mask_heads, l->window};
  for (int place = 0; place < s.items(); ++place) {
    const Item i = s.item(place);
    for (int x : {i.batch, i.head, i.tile_row, i.sub, i.line}) *out++ = x;
  }
  return static_cast<int>(s.items());
}

extern "C" int walk(const int* index, int partial, int total, int bn, int block, int keys, int* out) {
  int blocks = 0;
  for (Walk w(index, partial, total, bn, block, keys); w.next(); ++blocks) {
    for (int x : {w.begin, w.tile, static_cast<int>(w.is_partial()), static_cast<int>(w.last())}) *out++ = x;
  }
  return blocks;
}

extern "C" Outcome simulate(const Launch* launch, const int* index, const int* count, const int* order) {
  const Launch& l = *launch;
  const Schedule s{order, l.tile_rows, l.subs, l.batch, l.heads, l.mask_batch, l.mask_heads, l.window};
  struct Worker {
    Item item;
    Walk walk{nullptr, 0, 0, 1, 1, 0};
  };
  std::vector<Worker> workers(l.workers);
  using Event = std::pair<double, int>;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events;
  Cache cache(l.cached_blocks);
  Outcome out{0., 0., 0, 0};
  int place = 0;
  const int items = static_cast<int>(s.items()), blocks_of_head = (l.keys + l.block - 1) / l.block + 1;
  // A worker takes the next item as it gets free, which is what claims and the hardware's grid both do.
  const auto take = [&](int w, double now) {
    if (place == items) return;
    Worker& worker = workers[w];
    worker.item = s.item(place++);
    const int line = worker.item.line;
    worker.walk = index == nullptr
                      ? Walk(nullptr, 0, (l.keys + l.bn - 1) / l.bn, l.bn, l.block, l.keys)
                      : Walk(index + int64_t{line} * l.width, count[2 * line], count[2 * line] + count[2 * line + 1],
                             l.bn, l.block, l.keys);
    events.emplace(now + l.per_item, w);
    out.busy += l.per_item;
  };
  for (int w = 0; w < l.workers; ++w) take(w, 0.);
  while (!events.empty()) {
    const auto [now, w] = events.top();
    events.pop();
    Worker& worker = workers[w];
    if (!worker.walk.next()) {
      out.makespan = now;
      take(w, now);
      continue;
    }
    const int64_t head = int64_t{worker.item.batch} * l.key_heads + worker.item.head / (l.heads / l.key_heads);
    ++out.blocks;
    out.missed += cache.miss(head * blocks_of_head + worker.walk.begin / l.block);
    const double cost = l.per_block + (index != nullptr && worker.walk.is_partial() ? l.per_partial : 0.);
    out.busy += cost;
    events.emplace(now + cost, w);
  }
  return out;
}
