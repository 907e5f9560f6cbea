// tile_attention on CPU tensors; the contract is in maskaccel/ops/attention/schema.py.
#include "cpu_forward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu_args.h"

namespace maskaccel {
namespace {

constexpr int64_t kKeep = 1, kPrune = 2;

// Key heads are packed and used in groups. A group of this size stays in the cache,
constexpr int64_t kNearBytes = int64_t{4} << 20;
// has this many rows of tiles for each thread where it can, so that threads seldom wait for each other,
constexpr int64_t kRowsPerThread = 16;
// and stays in the memory of the calling thread: it is bounded, unless one head is larger.
constexpr int64_t kMostBytes = int64_t{64} << 20;

int64_t heads_in_group(const AttentionForward& s, int64_t threads) {
  const int64_t heads = s.B * s.Hk, bytes = (s.keys_size + s.values_size) * int64_t{sizeof(float)};
  if (bytes == 0) return heads;
  const int64_t rows = s.Mq * (s.H / s.Hk);
  const int64_t busy = (kRowsPerThread * threads + rows - 1) / rows;
  return std::clamp(std::min(std::max(kNearBytes / bytes, busy), kMostBytes / bytes), int64_t{1}, heads);
}

// The largest of the kernels' tile sizes that divides a mask tile.
int64_t kernel_tile(int64_t mask_tile) {
  int64_t tile = 64;
  while (mask_tile % tile != 0) tile /= 2;
  return tile;
}

void read_epilogue(AttentionForward& s, const Arg& q, const Arg& out_scale, const Arg& out_add) {
  if (out_scale) {
    STD_TORCH_CHECK(out_scale.code == codes().f32, "out_scale must be float32");
    STD_TORCH_CHECK(out_scale.dim == 3, "out_scale must be 3-D, got ", out_scale.dim, " dimensions");
    const int64_t full[3] = {s.B, s.H, s.Sq};
    int64_t* const step[3] = {&s.out_scale_b, &s.out_scale_h, &s.out_scale_s};
    for (int i = 0; i < 3; ++i) {
      check_full_or_one(out_scale, i, full[i]);
      *step[i] = out_scale.size(i) == 1 ? 0 : out_scale.stride(i);
    }
    s.out_scale = static_cast<const float*>(out_scale.data);
  }
  if (out_add) {
    STD_TORCH_CHECK(out_add.code == codes().f32 || out_add.code == q.code,
                    "out_add must be float32 or have the dtype of q");
    s.out_add = head_rows(out_add, out_add.code, s.B, s.Sq, s.H, s.D);
    s.out_add_dtype = dtype_of_arg(out_add);
  }
}

struct Row {
  int64_t b, h, m;
};

// Rows of mask tiles of the key heads from `first` to `last`, those with most tiles first. With rows enough to keep
// the threads busy, a head is done before the next one is begun: its keys and values stay in the nearer caches.
std::vector<Row> rows_of(const AttentionForward& s, int64_t first, int64_t last, int64_t threads) {
  const int64_t group = s.H / s.Hk, begin = first * group, heads = (last - first) * group;
  const bool by_head = s.Mq >= 4 * threads;
  std::vector<Row> rows(static_cast<size_t>(heads * s.Mq));
  std::vector<int64_t> taken(static_cast<size_t>(heads));
  int64_t next = 0;
  const auto take = [&](int64_t b, int64_t h, int64_t m) {
    const int64_t head = b * s.H + h - begin;
    if (head < 0 || head >= heads) return;
    rows[by_head ? head * s.Mq + taken[head]++ : next++] = {b, h, m};
  };
  const int64_t samples = s.lists.step_b != 0 ? s.B : 1, list_heads = s.lists.step_h != 0 ? s.H : 1;
  for (int64_t i = 0; i < samples * list_heads * s.Mq; ++i) {
    const int64_t id = s.lists.index == nullptr ? i : s.lists.order[i];
    const int64_t m = id % s.Mq, h = id / s.Mq % list_heads, b = id / s.Mq / list_heads;
    for (int64_t b2 = b; b2 < (samples == 1 ? s.B : b + 1); ++b2)
      for (int64_t h2 = h; h2 < (list_heads == 1 ? s.H : h + 1); ++h2) take(b2, h2, m);
  }
  return rows;
}

// Which mask tiles of keys any of the rows reads: bytes (key heads from `first` to `last`, Nk).
std::vector<uint8_t> tiles_read(const AttentionForward& s, const std::vector<Row>& rows, int64_t first, int64_t last) {
  const bool all = s.lists.index == nullptr;
  std::vector<uint8_t> read(static_cast<size_t>((last - first) * s.Nk), all);
  if (all) return read;
  for (const Row& row : rows) {
    uint8_t* const of_head = read.data() + (row.b * s.Hk + s.key_head(row.h) - first) * s.Nk;
    const int64_t list = s.lists.row(row.b, row.h, row.m);
    const int32_t *const tiles = s.lists.index + list * s.lists.length, *const count = s.lists.count + 2 * list;
    for (int64_t i = 0; i < count[0] + count[1]; ++i) of_head[tiles[i]] = 1;
  }
  return read;
}

void attend(AttentionForward& s) {
  const ForwardKernels& kernels = forward_attention_kernels();
  s.tq = kernel_tile(s.bm);
  s.tk = kernel_tile(s.bn);
  kernels.plan(s);
  uint32_t threads = 1;
  MASKACCEL_SHIM(torch_get_num_threads(&threads));
  const int64_t heads = s.B * s.Hk, group = heads_in_group(s, threads);
  const auto aligned = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t keys_size = aligned(group * s.keys_size), values_size = aligned(group * s.values_size);
  const int64_t work_size = aligned(s.work_size);
  const int64_t all = keys_size + values_size + int64_t{threads} * work_size;
  float* const memory = static_cast<float*>(scratch(static_cast<size_t>(all) * sizeof(float)));
  s.packed_keys = memory;
  s.packed_values = memory + keys_size;
  float* const work = memory + keys_size + values_size;
  for (s.first_head = 0; s.first_head < heads; s.first_head += group) {
    const int64_t last = s.first_head + group < heads ? s.first_head + group : heads;
    const std::vector<Row> rows = rows_of(s, s.first_head, last, threads);
    const std::vector<uint8_t> read = tiles_read(s, rows, s.first_head, last);
    s.tiles_read = read.data();
    parallel((last - s.first_head) * s.key_tiles(), grain_for(2 * s.tk * s.D),
             [&](int64_t begin, int64_t end) { kernels.pack(s, begin, end); });
    const int64_t count = static_cast<int64_t>(rows.size());
    // Rows differ in length: whoever is free takes the next one, and the longest are not left for the end.
    std::atomic<int64_t> next{0};
    parallel(count < threads ? count : threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t i = next++; i < count; i = next++)
          kernels.attend(s, work + worker * work_size, rows[i].b, rows[i].h, rows[i].m);
    });
  }
}

void forward(StableIValue* stack, AttentionCall form) {
  const bool whole = form == AttentionCall::whole, tested = form == AttentionCall::tested;
  Inputs in(stack, !whole);
  AttentionArgs a;
  a.q = in.tensor("q");
  a.k = in.tensor("k");
  a.v = in.tensor("v");
  a.read_lists(in);
  a.read_lists_t(in);
  a.read_elements_and_scores(in);
  const Arg reference_lse = tested ? in.optional("reference_lse") : in.rare("reference_lse"),
            out_scale = in.rare("out_scale"), out_add = in.rare("out_add");
  double threshold = 0;
  int64_t flags = 0;
  if (whole) {
    a.read_tiles_and_scale(in);
    threshold = in.number();
    flags = in.integer();
  } else {
    a.read_packed(in);
    const PackedTest test(tested ? in.integer() : 0);
    threshold = test.threshold;
    flags = test.flags;
  }
  AttentionForward s;
  static_cast<AttentionProblem&>(s) = check_attention(a);
  STD_TORCH_CHECK(flags >= 0 && flags <= (kKeep | kPrune), "flags is ", flags, "; allowed are 0 to ", kKeep | kPrune);
  STD_TORCH_CHECK(!std::isnan(threshold), "skip_threshold must be a number, got nan");
  s.threshold = static_cast<float>(threshold);
  s.prune = (flags & kPrune) != 0;
  if (reference_lse) {
    check_float(reference_lse);
    check_sizes(reference_lse, {s.B, s.H, s.Sq});
    s.reference_lse = static_cast<const float*>(reference_lse.data);
  }
  read_epilogue(s, a.q, out_scale, out_add);
  Output out({s.B, s.Sq, s.H, s.D}, s.dtype), lse({s.B, s.H, s.Sq}, Dtype::f32), keep;
  s.out = out.data();
  s.lse = lse.floats();
  const bool with_keep = (flags & kKeep) != 0;
  s.keep_words = tiles_of(s.Nk, 32);
  const int64_t keep_sizes[] = {with_keep ? s.B : 0, s.H, s.Mq, s.keep_words};
  if (form != AttentionCall::bare) keep = Output(keep_sizes, with_keep ? 4 : 1, codes().i32, int64_t{sizeof(int32_t)});
  if (with_keep) s.keep = static_cast<int32_t*>(keep.data());
  if (s.B * s.H * s.Sq > 0) attend(s);
  stack[0] = out.release();
  stack[1] = lse.release();
  if (form != AttentionCall::bare) stack[2] = keep.release();
}

void tile_attention(StableIValue* stack, uint64_t, uint64_t) { forward(stack, AttentionCall::whole); }
void tile_attention_bare(StableIValue* stack, uint64_t, uint64_t) { forward(stack, AttentionCall::bare); }
void tile_attention_tested_bare(StableIValue* stack, uint64_t, uint64_t) { forward(stack, AttentionCall::tested); }

void implement(torch::stable::detail::StableLibrary& m) { m.impl("tile_attention", tile_attention); }
void implement_bare(torch::stable::detail::StableLibrary& m) {
  m.impl("tile_attention_bare", tile_attention_bare);
  m.impl("tile_attention_tested_bare", tile_attention_tested_bare);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) {
  maskaccel::implement(m);
  maskaccel::implement_bare(m);
}
