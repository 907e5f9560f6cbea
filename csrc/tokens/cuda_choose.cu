// Bindings of random_keep, select_active and unmask_select to CUDA.
#include "cuda_choose.cuh"
#include "cuda_tokens.h"

namespace maskaccel::cuda {
namespace {

Marks read_marks(const Call& call, const Arg& a, int64_t batch, int64_t count) {
  if (!a) return {};
  check_table(call, a, codes().u8, "uint8", batch, count);
  return Marks{static_cast<const uint8_t*>(a.data), a.size(0) == 1 ? 0 : a.size(1)};
}

/// A contiguous tensor (B, N).
template <typename T>
const T* read_plane(const Call& call, const Arg& a, int32_t code, const char* dtype, int64_t batch, int64_t n) {
  check_table(call, a, code, dtype, batch, n);
  call.check(a.size(0) == batch, a.name, " must have the whole batch of ", batch, ", got ", shape_text(a));
  return static_cast<const T*>(a.data);
}

/// Room for `count` words of each of `samples`, in the workspace or in shared memory, whose bytes it returns.
size_t plan_words(Words& words, Workspace& workspace, int64_t samples, int64_t count) {
  words.count = static_cast<int>(count);
  if (count <= kSharedWords) return static_cast<size_t>(count) * sizeof(uint32_t);
  words.data = reinterpret_cast<uint32_t*>(workspace(samples * count));
  return 0;
}

void check_keep(const Call& call, const KeepParams& p, int64_t batch, int64_t n, int64_t keep, int64_t groups,
                int64_t rows_kept, int64_t mode) {
  call.check(mode >= 0 && mode <= 2, "mode is ", mode, "; allowed are 0 to 2");
  call.check(batch >= 0 && batch < 65536, "batch is ", batch, "; allowed are 0 to 65535");
  call.check(n >= 1 && n < int64_t{1} << 24, "n is ", n, "; allowed are 1 to ", (1 << 24) - 1);
  call.check(keep >= 1 && keep <= n, "keep is ", keep, "; allowed are 1 to n = ", n);
  call.check(p.route >= 0 && p.route < int64_t{1} << 24, "route is ", p.route, "; allowed are 0 to ", (1 << 24) - 1);
  if (mode == 2) return;
  call.check(groups >= 1 && n % groups == 0, "groups is ", groups, "; it must divide n = ", n);
  if (mode == 0) call.check(keep % groups == 0, "groups is ", groups, "; it must divide keep = ", keep);
  if (mode == 1) {
    call.check(rows_kept >= 1 && rows_kept <= groups && keep % rows_kept == 0 && keep / rows_kept <= n / groups,
               "rows_kept is ", rows_kept, "; it must divide keep = ", keep, " and leave at most ", n / groups,
               " columns and ", groups, " rows");
  }
}

void draw(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg step = in.tensor("step"), order = in.rare("order"), labels = in.rare("labels");
  const Arg quota = in.rare("quota"), force = in.rare("force");
  KeepParams p;
  p.seed = in.integer();
  if (!bare) p.route = in.integer();
  p.offset = in.integer();
  const int64_t first = in.integer(), second = in.integer();
  const PackedKeep packed(first, second);
  if (bare) p.route = packed.route;
  const int64_t batch = bare ? packed.batch : first, n = bare ? packed.n : second;
  const int64_t keep = bare ? packed.keep : in.integer(), groups = bare ? 1 : in.integer(),
                rows_kept = bare ? 0 : in.integer(), mode = bare ? 0 : in.integer();
  const Call call("random_keep", step);
  p.step = read_step(call, step);
  check_keep(call, p, batch, n, keep, groups, rows_kept, mode);
  p.mode = static_cast<KeepMode>(mode);
  call.check(!order || p.mode == KeepMode::groups, "order is not of mode ", mode);
  call.check(!force || p.mode != KeepMode::rows_columns, "force is not of mode ", mode);
  call.check(bool(labels) == (p.mode == KeepMode::classes) && bool(quota) == bool(labels),
             "labels and quota belong to mode 2, and it to them");
  if (order) {
    call.same_device(order);
    call.check(order.code == codes().i32 && order.dim == 1 && order.size(0) == n && order.contiguous(),
               "order must be contiguous int32 (", n, ",), got ", shape_text(order));
    p.order = static_cast<const int*>(order.data);
  }
  p.force = read_marks(call, force, batch, n);
  if (labels) {
    p.labels = read_index(call, labels, batch, n);
    p.quota = read_index(call, quota, batch);
  }
  p.n = static_cast<int>(n);
  p.keep = static_cast<int>(keep);
  p.groups = static_cast<int>(groups);
  p.rows_kept = static_cast<int>(rows_kept);
  const bool ragged = p.mode == KeepMode::classes;
  Result ids = integers(call, {batch, keep}), inverse = integers(call, {batch, n}), counts;
  if (!bare) counts = integers(call, {ragged ? batch : 0});
  if (batch > 0) {
    p.ids = static_cast<int*>(ids.data());
    p.inverse = static_cast<int*>(inverse.data());
    p.counts = ragged ? static_cast<int*>(counts.data()) : nullptr;
    const bool grid_of_rows = p.mode == KeepMode::rows_columns;
    p.first_item = grid_of_rows ? p.n : 0;
    Workspace workspace(call);
    const size_t shared = plan_words(p.words, workspace, batch, grid_of_rows ? groups + n / groups : n);
    if (p.words.data != nullptr) {
      const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(p.words.count, 256), 1024)),
                      static_cast<unsigned>(batch));
      launch(call.op(), keep_words_kernel, grid, 256, 0, call.stream(), p);
      p.drawn = true;
    }
    launch(call.op(), random_keep_kernel, dim3(static_cast<unsigned>(batch)), select_threads(n), shared, call.stream(),
           p);
  }
  stack[0] = ids.release();
  stack[1] = inverse.release();
  if (!bare) stack[2] = counts.release();
}

void random_keep(StableIValue* stack, uint64_t, uint64_t) { draw(stack, false); }
void random_keep_bare(StableIValue* stack, uint64_t, uint64_t) { draw(stack, true); }

void select_active(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg score = in.tensor("score"), age = in.tensor("age"), decay = in.tensor("decay"),
            force = in.optional("force");
  const int64_t keep = in.integer(), high = in.integer();
  const double threshold = in.number();
  const int64_t flags = in.integer();
  const Call call("select_active", score);
  call.check(score.dim == 2, "score must be (B, N), got ", shape_text(score));
  const int64_t batch = score.size(0), n = score.size(1);
  ActiveParams p;
  p.score = read_plane<float>(call, score, codes().f32, "float32", batch, n);
  p.age = read_plane<int>(call, age, codes().i32, "int32", batch, n);
  call.same_device(decay);
  call.check(decay.code == codes().f32 && decay.dim == 1 && decay.size(0) >= 1 && decay.size(0) <= kMostRows &&
                 decay.contiguous(),
             "decay must be contiguous float32 of one dim, at least 1 long, got ", shape_text(decay));
  p.decay = static_cast<const float*>(decay.data);
  p.ages = static_cast<int>(decay.size(0));
  p.force = read_marks(call, force, batch, n);
  p.by_threshold = flags & kThreshold;
  call.check(keep >= 1 && keep <= n, "keep is ", keep, "; allowed are 1 to ", n);
  call.check(high >= 0 && high <= n - keep && (high == 0 || !p.by_threshold), "high is ", high, "; allowed are 0 to ",
             p.by_threshold ? 0 : n - keep);
  p.n = static_cast<int>(n);
  p.keep = static_cast<int>(keep);
  p.high = static_cast<int>(high);
  p.threshold = static_cast<float>(threshold);
  Result ids = integers(call, {batch, keep}), inverse = integers(call, {batch, n}),
         new_age = integers(call, {batch, n});
  Result counts = integers(call, {p.by_threshold ? batch : 0});
  if (batch > 0) {
    p.ids = static_cast<int*>(ids.data());
    p.inverse = static_cast<int*>(inverse.data());
    p.counts = p.by_threshold ? static_cast<int*>(counts.data()) : nullptr;
    p.new_age = static_cast<int*>(new_age.data());
    Workspace workspace(call);
    const size_t shared = plan_words(p.words, workspace, batch, n);
    launch(call.op(), select_active_kernel, dim3(static_cast<unsigned>(batch)), select_threads(n), shared,
           call.stream(), p);
  }
  stack[0] = ids.release();
  stack[1] = inverse.release();
  stack[2] = counts.release();
  stack[3] = new_age.release();
}

void unmask_select(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg confidence = in.tensor("confidence"), sampled = in.tensor("sampled"), tokens = in.tensor("tokens");
  const Arg step = in.tensor("step"), count = in.tensor("count"), groups = in.optional("groups"),
            hold = in.optional("hold");
  const Arg noise = in.optional("noise");
  UnmaskParams p;
  p.mask_id = in.integer();
  p.seed = in.integer();
  p.offset = in.integer();
  p.threshold = static_cast<float>(in.number());
  p.temperature = static_cast<float>(in.number());
  const Call call("unmask_select", confidence);
  call.check(confidence.dim == 2, "confidence must be (B, N), got ", shape_text(confidence));
  const int64_t batch = confidence.size(0), n = confidence.size(1);
  p.confidence = read_plane<float>(call, confidence, codes().f32, "float32", batch, n);
  p.sampled = read_plane<int64_t>(call, sampled, codes().i64, "int64", batch, n);
  p.tokens = read_plane<int64_t>(call, tokens, codes().i64, "int64", batch, n);
  p.step = read_step(call, step);
  p.count = read_index(call, count, batch);
  call.check(batch < 65536 && p.count.count >= 1, "count must have at least one group, and at most 65535 samples, got ",
             shape_text(count));
  if (groups) p.groups = read_index(call, groups, batch, n);
  p.hold = read_marks(call, hold, batch, n);
  if (noise) p.noise = read_plane<float>(call, noise, codes().f32, "float32", batch, n);
  Result out = long_integers(call, {batch, n});
  if (batch > 0 && n > 0) {
    p.n = static_cast<int>(n);
    p.out = static_cast<int64_t*>(out.data());
    Workspace workspace(call);
    const size_t shared = plan_words(p.words, workspace, batch * p.count.count, n);
    const dim3 grid(static_cast<unsigned>(p.count.count), static_cast<unsigned>(batch));
    launch(call.op(), unmask_select_kernel, grid, select_threads(n), shared, call.stream(), p);
  }
  stack[0] = out.release();
}

void register_ops(Library& m) {
  m.impl("random_keep", &random_keep);
  m.impl("select_active", &select_active);
  m.impl("unmask_select", &unmask_select);
}

void register_bare(Library& m) { m.impl("random_keep_bare", &random_keep_bare); }

MASKACCEL_CUDA_LIBRARY(register_ops)
MASKACCEL_CUDA_RAW_LIBRARY(register_bare)

}  // namespace
}  // namespace maskaccel::cuda
