// Reads and checks the arguments of the attention ops for the CUDA kernels.
#pragma once

#include "../common/cuda_binding.h"
#include "cuda_args.h"

namespace maskaccel::cuda {

constexpr int64_t kMostIndex = (int64_t{1} << 30) - 1;  // of tokens, so that the end of a tile is an int too

/// Index, count and order of lists of tiles, as the schema has them.
struct ListInputs {
  Arg index, count, order;
  ListInputs(Inputs& in, bool transposed)
      : index(transposed ? in.rare("index_t") : in.optional("index")),
        count(transposed ? in.rare("count_t") : in.optional("count")),
        order(transposed ? in.rare("order_t") : in.optional("order")) {}
};

struct AttentionReader {
  const Call& call;
  AttentionArgs a;

  explicit AttentionReader(const Call& call_) : call(call_) {}

  void qkv(const Arg& q, const Arg& k, const Arg& v) {
    a.dtype = dtype_of_arg(q);
    call.check(a.dtype != Dtype::f32, q.name, " is float32; the CUDA attention kernels take bfloat16 or float16");
    for (const Arg* t : {&q, &k, &v}) {
      call.check(t->dim == 4, t->name, " must be (B, S, H, D), got ", shape_text(*t));
      for (int i = 0; i < 3; ++i) call.check(t->size(i) <= kMostIndex, t->name, " is out of range: ", shape_text(*t));
    }
    a.batch = static_cast<int>(q.size(0)), a.queries = static_cast<int>(q.size(1));
    a.heads = static_cast<int>(q.size(2)), a.dim = static_cast<int>(q.size(3));
    a.keys = static_cast<int>(k.size(1)), a.key_heads = static_cast<int>(k.size(2));
    call.check(q.size(3) % 8 == 0 && q.size(3) >= 16 && q.size(3) <= 256, q.name, " has head dim ", q.size(3),
               "; allowed are multiples of 8 from 16 to 256");
    call.check(a.key_heads > 0 ? a.heads % a.key_heads == 0 : a.heads == 0, k.name, " has ", a.key_heads,
               " heads, which must divide the ", a.heads, " of ", q.name);
    a.q = rows(q, a.queries, a.heads);
    a.k = rows(k, a.keys, a.key_heads);
    a.v = rows(v, a.keys, a.key_heads);
  }

  /// A (B, S, H, D) tensor of q's dtype, or fp32 where `wide` allows it.
  Rows rows(const Arg& t, int64_t tokens, int64_t heads, bool wide = false) const {
    if (!t) return {};
    call.same_device(t);
    call.check(t.dim == 4 && t.size(0) == a.batch && t.size(1) == tokens && t.size(2) == heads && t.size(3) == a.dim,
               t.name, " must be (", a.batch, ", ", tokens, ", ", heads, ", ", a.dim, "), got ", shape_text(t));
    const Dtype dtype = dtype_of_arg(t);
    call.check(dtype == a.dtype || (wide && dtype == Dtype::f32), t.name, " must have the dtype of q",
               wide ? " or float32" : "");
    call.check(t.dense_last(), t.name, " must have a contiguous last dim, got stride ", t.stride(-1));
    // Copies of rows past the last are switched off, but their addresses must lie on 16 bytes too.
    const int64_t step = t.size(1) > 1 ? t.stride(1) : 0;
    return Rows{t.data, t.stride(0), step, t.stride(2), rows_aligned(t), dtype == Dtype::f32};
  }

  void tiles(int64_t bm, int64_t bn) {
    call.check(bm >= 16 && bm % 16 == 0 && bm <= kMostIndex, "bm is ", bm, "; allowed are multiples of 16");
    call.check(bn >= 32 && bn % 32 == 0 && bn <= kMostIndex, "bn is ", bn, "; allowed are multiples of 32");
    a.bm = static_cast<int>(bm), a.bn = static_cast<int>(bn);
    call.check(int64_t{a.batch} * a.heads * (a.queries / 16 + a.keys / 16 + 2) < int64_t{1} << 31,
               "q and k have too many tiles");
    a.tile_rows = static_cast<int>(ceil_div(a.queries, bm)), a.tile_columns = static_cast<int>(ceil_div(a.keys, bn));
  }

  /// After `tiles`. The lists over `lines` lines of tiles.
  TileLists lists(const ListInputs& in, int64_t lines) const {
    const Arg &index = in.index, &count = in.count, &order = in.order;
    call.check(bool(index) == bool(count) && bool(index) == bool(order), index.name, ", ", count.name, " and ",
               order.name, " must be given together or not at all");
    if (!index) return {};
    for (const Arg* t : {&index, &count, &order}) integers(*t);
    call.check(index.dim == 4 && (index.size(0) == 1 || index.size(0) == a.batch) &&
                   (index.size(1) == 1 || index.size(1) == a.heads) && index.size(2) == lines,
               index.name, " must be (1|", a.batch, ", 1|", a.heads, ", ", lines, ", L), got ", shape_text(index));
    call.check(count.dim == 4 && count.size(0) == index.size(0) && count.size(1) == index.size(1) &&
                   count.size(2) == lines && count.size(3) == 2,
               count.name, " must be (", index.size(0), ", ", index.size(1), ", ", lines, ", 2), got ",
               shape_text(count));
    call.check(order.dim == 1 && order.size(0) == index.size(0) * index.size(1) * lines, order.name, " must be (",
               index.size(0) * index.size(1) * lines, ",), got ", shape_text(order));
    return TileLists{ints(index),
                     ints(count),
                     ints(order),
                     index.size(3),
                     static_cast<int>(index.size(0)),
                     static_cast<int>(index.size(1))};
  }

  void elements(const Arg& pattern_of, const Arg& patterns) {
    call.check(bool(pattern_of) == bool(patterns), "pattern_of and patterns must be given together or not at all");
    if (!pattern_of) return;
    integers(pattern_of), integers(patterns);
    call.check(pattern_of.dim == 4 && (pattern_of.size(0) == 1 || pattern_of.size(0) == a.batch) &&
                   (pattern_of.size(1) == 1 || pattern_of.size(1) == a.heads) && pattern_of.size(2) == a.tile_rows &&
                   pattern_of.size(3) == a.tile_columns,
               pattern_of.name, " must be (1|", a.batch, ", 1|", a.heads, ", ", a.tile_rows, ", ", a.tile_columns,
               "), got ", shape_text(pattern_of));
    call.check(patterns.dim == 3 && patterns.size(1) == a.bm && patterns.size(2) == a.bn / 32, patterns.name,
               " must be (P, ", a.bm, ", ", a.bn / 32, "), got ", shape_text(patterns));
    a.pattern_of = ints(pattern_of);
    a.patterns = ints(patterns);
    const int64_t one = int64_t{a.tile_rows} * a.tile_columns;
    a.pattern_stride_h = pattern_of.size(1) == 1 ? 0 : one;
    a.pattern_stride_b = pattern_of.size(0) == 1 ? 0 : one * pattern_of.size(1);
  }

  void scores(const Arg& bias, const Arg& table, const Arg& relpos_q, const Arg& relpos_k) {
    if (bias) {
      a.bias = broadcast(bias, 4, {a.batch, a.heads, a.queries, a.keys});
      call.check(a.bias.wide || dtype_of_arg(bias) == a.dtype, bias.name, " must have the dtype of q or float32");
    }
    call.check(bool(table) == bool(relpos_q) && bool(table) == bool(relpos_k),
               "relpos_table, relpos_q and relpos_k must be given together or not at all");
    if (!table) return;
    call.same_device(table);
    call.check(table.code == codes().f32 && table.dim == 2 && (table.size(0) == 1 || table.size(0) == a.heads) &&
                   table.contiguous(),
               table.name, " must be contiguous float32 (1|", a.heads, ", R), got ", shape_text(table));
    a.relpos_table = static_cast<const float*>(table.data);
    a.relpos_stride_h = table.size(0) == 1 ? 0 : table.size(1);
    a.relpos_q = positions(relpos_q, a.queries, a.relpos_stride_q);
    a.relpos_k = positions(relpos_k, a.keys, a.relpos_stride_k);
  }

  /// Statistics of a row: fp32 (B, H, Sq).
  const float* statistics(const Arg& t) const {
    if (!t) return nullptr;
    call.same_device(t);
    call.check(t.code == codes().f32 && t.dim == 3 && t.size(0) == a.batch && t.size(1) == a.heads &&
                   t.size(2) == a.queries && t.contiguous(),
               t.name, " must be contiguous float32 (", a.batch, ", ", a.heads, ", ", a.queries, "), got ",
               shape_text(t));
    return static_cast<const float*>(t.data);
  }

  void epilogue(const Arg& out_scale, const Arg& out_add) {
    if (out_scale) {
      a.out_scale = broadcast(out_scale, 3, {a.batch, a.heads, a.queries});
      call.check(a.out_scale.wide, out_scale.name, " must be float32");
    }
    a.out_add = rows(out_add, a.queries, a.heads, true);
  }

 private:
  static const int* ints(const Arg& t) { return static_cast<const int*>(t.data); }
  void integers(const Arg& t) const {
    call.same_device(t);
    call.check(t.code == codes().i32 && t.contiguous(), t.name, " must be contiguous int32");
  }
  const int* positions(const Arg& t, int64_t tokens, int64_t& stride) const {
    integers(t);
    call.check(t.dim == 2 && (t.size(0) == 1 || t.size(0) == a.batch) && t.size(1) == tokens, t.name, " must be (1|",
               a.batch, ", ", tokens, "), got ", shape_text(t));
    stride = t.size(0) == 1 ? 0 : tokens;
    return ints(t);
  }
  Broadcast broadcast(const Arg& t, int dims, std::initializer_list<int64_t> full) const {
    call.same_device(t);
    call.check(t.dim == dims, t.name, " must have ", dims, " dims, got ", shape_text(t));
    int64_t strides[4] = {0, 0, 0, 0};
    for (int i = 0; i < dims; ++i) {
      call.check(t.size(i) == 1 || t.size(i) == full.begin()[i], t.name, " has ", t.size(i), " elements in dim ", i,
                 "; allowed are 1 and ", full.begin()[i]);
      strides[i] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    return Broadcast{t.data, strides[0], strides[1], strides[2], strides[3], dtype_of_arg(t) == Dtype::f32};
  }
};

/// What decides and changes single scores: patterns, bias, relative positions.
struct ScoreInputs {
  Arg pattern_of, patterns, bias, table, relpos_q, relpos_k;
  explicit ScoreInputs(Inputs& in)
      : pattern_of(in.optional("pattern_of")),
        patterns(in.optional("patterns")),
        bias(in.rare("bias")),
        table(in.rare("relpos_table")),
        relpos_q(in.rare("relpos_q")),
        relpos_k(in.rare("relpos_k")) {}
  void read(AttentionReader& r) const {
    r.elements(pattern_of, patterns);
    r.scores(bias, table, relpos_q, relpos_k);
  }
};

}  // namespace maskaccel::cuda
