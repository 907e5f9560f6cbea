// Splits the rows of a backward into segments, launches it and adds the partial sums.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda_backward.cuh"
#include "cuda_reduce.cuh"

namespace maskaccel::cuda {

/// A reduced gradient the caller wants.
struct Wanted {
  float* out = nullptr;      // null: not wanted
  bool everything = false;   // one row: sum over all tokens (weights, lone tables)
  bool per_token = false;    // (B, N, D): no sum (indexed rows)
  bool over_batch = false;   // (1, F, D)
  int group = 1;             // tokens that share a row
};

/// `allocate(count)` returns device memory for `count` floats that lives until the launches are queued.
template <typename T, int kMode, typename Allocate>
void run_backward(const char* op, BackwardParams p, const Wanted (&wanted)[kReducedCount], const DeviceInfo& device,
                  Stream stream, Allocate&& allocate) {
  const Common& c = p.c;
  const bool fast = p.out_vec && c.width <= kBackwardSteps * kBackwardThreads * kVec && all_aligned(p.dr) && all_aligned(p.dy) &&
                    all_aligned(p.dy2) && all_aligned(p.x) && all_aligned(p.a) && all_aligned(p.gate) && all_aligned(p.scale) &&
                    all_aligned(p.scale2) && all_aligned(p.weight) && all_aligned(p.bias) && all_aligned(p.post_weight);
  const int threads = fast ? row_threads(static_cast<int>(ceil_div(c.width, kBackwardSteps)), kBackwardThreads)
                           : row_threads(c.width, 512);
  const int steps = fast ? kBackwardSteps : static_cast<int>(ceil_div(c.width, int64_t(threads) * kVec));

  p.block = c.tokens;
  p.padded = threads * steps * kVec;
  p.per_token_vec = c.width % kVec == 0;  // fp32 rows of fresh, aligned tensors
  float* summed_over_batch[kReducedCount] = {};
  for (int k = 0; k < kReducedCount; ++k) {
    const Wanted& w = wanted[k];
    p.slot[k] = -1;
    if (w.out == nullptr) continue;
    const bool own_row = w.per_token || (!w.everything && w.group == 1);
    if (own_row && (w.per_token || !w.over_batch || c.batch == 1)) {
      p.per_token[k] = w.out;
    } else if (own_row) {
      p.per_token[k] = summed_over_batch[k] = allocate(c.total * c.width);
    } else {
      p.slot[k] = p.padded * p.slots++;
      if (!w.everything) p.block = std::gcd(p.block, w.group);
    }
  }

  // About three waves of CTAs: enough that the last one costs little, few enough that the partial sums stay small.
  const int resident = std::max(1, std::min(16, 65536 / (160 * threads)));
  const int64_t segments_wanted = int64_t(device.multiprocessors) * resident * 3;
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(p.block, ceil_div(c.total, segments_wanted)));
  p.runs_per_block = static_cast<int>(ceil_div(p.block, run));
  p.run = static_cast<int>(ceil_div(p.block, p.runs_per_block));
  const int64_t per_sample = int64_t(c.tokens / p.block) * p.runs_per_block, segments = per_sample * c.batch;
  p.workspace = p.slots != 0 ? allocate(segments * p.slots * p.padded) : nullptr;
  const int64_t shared = int64_t(p.slots) * p.padded * sizeof(float);
  p.shared = fast && shared + 1024 <= device.shared_bytes;

  const dim3 grid(static_cast<unsigned>(segments));
  const size_t dynamic = p.shared ? static_cast<size_t>(shared) : 0;
  if (fast) {
    launch(op, backward_kernel<T, kMode>, grid, threads, dynamic, stream, p);
  } else {
    launch(op, backward_any_kernel<T, kMode>, grid, threads, 0, stream, p);
  }

  ReduceTask tasks[kReducedCount];
  int count = 0;
  for (int k = 0; k < kReducedCount; ++k) {
    const Wanted& w = wanted[k];
    if (w.out == nullptr || (p.slot[k] < 0 && summed_over_batch[k] == nullptr)) continue;
    ReduceTask t;
    t.out = w.out;
    t.width = c.width;
    if (p.slot[k] < 0) {
      t.in = summed_over_batch[k];
      t.stride = c.width;
      t.outer = c.batch;
      t.outer_step = t.groups = c.tokens;
      t.group_step = 1;
    } else {
      t.in = p.workspace + p.slot[k];
      t.stride = int64_t(p.slots) * p.padded;
      const int groups = w.everything ? 1 : c.tokens / w.group;
      t.inner = static_cast<int>(per_sample / groups);
      t.group_step = t.inner;
      if (w.everything || w.over_batch) {
        t.outer = c.batch;
        t.outer_step = per_sample;
        t.groups = groups;
      } else {
        t.groups = groups * c.batch;
      }
    }
    tasks[count++] = t;
  }
  run_reduce(op, tasks, count, stream);
}

}  // namespace maskaccel::cuda
