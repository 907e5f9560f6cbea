// gather_rows, unmerge_rows, segment_rows, scatter_merge, its gradients, and gather_modulate on CPU tensors; the
// contract is in maskaccel/ops/tokens/schema.py.
#include "cpu_rows.h"

#include "../adaln/cpu_checks.h"
#include "cpu_checks.h"

namespace maskaccel {
namespace {

constexpr int64_t kAny = -1;

// (B, count, D) with a contiguous last dim; -1 takes any size.
Rows check_rows(const Arg& a, int64_t B, int64_t count, int64_t D) {
  STD_TORCH_CHECK(a.dim == 3, a.name, " must have 3 dimensions, got ", a.dim);
  STD_TORCH_CHECK(
      (B == kAny || a.size(0) == B) && (count == kAny || a.size(1) == count) && (D == kAny || a.size(2) == D), a.name,
      " has shape (", a.size(0), ", ", a.size(1), ", ", a.size(2), "); it must be (", B, ", ", count, ", ", D,
      "), -1 being any");
  STD_TORCH_CHECK(a.dense_last(), a.name, " must be contiguous in its last dim");
  return {a.data, a.stride(0), a.stride(1)};
}

Index check_index(const Arg& a, int64_t batch, int64_t count, const char* name) {
  const Samples<int32_t> s = samples<int32_t>(a, batch, count, name);
  return {s.data, s.stride, s.count};
}

// Of the dtype of the rows, or fp32.
Dtype check_operand(const Arg& a, Dtype dtype) {
  const Dtype found = dtype_of_arg(a);
  STD_TORCH_CHECK(found == dtype || found == Dtype::f32, a.name, " must be float32 or of the dtype of the rows");
  return found;
}

// (B|1, 1, D), or (B|1, count, D) with a row for each; a shared row has a stride of 0.
Rows check_shared(const Arg& a, int64_t B, int64_t count, int64_t D) {
  STD_TORCH_CHECK(a.dim == 3 && (a.size(0) == B || a.size(0) == 1) && (a.size(1) == count || a.size(1) == 1) &&
                      a.size(2) == D && a.dense_last(),
                  a.name, " must be (B|1, 1, D) or (B|1, ", count, ", D) with B = ", B, ", D = ", D,
                  " and a contiguous last dim");
  return {a.data, a.size(0) == 1 ? 0 : a.stride(0), a.size(1) == 1 ? 0 : a.stride(1)};
}

// ------------------------------------------------------------------------------------- gather_rows, unmerge_rows

Output gathered(const Arg& x, const Arg& ids) {
  GatherRows s;
  s.dtype = dtype_of_arg(x);
  s.x = check_rows(x, kAny, kAny, kAny);
  const int64_t B = x.size(0);
  s.N = x.size(1);
  s.D = x.size(2);
  s.ids = check_index(ids, B, kAny, "M");
  Output out({B, s.ids.count, s.D}, s.dtype);
  s.out = out.data();
  s.past_cache = past_cache(out, s.D * size_of(s.dtype));
  const RowsKernels& kernels = rows_kernels();
  if (s.D > 0)
    parallel(B * s.ids.count, grain_for(s.D), [&](int64_t begin, int64_t end) { kernels.gather(s, begin, end); });
  return out;
}

void gather_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), ids = in.tensor("ids"), inverse = in.optional("inverse");
  if (inverse && x.dim == 3) check_index(inverse, x.size(0), x.size(1), "N");
  stack[0] = gathered(x, ids).release();
}

void unmerge_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), slot = in.tensor("slot");
  in.tensor("order");  // the derivative reads these two
  in.tensor("offsets");
  stack[0] = gathered(x, slot).release();
}

void segment_rows(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg x = in.tensor("x"), order = in.tensor("order"), offsets = in.tensor("offsets");
  in.tensor("slot");  // the derivative reads it
  SegmentRows s;
  s.mean = in.boolean();
  s.dtype = dtype_of_arg(x);
  s.x = check_rows(x, kAny, kAny, kAny);
  const int64_t B = x.size(0), N = x.size(1);
  s.D = x.size(2);
  s.order = check_index(order, B, kAny, "N");
  s.offsets = check_index(offsets, B, kAny, "S + 1");
  STD_TORCH_CHECK(s.offsets.count >= 1, "offsets must hold at least one number a sample");
  s.S = s.offsets.count - 1;
  check_values(order, 0, N);
  check_values(offsets, 0, s.order.count + 1);
  for (int64_t b = 0; b < offsets.size(0); ++b)
    for (int64_t i = 0; i < s.S; ++i)
      STD_TORCH_CHECK(s.offsets.of(b)[i] <= s.offsets.of(b)[i + 1], "offsets must be ascending; ", s.offsets.of(b)[i],
                      " comes before ", s.offsets.of(b)[i + 1]);
  Output out({B, s.S, s.D}, s.dtype);
  s.out = out.data();
  const RowsKernels& kernels = rows_kernels();
  if (s.D > 0)
    parallel(B * s.S, grain_for(2 * s.D), [&](int64_t begin, int64_t end) { kernels.segment(s, begin, end); });
  stack[0] = out.release();
}

// ----------------------------------------------------------------------------------------------- scatter_merge

void read_indices(MergeRows& m, const Arg& ids, const Arg& inverse, int64_t B) {
  m.ids = check_index(ids, B, kAny, "K");
  m.K = m.ids.count;
  m.inverse = check_index(inverse, B, kAny, "N");
  m.N = m.inverse.count;
  check_values(inverse, -1, m.K);
}

void read_gate(MergeRows& m, const Arg& gate, int64_t B) {
  if (!gate) return;
  m.gate = check_shared(gate, B, m.K, m.D);
  m.gate_dtype = check_operand(gate, m.dtype);
}

Merge read_mode(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 4, "mode is ", mode, "; allowed are 0 to 4");
  return static_cast<Merge>(mode);
}

void check_absent(const Arg& a, bool allowed, Merge mode) {
  STD_TORCH_CHECK(!a || allowed, a.name, " is not for mode ", static_cast<int>(mode));
}

void read_lam(MergeRows& m, double lam) {
  STD_TORCH_CHECK(lam - lam == 0.0, "lam is ", lam, "; it must be finite");
  m.lam = static_cast<float>(lam);
  m.rest = static_cast<float>(1.0 - lam);
}

void scatter_merge(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg full = in.optional("full"), rows = in.tensor("rows"), ids = in.tensor("ids"),
            inverse = in.tensor("inverse"), gate = in.optional("gate"), mask_token = in.optional("mask_token"),
            pos = in.optional("pos");
  const double lam = in.number();
  MergeRows m;
  m.mode = read_mode(in.integer());
  read_lam(m, lam);
  m.dtype = dtype_of_arg(rows);
  m.rows = check_rows(rows, kAny, kAny, kAny);
  const int64_t B = rows.size(0);
  m.D = rows.size(2);
  read_indices(m, ids, inverse, B);
  STD_TORCH_CHECK(rows.size(1) == m.K, "rows has ", rows.size(1), " rows a sample; ids has ", m.K);
  const bool fills = m.mode == Merge::mask_token || m.mode == Merge::zero;
  check_absent(full, !fills, m.mode);
  check_absent(gate, m.mode == Merge::add_gated, m.mode);
  check_absent(mask_token, m.mode == Merge::mask_token, m.mode);
  check_absent(pos, fills, m.mode);
  if (!fills) {
    STD_TORCH_CHECK(full, "full is needed in mode ", static_cast<int>(m.mode));
    m.full = check_rows(full, B, m.N, m.D);
    STD_TORCH_CHECK(dtype_of_arg(full) == m.dtype, "full must have the dtype of rows");
  }
  read_gate(m, gate, B);
  STD_TORCH_CHECK(mask_token || m.mode != Merge::mask_token, "mask_token is needed in mode 2");
  if (mask_token) {
    m.mask_dtype = check_operand(mask_token, m.dtype);
    check_dense(mask_token, mask_token.code, "floats", {m.D});
    m.mask_token = mask_token.data;
  }
  if (pos) {
    m.pos_dtype = check_operand(pos, m.dtype);
    m.pos = check_rows(pos, pos.dim > 0 && pos.size(0) == 1 ? 1 : B, m.N, m.D);
    if (pos.size(0) == 1) m.pos.stride_b = 0;
  }
  Output out({B, m.N, m.D}, m.dtype);
  m.out = out.data();
  m.past_cache = past_cache(out, m.D * size_of(m.dtype));
  const RowsKernels& kernels = rows_kernels();
  if (m.D > 0) parallel(B * m.N, grain_for(m.D), [&](int64_t begin, int64_t end) { kernels.merge(m, begin, end); });
  stack[0] = out.release();
}

constexpr int64_t kChunk = 64;  // rows that one partial sum takes

// out (samples, D): the sum over `count` items of each sample, or of all of them.
template <class Kernel>
void sum_rows(MergeRows& m, int64_t B, int64_t count, bool all, const Output& out, const Kernel& kernel) {
  m.chunk = kChunk;
  m.chunks = (count + kChunk - 1) / kChunk;
  Output partial({B, m.chunks, m.D}, Dtype::f32);
  m.partial = partial.floats();
  parallel(B * m.chunks, 1, [&](int64_t begin, int64_t end) { kernel(m, begin, end); });
  if (count == 0 || B == 0) {
    std::memset(out.data(), 0, static_cast<size_t>((all ? 1 : B) * m.D) * sizeof(float));
    return;
  }
  AdalnReduce r;
  r.partial = partial.floats();
  r.out = out.floats();
  r.B = B;
  r.N = r.group = count;
  r.D = m.D;
  r.chunk = kChunk;
  r.per_chunk = 1;
  r.per_sample = m.chunks;
  r.out_b = all ? 1 : B;
  adaln_kernels().reduce(r, 0, r.out_b);
}

void scatter_merge_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dout = in.tensor("dout"), rows = in.optional("rows"), ids = in.tensor("ids"),
            inverse = in.tensor("inverse"), gate = in.optional("gate");
  const double lam = in.number();
  MergeRows m;
  m.mode = read_mode(in.integer());
  const int64_t needs = in.integer();
  read_lam(m, lam);
  m.dtype = dtype_of_arg(dout);
  m.full = check_rows(dout, kAny, kAny, kAny);
  const int64_t B = dout.size(0);
  m.D = dout.size(2);
  read_indices(m, ids, inverse, B);
  STD_TORCH_CHECK(dout.size(1) == m.N, "dout has ", dout.size(1), " rows a sample; inverse has ", m.N);
  check_absent(gate, m.mode == Merge::add_gated, m.mode);
  read_gate(m, gate, B);
  STD_TORCH_CHECK(needs >= 0 && needs < 16, "needs is ", needs, "; allowed are 0 to 15");
  const bool want_full = needs & kNeedFull, want_rows = needs & kNeedRows, want_gate = needs & kNeedMergeGate,
             want_mask = needs & kNeedMask;
  STD_TORCH_CHECK(!want_full || m.mode == Merge::replace || m.mode == Merge::blend, "needs asks for dfull, which mode ",
                  static_cast<int>(m.mode), " does not have or which is dout itself");
  STD_TORCH_CHECK(!want_gate || (gate && rows), "needs asks for dgate, which takes gate and rows");
  STD_TORCH_CHECK(!want_mask || m.mode == Merge::mask_token, "needs asks for dmask, which mode 2 alone has");
  if (rows) {
    m.rows = check_rows(rows, B, m.K, m.D);
    STD_TORCH_CHECK(dtype_of_arg(rows) == m.dtype, "rows must have the dtype of dout");
  }
  const bool one_gate = gate && gate.size(1) == 1;
  const int64_t gate_rows = one_gate ? 1 : m.K;
  Output dfull = want_full ? Output({B, m.N, m.D}, m.dtype) : nothing(m.dtype),
         drows = want_rows ? Output({B, m.K, m.D}, m.dtype) : nothing(m.dtype),
         dgate = want_gate ? Output({B, gate_rows, m.D}, Dtype::f32) : nothing(Dtype::f32),
         dmask = Output({want_mask ? m.D : 0}, Dtype::f32);
  const RowsKernels& kernels = rows_kernels();
  const int64_t row_bytes = m.D * size_of(m.dtype);
  const auto fill = [&](const Output& out, int64_t count, bool past, auto kernel) {
    m.out = out.data();
    m.past_cache = past && past_cache(out, row_bytes);
    if (m.D > 0) parallel(B * count, grain_for(m.D), [&](int64_t begin, int64_t end) { kernel(m, begin, end); });
  };
  if (want_full) fill(dfull, m.N, true, kernels.merge_dfull);
  if (want_rows) fill(drows, m.K, true, kernels.merge_drows);
  if (want_gate && one_gate) {
    sum_rows(m, B, m.K, false, dgate, kernels.merge_dgate_sum);
  } else if (want_gate) {
    fill(dgate, m.K, false, kernels.merge_dgate);
  }
  if (want_mask) sum_rows(m, B, m.N, true, dmask, kernels.merge_dmask_sum);
  stack[0] = dfull.release();
  stack[1] = drows.release();
  stack[2] = dgate.release();
  stack[3] = dmask.release();
}

// --------------------------------------------------------------------------------------------- gather_modulate

void modulated(StableIValue* stack, bool bare) {
  Inputs in(stack, bare);
  const Arg x = in.tensor("x"), ids = in.tensor("ids"), inverse = in.tensor("inverse"), scale = in.optional("scale"),
            shift = in.optional("shift"), weight = in.rare("weight"), bias = in.rare("bias");
  const Numbers given = bare ? unpacked(in.integer()) : Numbers{in.number(), 0.0, in.number(), in.integer()};
  const int64_t flags = given.flags;
  GatherModulate g;
  AdalnForward& f = g.norm;
  Checked check(f, x);
  check.numbers({given.eps, 0.0, given.offset, flags & ~int64_t{kNoRows}});
  f.x = check.activation(x);
  for (const Arg* a : {&scale, &shift}) {
    STD_TORCH_CHECK(!*a || a->dim == 2 || (a->dim == 3 && (a->size(1) == 1 || a->size(1) == f.N)), a->name,
                    " must be (B|1, D), (B|1, 1, D) or (B|1, N, D)");
  }
  f.scale = check.modulation(scale);
  f.shift = check.modulation(shift);
  f.weight = check.affine(weight);
  f.bias = check.affine(bias);
  g.ids = check_index(ids, f.B, kAny, "K");
  check_index(inverse, f.B, f.N, "N");  // the derivative reads it
  const int64_t K = g.ids.count, row_bytes = f.D * size_of(f.dtype);
  const bool want_rows = !(flags & kNoRows);
  Output rows = want_rows ? Output({f.B, K, f.D}, f.dtype) : nothing(f.dtype), y({f.B, K, f.D}, f.dtype);
  f.r = want_rows ? rows.data() : nullptr;
  f.y = y.data();
  f.past_cache = row_bytes % kLine == 0 && y.bytes() + rows.bytes() >= kPastCacheFrom;
  const RowsKernels& kernels = rows_kernels();
  parallel(f.B * K, grain_for(f.D), [&](int64_t begin, int64_t end) { kernels.gather_modulate(g, begin, end); });
  stack[0] = rows.release();
  stack[1] = y.release();
}

void gather_modulate(StableIValue* stack, uint64_t, uint64_t) { modulated(stack, false); }
void gather_modulate_bare(StableIValue* stack, uint64_t, uint64_t) { modulated(stack, true); }

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("gather_rows", gather_rows);
  m.impl("unmerge_rows", unmerge_rows);
  m.impl("segment_rows", segment_rows);
  m.impl("scatter_merge", scatter_merge);
  m.impl("scatter_merge_backward", scatter_merge_backward);
  m.impl("gather_modulate", gather_modulate);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) {
  maskaccel::implement(m);
  m.impl("gather_modulate_bare", maskaccel::gather_modulate_bare);
}
