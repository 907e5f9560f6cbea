// tile_attention_backward and attention_column_sums on CPU tensors; the contract is in
// maskaccel/ops/attention/schema.py.
#include "cpu_backward.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu_args.h"

namespace maskaccel {
namespace {

const float* statistics(const Arg& a, const AttentionProblem& s) {
  check_float(a);
  check_sizes(a, {s.B, s.H, s.Sq});
  return static_cast<const float*>(a.data);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of one call: fp32 numbers, each piece on a cache line, and counters that start at 0.
class Workspace {
 public:
  void want(float*& piece, int64_t numbers) {
    pieces_.push_back({&piece, total_});
    total_ += round_up(numbers, kLine / 4);
  }
  void allocate() {
    memory_ = Output({total_}, Dtype::f32);
    for (const auto& piece : pieces_) *piece.first = memory_.floats() + piece.second;
  }
  std::atomic<int64_t>* counters(int64_t n) {
    counters_.emplace_back(new std::atomic<int64_t>[n]());
    return counters_.back().get();
  }

 private:
  std::vector<std::pair<float**, int64_t>> pieces_;
  int64_t total_ = 0;
  Output memory_;
  std::vector<std::unique_ptr<std::atomic<int64_t>[]>> counters_;
};

int64_t threads() {
  uint32_t n = 1;
  MASKACCEL_SHIM(torch_get_num_threads(&n));
  return n > 0 ? n : 1;
}

// What both ops do before the kernels run. The cut into blocks must not depend on the threads.
void plan(AttentionPass& s, Workspace& workspace) {
  if (s.lists_t.index == nullptr) {
    s.bm = s.bn = AttentionBlocks::kTile;
    s.Mq = tiles_of(s.Sq, s.bm);
    s.Nk = tiles_of(s.Sk, s.bn);
  }
  if (s.D > 128) s.blocks.keys = 64;
  const int64_t tile_blocks = tiles_of(s.bn, s.blocks.keys);
  s.key_blocks = s.Nk == 0 ? 0 : (s.Nk - 1) * tile_blocks + tiles_of(s.Sk - (s.Nk - 1) * s.bn, s.blocks.keys);
  s.padded_rows = round_up(s.Sq, 2);
  s.padded_dim = round_up(s.D, 16);
  // More than threads: a block of keys then seldom waits for the one before it. Many more would not stay in the cache.
  s.heads_at_once = std::max<int64_t>(1, std::min(threads() * 3 / 2, s.B * s.Hk));
  s.row_chunks = tiles_of(s.Sq, AttentionBlocks::kTile);
  s.next_item = workspace.counters(1);
  s.packed = workspace.counters(s.B * s.Hk);
  s.done = workspace.counters(s.groups());
  const int64_t rows = s.slots() * s.padded_rows, depth = attention_backward_kernels().depth(s.dtype);
  workspace.want(s.q_rows, rows * s.row_words(depth));
  if (depth > 1) workspace.want(s.q_stacked, rows / depth * s.padded_dim);
  workspace.want(s.minus_shift, rows);
  workspace.want(s.share, rows);
}

// When each contribution to dq is due: for each query tile the blocks of keys are counted in ascending order.
void plan_turns(AttentionBackward& s, std::vector<int32_t>& turn_of, std::vector<int32_t>& turns) {
  const TileLists& t = s.lists_t;
  if (t.index == nullptr) return;
  const int64_t Bm = t.step_b == 0 ? 1 : s.B, Hm = t.step_h == 0 ? 1 : s.H, rows = Bm * Hm * t.rows;
  turn_of.resize(rows * t.length);
  turns.resize(Bm * Hm * s.Mq);
  s.turns_b = Bm == 1 ? 0 : Hm * s.Mq;
  s.turns_h = Hm == 1 ? 0 : s.Mq;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = r % t.rows, keys = std::min(s.Sk - n * s.bn, s.bn);
    int32_t* const of_head = turns.data() + r / t.rows * s.Mq;
    const int64_t entries = t.count[2 * r] + t.count[2 * r + 1];
    for (int64_t e = r * t.length; e < r * t.length + entries; ++e) {
      int32_t& turn = of_head[t.index[e]];
      turn_of[e] = turn;
      turn += static_cast<int32_t>(tiles_of(keys, s.blocks.keys));
    }
  }
  s.turn_of = turn_of.data();
  s.turns = turns.data();
}

// On every thread of torch until there are no items left.
template <class F>
void on_all_threads(const F& f) {
  parallel(threads(), 1, [&](int64_t, int64_t) { f(); });
}

void tile_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  AttentionArgs a;
  const Arg dout = in.tensor("dout"), dlse = in.optional("dlse");
  a.q = in.tensor("q");
  a.k = in.tensor("k");
  a.v = in.tensor("v");
  const Arg out = in.tensor("out"), lse = in.tensor("lse");
  a.read_lists(in);
  a.read_lists_t(in);
  a.read_elements_and_scores(in);
  a.read_tiles_and_scale(in);
  const int64_t needs = in.integer();

  AttentionBackward s;
  static_cast<AttentionProblem&>(s) = check_attention(a);
  s.dout = head_rows(dout, a.q.code, s.B, s.Sq, s.H, s.D);
  s.out = head_rows(out, a.q.code, s.B, s.Sq, s.H, s.D);
  s.lse = statistics(lse, s);
  if (dlse) s.dlse = statistics(dlse, s);
  STD_TORCH_CHECK(needs >= 0 && needs < 32, "needs is ", needs, "; allowed are 0 to 31");
  STD_TORCH_CHECK(bool(a.lists.index) == bool(a.lists_t.index), "index and index_t must be given together");
  s.needs = static_cast<int>(needs);

  Output dq, dk, dv, ds;
  dq = (needs & kNeedQ) != 0 ? Output({s.B, s.Sq, s.H, s.D}, s.dtype) : nothing(s.dtype);
  dk = (needs & kNeedK) != 0 ? Output({s.B, s.Sk, s.Hk, s.D}, s.dtype) : nothing(s.dtype);
  dv = (needs & kNeedV) != 0 ? Output({s.B, s.Sk, s.Hk, s.D}, s.dtype) : nothing(s.dtype);
  ds = (needs & kNeedS) != 0 ? Output({s.B, s.H, s.Sq, s.Sk}, Dtype::f32) : nothing(Dtype::f32);
  s.dq = dq.data();
  s.dk = dk.data();
  s.dv = dv.data();
  s.ds = ds.floats();

  const AttentionBackwardKernels& kernels = attention_backward_kernels();
  Workspace workspace;
  plan(s, workspace);
  const int64_t depth = kernels.depth(s.dtype), rows = s.slots() * s.padded_rows;
  workspace.want(s.dout_rows, rows * s.row_words(depth));
  if (depth > 1) workspace.want(s.dout_stacked, rows / depth * s.padded_dim);
  workspace.want(s.delta, rows);
  if ((needs & kNeedQ) != 0) workspace.want(s.dq_sum, rows * s.padded_dim);
  workspace.allocate();
  if (depth == 1) s.q_stacked = s.q_rows, s.dout_stacked = s.dout_rows;

  std::vector<int32_t> turn_of, turns;
  if ((needs & kNeedQ) != 0) {
    plan_turns(s, turn_of, turns);
    s.query_blocks = s.Mq * tiles_of(s.bm, s.blocks.queries);
    s.turn = workspace.counters(s.B * s.H * s.query_blocks);
  }
  if ((needs & kNeedS) != 0 && a.lists_t.index)
    parallel(s.B * s.H * s.Sq, 64, [&](int64_t begin, int64_t end) {
      std::memset(s.ds + begin * s.Sk, 0, static_cast<size_t>((end - begin) * s.Sk) * sizeof(float));
    });
  on_all_threads([&] { kernels.run(s); });
  stack[0] = dq.release();
  stack[1] = dk.release();
  stack[2] = dv.release();
  stack[3] = ds.release();
}

void attention_column_sums(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  AttentionArgs a;
  a.q = in.tensor("q");
  a.k = in.tensor("k");
  const Arg lse = in.tensor("lse");
  a.read_lists_t(in);
  a.read_elements_and_scores(in);
  a.read_tiles_and_scale(in);

  AttentionColumnSums s;
  static_cast<AttentionProblem&>(s) = check_attention(a);
  s.lse = statistics(lse, s);
  Output sums({s.B, s.H, s.Sk}, Dtype::f32);
  s.sums = sums.floats();
  const AttentionBackwardKernels& kernels = attention_backward_kernels();
  Workspace workspace;
  plan(s, workspace);
  workspace.allocate();
  if (s.q_stacked == nullptr) s.q_stacked = s.q_rows;
  on_all_threads([&] { kernels.run_sums(s); });
  stack[0] = sums.release();
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("tile_attention_backward", tile_attention_backward);
  m.impl("attention_column_sums", attention_column_sums);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
