// random_keep, select_active and unmask_select on CPU tensors; the contract is in maskaccel/ops/tokens/schema.py.
#include "cpu_keep.h"

#include <limits>
#include <vector>

#include "cpu_checks.h"
#include "cpu_select.h"

namespace maskaccel {
namespace {

constexpr uint64_t kToken24 = 0xffffff, kToken32 = 0xffffffff;

// ------------------------------------------------------------------------------------------------ random_keep

struct RandomKeep {
  int64_t step, seed, route, offset, batch, n, keep, groups, rows_kept;
  KeepMode mode;
  const int32_t* order = nullptr;
  Samples<int32_t> labels, quota;
  Samples<uint8_t> force;
};

void check_permutation(const Arg& order, int64_t n) {
  check_values(order, 0, n);
  std::vector<uint8_t> seen(static_cast<size_t>(n), 0);
  const auto* const tokens = static_cast<const int32_t*>(order.data);
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(seen[tokens[i]]++ == 0, "order holds token ", tokens[i], " twice; it must be a permutation");
  }
}

RandomKeep read_random_keep(Inputs& in, bool bare) {
  const Arg step = in.tensor("step"), order = in.rare("order"), labels = in.rare("labels"), quota = in.rare("quota"),
            force = in.rare("force");
  RandomKeep r;
  int64_t mode = 0;
  r.seed = in.integer();
  if (bare) {
    r.offset = in.integer();
    const int64_t batch_route = in.integer();
    const PackedKeep packed(batch_route, in.integer());
    r.batch = packed.batch;
    r.route = packed.route;
    r.n = packed.n;
    r.keep = packed.keep;
    r.groups = 1;
  } else {
    r.route = in.integer();
    r.offset = in.integer();
    r.batch = in.integer();
    r.n = in.integer();
    r.keep = in.integer();
    r.groups = in.integer();
    r.rows_kept = in.integer();
    mode = in.integer();
  }
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode is ", mode, "; allowed are 0 to 2");
  r.mode = static_cast<KeepMode>(mode);
  r.step = read_step(step);
  STD_TORCH_CHECK(r.route >= 0 && r.route < 1 << 24, "route is ", r.route, "; allowed are 0 to ", (1 << 24) - 1);
  STD_TORCH_CHECK(r.n >= 1 && r.n < 1 << 24, "n is ", r.n, "; allowed are 1 to ", (1 << 24) - 1);
  STD_TORCH_CHECK(r.keep >= 1 && r.keep <= r.n, "keep is ", r.keep, "; allowed are 1 to n = ", r.n);
  STD_TORCH_CHECK(r.batch >= 0, "batch is ", r.batch, "; it must be 0 or more");
  if (r.mode != KeepMode::classes)
    STD_TORCH_CHECK(r.groups >= 1 && r.n % r.groups == 0, "groups is ", r.groups, "; it must divide n = ", r.n);
  if (r.mode == KeepMode::groups)
    STD_TORCH_CHECK(r.keep % r.groups == 0, "groups is ", r.groups, "; it must divide keep = ", r.keep);
  if (r.mode == KeepMode::rows_columns) {
    STD_TORCH_CHECK(r.rows_kept >= 1 && r.rows_kept <= r.groups && r.keep % r.rows_kept == 0 &&
                        r.keep / r.rows_kept <= r.n / r.groups,
                    "rows_kept is ", r.rows_kept, "; it must divide keep = ", r.keep, " and leave no more rows than ",
                    r.groups, " and no more columns than ", r.n / r.groups);
    STD_TORCH_CHECK(!force, "force is not for mode 1: rows and columns are kept whole");
  }
  STD_TORCH_CHECK(!order || r.mode == KeepMode::groups, "order is for mode 0 alone");
  STD_TORCH_CHECK(static_cast<bool>(labels) == (r.mode == KeepMode::classes) &&
                      static_cast<bool>(quota) == (r.mode == KeepMode::classes),
                  "labels and quota are given in mode 2, and in no other");
  if (order) {
    check_dense(order, codes().i32, "int32", {r.n});
    check_permutation(order, r.n);
    r.order = static_cast<const int32_t*>(order.data);
  }
  r.labels = samples<int32_t>(labels, r.batch, r.n, "n");
  r.quota = samples<int32_t>(quota, r.batch, -1, "C");
  r.force = samples<uint8_t>(force, r.batch, r.n, "n");
  return r;
}

// Of each run of `length` keys, the `count` smallest are marked.
void keep_of_groups(const RandomKeep& r, const uint32_t* words, const uint8_t* force, uint64_t* keys, uint8_t* kept) {
  const int64_t length = r.n / r.groups;
  for (int64_t i = 0; i < r.n; ++i) {
    const auto t = static_cast<uint32_t>(r.order != nullptr ? r.order[i] : i);
    keys[i] = keep_key(words[t], t, force != nullptr && force[t] != 0);
  }
  for (int64_t g = 0; g < r.groups; ++g) mark_smallest(keys + g * length, length, r.keep / r.groups, kToken24, kept);
}

// `words` holds those of the rows, then those of the columns.
void keep_of_rows_columns(const RandomKeep& r, const uint32_t* words, uint64_t* keys, uint8_t* kept) {
  const int64_t columns = r.n / r.groups;
  std::vector<uint8_t> marks(static_cast<size_t>(r.groups + columns));
  const auto mark = [&](int64_t from, int64_t count, int64_t take) {
    for (int64_t i = 0; i < count; ++i) keys[i] = keep_key(words[from + i], static_cast<uint32_t>(i), true);
    mark_smallest(keys, count, take, kToken24, marks.data() + from);
  };
  mark(0, r.groups, r.rows_kept);
  mark(r.groups, columns, r.keep / r.rows_kept);
  for (int64_t row = 0; row < r.groups; ++row)
    for (int64_t c = 0; c < columns; ++c) kept[row * columns + c] = marks[row] & marks[r.groups + c];
}

// Sorts the keys of tokens by a class of each, -1 or C and more: none. Returns where each class begins.
template <class Key>
std::vector<int64_t> by_class(const int32_t* labels, int64_t n, int64_t classes, uint64_t* keys, Key&& key) {
  std::vector<int64_t> begin(static_cast<size_t>(classes + 1), 0);
  const auto is_one = [&](int64_t label) { return label >= 0 && label < classes; };
  for (int64_t t = 0; t < n; ++t)
    if (is_one(labels[t])) ++begin[labels[t] + 1];
  for (int64_t c = 0; c < classes; ++c) begin[c + 1] += begin[c];
  std::vector<int64_t> at(begin.begin(), begin.end());
  for (int64_t t = 0; t < n; ++t)
    if (is_one(labels[t])) keys[at[labels[t]]++] = key(t);
  return begin;
}

void keep_of_classes(const RandomKeep& r, const uint32_t* words, const uint8_t* force, const int32_t* labels,
                     const int32_t* quota, uint64_t* keys, uint8_t* kept) {
  const std::vector<int64_t> begin = by_class(labels, r.n, r.quota.count, keys, [&](int64_t t) {
    return keep_key(words[t], static_cast<uint32_t>(t), force != nullptr && force[t] != 0);
  });
  std::fill_n(kept, r.n, uint8_t{0});
  for (int64_t c = 0; c < r.quota.count; ++c)
    mark_smallest(keys + begin[c], begin[c + 1] - begin[c], std::max<int32_t>(quota[c], 0), kToken24, kept);
}

void draw(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const RandomKeep r = read_random_keep(in, bare);
  const bool ragged = r.mode == KeepMode::classes, lines = r.mode == KeepMode::rows_columns;
  Output keep = integers({r.batch, r.keep}), inverse = integers({r.batch, r.n}), counts;
  if (!bare) counts = integers({ragged ? r.batch : 0});
  const KeepKernels& kernels = keep_kernels();
  parallel(r.batch, grain_for(4 * r.n), [&](int64_t begin, int64_t end) {
    const int64_t drawn = lines ? r.groups + r.n / r.groups : r.n;
    std::vector<uint32_t> words(static_cast<size_t>(drawn));
    std::vector<uint64_t> keys(static_cast<size_t>(std::max(drawn, r.n)));
    std::vector<uint8_t> kept(static_cast<size_t>(r.n));
    for (int64_t b = begin; b < end; ++b) {
      const Stream stream = stream_of(r.seed, r.offset + b, r.step, r.route, Purpose::keep);
      kernels.words(stream, static_cast<uint32_t>(lines ? r.n : 0), drawn, words.data());
      if (lines) {
        keep_of_rows_columns(r, words.data(), keys.data(), kept.data());
      } else if (ragged) {
        keep_of_classes(r, words.data(), r.force.of(b), r.labels.of(b), r.quota.of(b), keys.data(), kept.data());
      } else {
        keep_of_groups(r, words.data(), r.force.of(b), keys.data(), kept.data());
      }
      const int64_t count = compact(kept.data(), r.n, r.keep, ints(keep) + b * r.keep, ints(inverse) + b * r.n);
      if (ragged) ints(counts)[b] = static_cast<int32_t>(count);
    }
  });
  stack[0] = keep.release();
  stack[1] = inverse.release();
  if (!bare) stack[2] = counts.release();
}

void random_keep(StableIValue* stack, uint64_t, uint64_t) { draw(stack, false); }
void random_keep_bare(StableIValue* stack, uint64_t, uint64_t) { draw(stack, true); }

// ---------------------------------------------------------------------------------------------- select_active

struct SelectActive {
  int64_t N = 0, keep = 0, high = 0;
  bool by_threshold = false;
  float threshold = 0.0f;
};

// Marks the tokens of one sample that are kept.
void active(const SelectActive& s, const float* metric, const uint8_t* force, uint64_t* keys, uint8_t* kept,
            uint8_t* best) {
  int64_t forced = 0;
  for (int64_t t = 0; t < s.N; ++t) {
    kept[t] = force != nullptr && force[t] != 0 && forced < s.keep;
    forced += kept[t];
  }
  const auto collect = [&] {
    int64_t count = 0;
    for (int64_t t = 0; t < s.N; ++t) {
      keys[count] = rank_key(metric[t], static_cast<uint32_t>(t));
      count += (force == nullptr || force[t] == 0) && (!s.by_threshold || metric[t] >= s.threshold);
    }
    return count;
  };
  const auto mark = [&](int64_t rank, uint8_t value) {
    const int64_t count = collect();
    mark_smallest(keys, count, std::min(rank, count), kToken32, best);
    for (int64_t t = 0; t < s.N; ++t) kept[t] = best[t] != 0 ? value : kept[t];
  };
  std::fill_n(best, s.N, uint8_t{0});
  mark(s.high + s.keep - forced, 1);
  if (s.high > 0) mark(s.high, 0);
}

void select_active(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg score = in.tensor("score"), age = in.tensor("age"), decay = in.tensor("decay"),
            force = in.optional("force");
  SelectActive s;
  s.keep = in.integer();
  s.high = in.integer();
  s.threshold = static_cast<float>(in.number());
  const int64_t flags = in.integer();
  STD_TORCH_CHECK(score.dim == 2, "score must be (B, N), got ", score.dim, " dimensions");
  const int64_t B = score.size(0), N = s.N = score.size(1);
  check_dense(score, codes().f32, "float32", {B, N});
  check_dense(age, codes().i32, "int32", {B, N});
  STD_TORCH_CHECK(decay.code == codes().f32 && decay.dim == 1 && decay.size(0) >= 1 && decay.contiguous(),
                  "decay must be contiguous float32 (A,) with A of 1 or more");
  const Samples<uint8_t> forced = samples<uint8_t>(force, B, N, "N");
  STD_TORCH_CHECK(N < int64_t{1} << 31, "score has ", N, " tokens a sample; the most is 2^31 - 1");
  STD_TORCH_CHECK(s.keep >= 1 && s.keep <= N, "keep is ", s.keep, "; allowed are 1 to N = ", N);
  STD_TORCH_CHECK(s.high >= 0 && s.high <= N - s.keep, "high is ", s.high,
                  "; allowed are 0 to N - keep = ", N - s.keep);
  STD_TORCH_CHECK(flags == 0 || flags == kThreshold, "unknown flags ", flags);
  s.by_threshold = flags == kThreshold;
  STD_TORCH_CHECK(!s.by_threshold || s.high == 0, "high is ", s.high, "; with a threshold it must be 0");
  Output keep = integers({B, s.keep}), inverse = integers({B, N}), counts = integers({s.by_threshold ? B : 0}),
         older = integers({B, N});
  const KeepKernels& kernels = keep_kernels();
  parallel(B, grain_for(4 * N), [&](int64_t begin, int64_t end) {
    std::vector<float> metric(static_cast<size_t>(N));
    std::vector<uint64_t> keys(static_cast<size_t>(N));
    std::vector<uint8_t> kept(static_cast<size_t>(N)), best(static_cast<size_t>(N));
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* const ages = static_cast<const int32_t*>(age.data) + b * N;
      kernels.aged(static_cast<const float*>(score.data) + b * N, ages, static_cast<const float*>(decay.data),
                   decay.size(0), N, metric.data());
      active(s, metric.data(), forced.of(b), keys.data(), kept.data(), best.data());
      const int64_t count = compact(kept.data(), N, s.keep, ints(keep) + b * s.keep, ints(inverse) + b * N);
      if (s.by_threshold) ints(counts)[b] = static_cast<int32_t>(count);
      int32_t* const next = ints(older) + b * N;
      for (int64_t t = 0; t < N; ++t)
        next[t] = kept[t] != 0 ? 0 : static_cast<int32_t>(static_cast<uint32_t>(ages[t]) + 1u);
    }
  });
  stack[0] = keep.release();
  stack[1] = inverse.release();
  stack[2] = counts.release();
  stack[3] = older.release();
}

// ---------------------------------------------------------------------------------------------- unmask_select

void unmask_select(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg confidence = in.tensor("confidence"), sampled = in.tensor("sampled"), tokens = in.tensor("tokens"),
            step_arg = in.tensor("step"), count = in.tensor("count"), groups = in.optional("groups"),
            hold = in.optional("hold"), noise = in.optional("noise");
  const int64_t mask_id = in.integer(), seed = in.integer(), offset = in.integer();
  const auto threshold = static_cast<float>(in.number()), temperature = static_cast<float>(in.number());
  STD_TORCH_CHECK(confidence.dim == 2, "confidence must be (B, N), got ", confidence.dim, " dimensions");
  const int64_t B = confidence.size(0), N = confidence.size(1);
  STD_TORCH_CHECK(N < int64_t{1} << 31, "confidence has ", N, " tokens a sample; the most is 2^31 - 1");
  check_dense(confidence, codes().f32, "float32", {B, N});
  check_dense(sampled, codes().i64, "int64", {B, N});
  check_dense(tokens, codes().i64, "int64", {B, N});
  check_dense(noise, codes().f32, "float32", {B, N});
  const int64_t step = read_step(step_arg);
  const Samples<int32_t> quota = samples<int32_t>(count, B, -1, "G"), group = samples<int32_t>(groups, B, N, "N");
  const Samples<uint8_t> held = samples<uint8_t>(hold, B, N, "N");
  STD_TORCH_CHECK(threshold == threshold, "threshold is a NaN");
  STD_TORCH_CHECK(temperature >= 0.0f && temperature <= std::numeric_limits<float>::max(), "temperature is ",
                  temperature, "; it must be 0 or more, and finite");
  Output out = long_integers({B, N});
  const KeepKernels& kernels = keep_kernels();
  const int64_t G = quota.count;
  parallel(B, grain_for(4 * N), [&](int64_t begin, int64_t end) {
    std::vector<float> metric(static_cast<size_t>(temperature > 0.0f ? N : 0));
    std::vector<int32_t> labels(static_cast<size_t>(N));
    std::vector<uint64_t> keys(static_cast<size_t>(N));
    std::vector<uint8_t> taken(static_cast<size_t>(N));
    for (int64_t b = begin; b < end; ++b) {
      const float* const sure = static_cast<const float*>(confidence.data) + b * N;
      const auto* const from = static_cast<const int64_t*>(sampled.data) + b * N;
      const auto* const old = static_cast<const int64_t*>(tokens.data) + b * N;
      const int32_t* const of_group = group.of(b);
      const uint8_t* const stay = held.of(b);
      const float* rank = sure;
      if (temperature > 0.0f) {
        const Stream stream = stream_of(seed, offset + b, step, 0, Purpose::select);
        const float* const given = noise ? static_cast<const float*>(noise.data) + b * N : nullptr;
        kernels.noisy(sure, given, stream, temperature, N, metric.data());
        rank = metric.data();
      }
      for (int64_t t = 0; t < N; ++t) {
        const int32_t g = of_group != nullptr ? of_group[t] : 0;
        const bool candidate =
            old[t] == mask_id && (stay == nullptr || stay[t] == 0) && sure[t] == sure[t] && g >= 0 && g < G;
        labels[t] = candidate ? g : -1;
        taken[t] = candidate && sure[t] >= threshold;
      }
      std::vector<uint8_t> best(static_cast<size_t>(N), 0);
      const std::vector<int64_t> first = by_class(labels.data(), N, G, keys.data(), [&](int64_t t) {
        const float v = rank[t] == rank[t] ? rank[t] : -std::numeric_limits<float>::infinity();
        return rank_key(v, static_cast<uint32_t>(t));
      });
      for (int64_t g = 0; g < G; ++g)
        mark_smallest(keys.data() + first[g], first[g + 1] - first[g], std::max<int32_t>(quota.of(b)[g], 0), kToken32,
                      best.data());
      int64_t* const to = static_cast<int64_t*>(out.data()) + b * N;
      for (int64_t t = 0; t < N; ++t) to[t] = (taken[t] | best[t]) != 0 ? from[t] : old[t];
    }
  });
  stack[0] = out.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("random_keep", random_keep);
  m.impl("select_active", select_active);
  m.impl("unmask_select", unmask_select);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) {
  maskaccel::implement(m);
  m.impl("random_keep_bare", maskaccel::random_keep_bare);
}
