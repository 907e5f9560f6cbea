// Which tokens are kept, are active, or are unmasked: a CTA for each sample (and group), ids ascending.
#pragma once

#include "cuda_rows.cuh"
#include "cuda_select.cuh"
#include "flags.h"

namespace maskaccel::cuda {

/// Bytes (B|1, N) that mark tokens; null: none is marked.
struct Marks {
  const uint8_t* data = nullptr;
  int64_t stride_b = 0;

  __device__ __forceinline__ bool at(int b, int n) const { return data != nullptr && data[b * stride_b + n] != 0; }
};

/// A word for each token (or item) of a sample: in shared memory, or in a workspace where a sample has many.
struct Words {
  uint32_t* data = nullptr;  // (B, count); null: shared memory
  int count = 0;

  __device__ __forceinline__ uint32_t* of(int sample) const {
    return data != nullptr ? data + int64_t(sample) * count : reinterpret_cast<uint32_t*>(dynamic_shared());
  }
};

struct KeepParams {
  const int64_t* step = nullptr;
  const int* order = nullptr;
  Index labels, quota;
  Marks force;
  Words words;
  int64_t seed = 0, route = 0, offset = 0;
  KeepMode mode = KeepMode::groups;
  int n = 0, keep = 0, groups = 1, rows_kept = 0;
  int first_item = 0;
  bool drawn = false;  // the words are there
  int *ids = nullptr, *inverse = nullptr, *counts = nullptr;
};

__device__ __forceinline__ void draw_words(const KeepParams& p, int b, int begin, int step, uint32_t* words) {
  const maskaccel::Stream stream = stream_of(p.seed, p.offset + b, *p.step, p.route, Purpose::keep);
  for (int i = begin; i < p.words.count; i += step)
    words[i] = random_word(stream, static_cast<uint32_t>(p.first_item + i));
}

/// The words of samples that have too many for one CTA to draw.
static __global__ void __launch_bounds__(256) keep_words_kernel(const __grid_constant__ KeepParams p) {
  draw_words(p, blockIdx.y, blockIdx.x * 256 + threadIdx.x, gridDim.x * 256, p.words.of(blockIdx.y));
}

constexpr int kKeyBits = 57;     // of keep_key
constexpr int kRankedRun = 128;  // tokens of a run whose ranks are counted one by one

/// Marks the kept tokens of every run in `inverse`, which the CTA owns.
template <typename Key>
__device__ __forceinline__ void keep_in_runs(const KeepParams& p, Key&& key, int* inverse, SelectShared& s) {
  const int length = p.n / p.groups, share = p.keep / p.groups;
  const auto token = [&](int i) {  // what is no permutation gives nonsense, but leads nowhere
    const int t = p.order != nullptr ? p.order[i] : i;
    return t >= 0 && t < p.n ? t : i;
  };
  if (length <= kRankedRun) {
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
      const int first = i / length * length, mine = token(i);
      const uint64_t own = key(mine);
      int rank = 0;
      for (int k = 0; k < length; ++k) rank += key(token(first + k)) < own ? 1 : 0;
      inverse[mine] = rank < share ? 1 : 0;
    }
    return;
  }
  for (int first = 0; first < p.n; first += length) {
    const uint64_t last = smallest_keys([&](int i) { return key(token(first + i)); }, length, share, kKeyBits, s);
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
      const int mine = token(first + i);
      inverse[mine] = key(mine) <= last ? 1 : 0;
    }
  }
}

template <typename Key>
__device__ __forceinline__ void keep_in_classes(const KeepParams& p, int b, Key&& key, int* inverse, SelectShared& s) {
  for (int t = threadIdx.x; t < p.n; t += blockDim.x) inverse[t] = 0;  // by the thread that marks it below
  for (int c = 0; c < p.quota.count; ++c) {
    const int members = count_of([&](int t) { return p.labels.at(b, t) == c; }, p.n, s), quota = p.quota.at(b, c);
    const int share = quota < members ? quota : members;
    if (share <= 0) continue;
    const auto own = [&](int t) { return p.labels.at(b, t) == c ? key(t) : ~uint64_t{0}; };
    const uint64_t last = share == members ? ~uint64_t{0} - 1 : smallest_keys(own, p.n, share, kKeyBits, s);
    for (int t = threadIdx.x; t < p.n; t += blockDim.x) {
      if (own(t) <= last) inverse[t] = 1;
    }
  }
}

static __global__ void __launch_bounds__(kSelectThreads, 1) random_keep_kernel(const __grid_constant__ KeepParams p) {
  __shared__ SelectShared s;
  const int b = blockIdx.x;
  uint32_t* words = p.words.of(b);
  int *ids = p.ids + int64_t(b) * p.keep, *inverse = p.inverse + int64_t(b) * p.n;
  if (!p.drawn) draw_words(p, b, threadIdx.x, blockDim.x, words);
  sync_threads();
  if (p.mode == KeepMode::rows_columns) {
    const int columns = p.n / p.groups, kept_columns = p.keep / p.rows_kept;
    const auto row_key = [&](int r) { return keep_key(words[r], r, true); };
    const auto column_key = [&](int c) { return keep_key(words[p.groups + c], c, true); };
    const uint64_t last_row = smallest_keys(row_key, p.groups, p.rows_kept, kKeyBits, s);
    const uint64_t last_column = smallest_keys(column_key, columns, kept_columns, kKeyBits, s);
    const auto kept = [&](int t) { return row_key(t / columns) <= last_row && column_key(t % columns) <= last_column; };
    place_tokens(kept, p.n, p.keep, ids, inverse, s);
    return;
  }
  const auto key = [&](int t) { return keep_key(words[t], t, p.force.at(b, t)); };
  if (p.mode == KeepMode::groups && p.groups == 1) {
    const uint64_t last = smallest_keys(key, p.n, p.keep, kKeyBits, s);
    place_tokens([&](int t) { return key(t) <= last; }, p.n, p.keep, ids, inverse, s);
    return;
  }
  if (p.mode == KeepMode::groups) {
    keep_in_runs(p, key, inverse, s);
  } else {
    keep_in_classes(p, b, key, inverse, s);
  }
  sync_threads();
  const int placed = place_tokens([&](int t) { return inverse[t] == 1; }, p.n, p.keep, ids, inverse, s);
  if (p.counts != nullptr && threadIdx.x == 0) p.counts[b] = placed < p.keep ? placed : p.keep;
}

/// Rank of token t by descending metric, ties ascending; unique.
__device__ __forceinline__ uint64_t token_rank(uint32_t metric_key, int t) {
  return static_cast<uint64_t>(metric_key) << kTokenBits | static_cast<uint64_t>(t);
}
constexpr int kRankBits = 32 + kTokenBits;

/// A product that is rounded by itself: `falling_key` adds 0 to it, and one rounding for both could leave a -0.
__device__ __forceinline__ float rounded_product(float a, float b) {
#ifdef MASKACCEL_EMULATE
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

struct ActiveParams {
  const float *score = nullptr, *decay = nullptr;
  const int* age = nullptr;
  Marks force;
  Words words;  // keys of the metric
  int n = 0, keep = 0, high = 0, ages = 1;
  float threshold = 0.f;
  bool by_threshold = false;
  int *ids = nullptr, *inverse = nullptr, *counts = nullptr, *new_age = nullptr;
};

static __global__ void __launch_bounds__(kSelectThreads, 1)
    select_active_kernel(const __grid_constant__ ActiveParams p) {
  __shared__ SelectShared s;
  const int b = blockIdx.x;
  const int64_t row = int64_t(b) * p.n;
  uint32_t* keys = p.words.of(b);
  for (int t = threadIdx.x; t < p.n; t += blockDim.x) {
    const int age = p.age[row + t], at = age < 0 ? 0 : (age < p.ages ? age : p.ages - 1);
    const float metric = rounded_product(p.score[row + t], p.decay[at]);
    const bool candidate = !p.by_threshold || metric >= p.threshold || (metric != metric && p.threshold == -INFINITY);
    keys[t] = candidate ? falling_key(metric != metric ? -INFINITY : metric) : kNoKey;
  }
  sync_threads();
  int *ids = p.ids + int64_t(b) * p.keep, *inverse = p.inverse + row;
  // The forced tokens come first; of more than fit, those of lowest t.
  const int forced = p.force.data == nullptr ? 0 : count_of([&](int t) { return p.force.at(b, t); }, p.n, s);
  uint64_t last_forced = ~uint64_t{0};
  if (forced > p.keep) {
    const auto key = [&](int t) { return static_cast<uint64_t>(p.force.at(b, t) ? t : -1); };
    last_forced = smallest_keys(key, p.n, p.keep, kTokenBits, s);
  }
  const auto key = [&](int t) { return keys[t] == kNoKey || p.force.at(b, t) ? ~uint64_t{0} : token_rank(keys[t], t); };
  int rest = p.keep - forced;
  uint64_t above = 0, last = 0;  // kept are the keys with above <= key < last; 0: none
  if (rest > 0) {
    const int others = count_of([&](int t) { return key(t) != ~uint64_t{0}; }, p.n, s);
    rest = rest < others - p.high ? rest : others - p.high;
    if (rest > 0) last = smallest_keys(key, p.n, p.high + rest, kRankBits, s) + 1;
    if (rest > 0 && p.high > 0) above = smallest_keys(key, p.n, p.high, kRankBits, s) + 1;
  }
  const auto kept = [&](int t) {
    return p.force.at(b, t) ? static_cast<uint64_t>(t) <= last_forced : key(t) >= above && key(t) < last;
  };
  const int placed = place_tokens(kept, p.n, p.keep, ids, inverse, s);
  for (int t = threadIdx.x; t < p.n; t += blockDim.x) {
    // Its own threads wrote the slots: place_tokens deals tokens out as this loop does.
    p.new_age[row + t] = inverse[t] >= 0 ? 0 : static_cast<int>(static_cast<unsigned>(p.age[row + t]) + 1u);
  }
  if (p.counts != nullptr && threadIdx.x == 0) p.counts[b] = placed < p.keep ? placed : p.keep;
}

struct UnmaskParams {
  const float *confidence = nullptr, *noise = nullptr;
  const int64_t *sampled = nullptr, *tokens = nullptr, *step = nullptr;
  Index count, groups;
  Marks hold;
  Words words;  // keys of the metric
  int64_t mask_id = 0, seed = 0, offset = 0;
  int64_t* out = nullptr;
  int n = 0;
  float threshold = 0.f, temperature = 0.f;
};

/// One CTA is one group of a sample; that of group 0 also hands on the tokens of no group.
static __global__ void __launch_bounds__(kSelectThreads, 1)
    unmask_select_kernel(const __grid_constant__ UnmaskParams p) {
  __shared__ SelectShared s;
  const int b = blockIdx.y, group = blockIdx.x, groups = p.count.count;
  const int64_t row = int64_t(b) * p.n;
  uint32_t* keys = p.words.of(b * groups + group);
  const maskaccel::Stream stream = stream_of(p.seed, p.offset + b, *p.step, 0, Purpose::select);
  const auto group_of = [&](int t) { return p.groups.data != nullptr ? p.groups.at(b, t) : 0; };
  for (int t = threadIdx.x; t < p.n; t += blockDim.x) {
    const float confidence = p.confidence[row + t];
    keys[t] = kNoKey;
    if (p.tokens[row + t] != p.mask_id || p.hold.at(b, t) || group_of(t) != group || confidence != confidence) continue;
    float metric = confidence;
    if (p.temperature != 0.f) {
      const float u = p.noise == nullptr ? uniform_of(random_word(stream, static_cast<uint32_t>(t))) : 0.f;
      metric += p.temperature * (p.noise != nullptr ? p.noise[row + t] : -logf(-logf(u)));
    }
    keys[t] = falling_key(metric != metric ? -INFINITY : metric);
  }
  sync_threads();
  const auto key = [&](int t) { return keys[t] == kNoKey ? ~uint64_t{0} : token_rank(keys[t], t); };
  const int candidates = count_of([&](int t) { return keys[t] != kNoKey; }, p.n, s), count = p.count.at(b, group);
  uint64_t last = 0;  // taken are the keys below; 0: none
  if (count >= candidates) {
    last = ~uint64_t{0};
  } else if (count > 0) {
    last = smallest_keys(key, p.n, count, kRankBits, s) + 1;
  }
  for (int t = threadIdx.x; t < p.n; t += blockDim.x) {
    const int at = group_of(t);
    if (at != group && (group > 0 || (at >= 0 && at < groups))) continue;
    const bool taken = keys[t] != kNoKey && (key(t) < last || p.confidence[row + t] >= p.threshold);
    p.out[row + t] = taken ? p.sampled[row + t] : p.tokens[row + t];
  }
}

}  // namespace maskaccel::cuda
