// Binding of tile_attention, its backward and attention_column_sums to CUDA.
#include "cuda_read.h"
#include "packed.h"

namespace maskaccel::cuda {
namespace {

void launch_forward(const Call& call, AttentionArgs& a) {
#ifdef MASKACCEL_SM90A
  if (call.info().capability == 90 && sm90_serves(a)) {
    Result counter;  // in a graph every replay clears its own
    if (a.lists.index != nullptr) a.counter = held_counter(call.device(), call.stream());
    if (a.lists.index != nullptr && a.counter == nullptr) {
      counter = integers(call, {1});
      counter.clear(call);
      a.counter = static_cast<int*>(counter.data());
    }
    return launch_sm90(a, call.stream());
  }
#endif
  launch_sm80(a, call.stream());
}

void launch_backward(const Call& call, const AttentionArgs& a) {
  Workspace workspace(call);
#ifdef MASKACCEL_SM90A
  if (call.info().capability == 90 && sm90_backward_serves(a)) {
    Result sums(call, {sm90_backward_sums(a)}, Dtype::f32);
    sums.clear(call);
    return launch_sm90_backward(a, workspace(sm90_backward_workspace(a)), sums.floats(), call.stream());
  }
#endif
  launch_sm80_backward(a, workspace(backward_workspace(a)), call.stream());
}

void forward(StableIValue* stack, AttentionCall form) {
  const bool whole = form == AttentionCall::whole, tested = form == AttentionCall::tested;
  Inputs in(stack, !whole);
  const Arg q = in.tensor("q"), k = in.tensor("k"), v = in.tensor("v");
  const ListInputs lists(in, false), unread(in, true);
  const ScoreInputs scores(in);
  const Arg reference = tested ? in.optional("reference_lse") : in.rare("reference_lse"),
            out_scale = in.rare("out_scale"), out_add = in.rare("out_add");
  const PackedTiles packed(whole ? 0 : in.integer());
  const PackedTest test(tested ? in.integer() : 0);
  const int64_t bm = whole ? in.integer() : packed.bm, bn = whole ? in.integer() : packed.bn;
  const double scale = whole ? in.number() : packed.scale, threshold = whole ? in.number() : test.threshold;
  const int64_t flags = whole ? in.integer() : test.flags;

  const Call call("tile_attention", q);
  AttentionReader r(call);
  r.qkv(q, k, v);
  r.tiles(bm, bn);
  r.a.lists = r.lists(lists, r.a.tile_rows);
  scores.read(r);
  r.epilogue(out_scale, out_add);
  AttentionArgs& a = r.a;
  call.check(flags >= 0 && flags <= (kKeep | kPrune), "flags are ", flags, "; allowed are 0 to ", kKeep | kPrune);
  call.check(!(flags & kPrune) || a.bm <= most_pruned_rows(a.dim), "bm is ", bm, "; with PRUNE and head dim ", a.dim,
             " at most ", most_pruned_rows(a.dim));
  a.multiprocessors = call.info().multiprocessors;
  a.scale = static_cast<float>(scale);
  a.skip_threshold = static_cast<float>(threshold);
  a.flags = static_cast<int>(flags);
  a.reference_lse = r.statistics(reference);
  a.keep_words = static_cast<int>(ceil_div(a.tile_columns, 32));
  Result out(call, {a.batch, a.queries, a.heads, a.dim}, a.dtype), lse(call, {a.batch, a.heads, a.queries}, Dtype::f32);
  Result keep;
  if (form != AttentionCall::bare && !(flags & kKeep)) keep = integers(call, {0});
  if (flags & kKeep) {
    keep = integers(call, {a.batch, a.heads, a.tile_rows, a.keep_words});
    a.keep = static_cast<int*>(keep.data());
    keep.clear(call);
  }
  a.out = out.data();
  a.lse = lse.floats();
  if (int64_t{a.batch} * a.heads * a.queries > 0) launch_forward(call, a);
  stack[0] = out.release();
  stack[1] = lse.release();
  if (form != AttentionCall::bare) stack[2] = keep.release();
}

void tile_attention(StableIValue* stack, uint64_t, uint64_t) { forward(stack, AttentionCall::whole); }
void tile_attention_bare(StableIValue* stack, uint64_t, uint64_t) { forward(stack, AttentionCall::bare); }
void tile_attention_tested_bare(StableIValue* stack, uint64_t, uint64_t) { forward(stack, AttentionCall::tested); }

void tile_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dout = in.tensor("dout"), dlse = in.optional("dlse");
  const Arg q = in.tensor("q"), k = in.tensor("k"), v = in.tensor("v"), out = in.tensor("out"), lse = in.tensor("lse");
  const ListInputs lists(in, false), lists_t(in, true);
  const ScoreInputs scores(in);
  const int64_t bm = in.integer(), bn = in.integer();
  const double scale = in.number();
  const int64_t needs = in.integer();

  const Call call("tile_attention_backward", q);
  call.check(needs >= 0 && needs < 32, "needs are ", needs, "; allowed are 0 to 31");
  AttentionReader r(call);
  r.qkv(q, k, v);
  r.tiles(bm, bn);
  r.a.lists = r.lists(lists, r.a.tile_rows);
  r.a.lists_t = r.lists(lists_t, r.a.tile_columns);
  call.check(bool(lists.index) == bool(lists_t.index) || !(needs & (kNeedK | kNeedV)),
             "index and index_t must be given together or not at all for the gradients of k and v");
  scores.read(r);
  AttentionArgs& a = r.a;
  a.scale = static_cast<float>(scale);
  a.dout = r.rows(dout, a.queries, a.heads);
  a.result = r.rows(out, a.queries, a.heads);
  a.dlse = r.statistics(dlse);
  a.lse = const_cast<float*>(r.statistics(lse));
  a.needs = static_cast<int>(needs);

  const bool empty = int64_t{a.batch} * a.heads * a.queries == 0 || a.keys == 0;
  const auto gradient = [&](int64_t bit, int64_t tokens, int64_t heads, void*& data) {
    if (!(needs & bit)) return Result::nothing(call, a.dtype);
    Result t(call, {a.batch, tokens, heads, a.dim}, a.dtype);
    data = t.data();
    if (empty) t.clear(call);
    return t;
  };
  Result dq = gradient(kNeedQ, a.queries, a.heads, a.dq), dk = gradient(kNeedK, a.keys, a.key_heads, a.dk);
  Result dv = gradient(kNeedV, a.keys, a.key_heads, a.dv);
  Result ds = needs & kNeedS ? Result(call, {a.batch, a.heads, a.queries, a.keys}, Dtype::f32)
                             : Result::nothing(call, Dtype::f32);
  if (needs & kNeedS) {
    a.ds = ds.floats();
    ds.clear(call);
  }
  if (!empty && (needs & ~kSameBits) != 0) launch_backward(call, a);
  stack[0] = dq.release();
  stack[1] = dk.release();
  stack[2] = dv.release();
  stack[3] = ds.release();
}

void attention_column_sums(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg q = in.tensor("q"), k = in.tensor("k"), lse = in.tensor("lse");
  const ListInputs lists_t(in, true);
  const ScoreInputs scores(in);
  const int64_t bm = in.integer(), bn = in.integer();
  const double scale = in.number();

  const Call call("attention_column_sums", q);
  AttentionReader r(call);
  r.qkv(q, k, k);
  r.tiles(bm, bn);
  AttentionArgs& a = r.a;
  a.lists_t = r.lists(lists_t, a.tile_columns);
  scores.read(r);
  a.scale = static_cast<float>(scale);
  a.lse = const_cast<float*>(r.statistics(lse));
  Result sums(call, {a.batch, a.heads, a.keys}, Dtype::f32);
  if (int64_t{a.batch} * a.heads * a.queries == 0) {
    sums.clear(call);
  } else if (a.keys > 0) {
    launch_sm80_sums(a, sums.floats(), call.stream());
  }
  stack[0] = sums.release();
}

void register_ops(Library& m) {
  m.impl("tile_attention", &tile_attention);
  m.impl("tile_attention_bare", &tile_attention_bare);
  m.impl("tile_attention_tested_bare", &tile_attention_tested_bare);
  m.impl("tile_attention_backward", &tile_attention_backward);
  m.impl("attention_column_sums", &attention_column_sums);
}

// Not in the namespace `maskaccel`: its ops take fp32 too, so Python chooses (ops/attention/serves.py).
MASKACCEL_CUDA_RAW_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
