// Arguments that the ops of tiled attention share, checked; the contract is in maskaccel/ops/attention/schema.py.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../common/stable.h"
#include "cpu_problem.h"
#include "packed.h"

namespace maskaccel {

struct ListArgs {
  Arg index, count, order;
};

// In the order of the schemas; an op without one of these groups leaves it absent.
struct AttentionArgs {
  Arg q, k, v;
  ListArgs lists, lists_t;
  Arg pattern_of, patterns;
  Arg bias, relpos_table, relpos_q, relpos_k;
  int64_t bm = 0, bn = 0;
  double scale = 0;

  void read_lists(Inputs& in) { lists = {in.optional("index"), in.optional("count"), in.optional("order")}; }
  void read_lists_t(Inputs& in) { lists_t = {in.rare("index_t"), in.rare("count_t"), in.rare("order_t")}; }
  void read_elements_and_scores(Inputs& in) {
    pattern_of = in.optional("pattern_of");
    patterns = in.optional("patterns");
    bias = in.rare("bias");
    relpos_table = in.rare("relpos_table");
    relpos_q = in.rare("relpos_q");
    relpos_k = in.rare("relpos_k");
  }
  void read_packed(Inputs& in) {
    const PackedTiles packed(in.integer());
    bm = packed.bm;
    bn = packed.bn;
    scale = packed.scale;
  }
  void read_tiles_and_scale(Inputs& in) {
    bm = in.integer();
    bn = in.integer();
    scale = in.number();
  }
};

inline int64_t tiles_of(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

inline void check_sizes(const Arg& a, std::initializer_list<int64_t> sizes) {
  bool same = a.dim == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) same = same && a.size(i++) == size;
  if (same) return;
  std::string want, got;
  for (const int64_t size : sizes) want += (want.empty() ? "" : ", ") + std::to_string(size);
  for (i = 0; i < a.dim; ++i) got += (i == 0 ? "" : ", ") + std::to_string(a.size(i));
  STD_TORCH_CHECK(false, a.name, " must be (", want, "), got (", got, ")");
}

inline void check_int32(const Arg& a) {
  STD_TORCH_CHECK(a.code == codes().i32 && a.contiguous(), a.name, " must be contiguous int32");
}

inline void check_float(const Arg& a) {
  STD_TORCH_CHECK(a.code == codes().f32 && a.contiguous(), a.name, " must be contiguous float32");
}

inline void check_full_or_one(const Arg& a, int64_t i, int64_t full) {
  STD_TORCH_CHECK(a.size(i) == 1 || a.size(i) == full, a.name, " has size ", a.size(i), " in dim ", i,
                  "; allowed are 1 and ", full);
}

// A (B, S, H, D) operand of q's dtype.
inline HeadRows head_rows(const Arg& a, int32_t code, int64_t B, int64_t S, int64_t H, int64_t D) {
  check_sizes(a, {B, S, H, D});
  STD_TORCH_CHECK(a.code == code, a.name, " must have the dtype of q");
  STD_TORCH_CHECK(a.dense_last(), a.name, " must have a contiguous last dim");
  return {a.data, a.stride(0), a.stride(1), a.stride(2)};
}

// `rows` tiles along the lists' own side, `others` along the other one. Every id that a kernel will read is checked.
inline TileLists tile_lists(const ListArgs& a, int64_t B, int64_t H, int64_t rows, int64_t others) {
  TileLists t;
  t.rows = rows;
  t.others = others;
  STD_TORCH_CHECK(bool(a.index) == bool(a.count) && bool(a.index) == bool(a.order), a.index.name, ", ", a.count.name,
                  " and ", a.order.name, " must be given together");
  if (!a.index) return t;
  check_int32(a.index);
  check_int32(a.count);
  check_int32(a.order);
  STD_TORCH_CHECK(a.index.dim == 4, a.index.name, " must be 4-D, got ", a.index.dim, " dimensions");
  check_full_or_one(a.index, 0, B);
  check_full_or_one(a.index, 1, H);
  const int64_t Bm = a.index.size(0), Hm = a.index.size(1);
  t.length = a.index.size(3);
  check_sizes(a.index, {Bm, Hm, rows, t.length});
  check_sizes(a.count, {Bm, Hm, rows, 2});
  check_sizes(a.order, {Bm * Hm * rows});
  t.index = static_cast<const int32_t*>(a.index.data);
  t.count = static_cast<const int32_t*>(a.count.data);
  t.order = static_cast<const int32_t*>(a.order.data);
  t.step_b = Bm == 1 ? 0 : Hm * rows;
  t.step_h = Hm == 1 ? 0 : rows;
  check_indices(a.order.name, t.order, Bm * Hm * rows, Bm * Hm * rows);
  std::vector<bool> seen(static_cast<size_t>(Bm * Hm * rows));
  for (int64_t r = 0; r < Bm * Hm * rows; ++r) {
    const auto id = static_cast<size_t>(t.order[r]);
    STD_TORCH_CHECK(!seen[id], a.order.name, " holds ", t.order[r], " twice; it must hold every row of tiles once");
    seen[id] = true;
  }
  for (int64_t r = 0; r < Bm * Hm * rows; ++r) {
    const int64_t partial = t.count[2 * r], full = t.count[2 * r + 1];
    STD_TORCH_CHECK(partial >= 0 && full >= 0 && partial + full <= t.length, a.count.name, " counts ", partial, " and ",
                    full, " tiles in row ", r, "; ", a.index.name, " holds ", t.length);
    check_indices(a.index.name, t.index + r * t.length, partial + full, others);
  }
  return t;
}

inline TileElements tile_elements(const AttentionArgs& a, const AttentionProblem& s) {
  TileElements e;
  STD_TORCH_CHECK(bool(a.pattern_of) == bool(a.patterns), "pattern_of and patterns must be given together");
  if (!a.pattern_of) return e;
  check_int32(a.pattern_of);
  check_int32(a.patterns);
  STD_TORCH_CHECK(a.pattern_of.dim == 4, "pattern_of must be 4-D, got ", a.pattern_of.dim, " dimensions");
  STD_TORCH_CHECK(a.patterns.dim == 3, "patterns must be 3-D, got ", a.patterns.dim, " dimensions");
  check_full_or_one(a.pattern_of, 0, s.B);
  check_full_or_one(a.pattern_of, 1, s.H);
  const int64_t Bp = a.pattern_of.size(0), Hp = a.pattern_of.size(1);
  check_sizes(a.pattern_of, {Bp, Hp, s.Mq, s.Nk});
  check_sizes(a.patterns, {a.patterns.size(0), s.bm, s.bn / 32});
  e.pattern_of = static_cast<const int32_t*>(a.pattern_of.data);
  e.patterns = static_cast<const int32_t*>(a.patterns.data);
  e.tiles = s.Nk;
  e.step_b = Bp == 1 ? 0 : Hp * s.Mq * s.Nk;
  e.step_h = Hp == 1 ? 0 : s.Mq * s.Nk;
  e.bm = s.bm;
  e.words = s.bn / 32;
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < a.pattern_of.numel(); ++i) {
    low = e.pattern_of[i] < low ? e.pattern_of[i] : low;
    high = e.pattern_of[i] > high ? e.pattern_of[i] : high;
  }
  STD_TORCH_CHECK(low >= -1 && high < a.patterns.size(0), "pattern_of holds values from ", low, " to ", high,
                  "; allowed are -1 to ", a.patterns.size(0) - 1);
  return e;
}

inline ScoreTerms score_terms(const AttentionArgs& a, const AttentionProblem& s) {
  ScoreTerms t;
  if (a.bias) {
    STD_TORCH_CHECK(a.bias.dim == 4, "bias must be 4-D, got ", a.bias.dim, " dimensions");
    STD_TORCH_CHECK(a.bias.code == codes().f32 || a.bias.code == a.q.code, "bias must be float32 or have the dtype of q");
    const int64_t full[4] = {s.B, s.H, s.Sq, s.Sk};
    int64_t step[4];
    for (int i = 0; i < 4; ++i) {
      check_full_or_one(a.bias, i, full[i]);
      step[i] = a.bias.size(i) == 1 ? 0 : a.bias.stride(i);
    }
    t.bias = a.bias.data;
    t.bias_dtype = dtype_of_arg(a.bias);
    t.bias_b = step[0];
    t.bias_h = step[1];
    t.bias_i = step[2];
    t.bias_j = step[3];
  }
  STD_TORCH_CHECK(bool(a.relpos_table) == bool(a.relpos_q) && bool(a.relpos_table) == bool(a.relpos_k),
                  "relpos_table, relpos_q and relpos_k must be given together");
  if (!a.relpos_table) return t;
  check_float(a.relpos_table);
  check_int32(a.relpos_q);
  check_int32(a.relpos_k);
  STD_TORCH_CHECK(a.relpos_table.dim == 2 && a.relpos_q.dim == 2 && a.relpos_k.dim == 2,
                  "relpos_table, relpos_q and relpos_k must be 2-D");
  check_full_or_one(a.relpos_table, 0, s.H);
  check_full_or_one(a.relpos_q, 0, s.B);
  check_full_or_one(a.relpos_k, 0, s.B);
  check_sizes(a.relpos_q, {a.relpos_q.size(0), s.Sq});
  check_sizes(a.relpos_k, {a.relpos_k.size(0), s.Sk});
  const int64_t R = a.relpos_table.size(1);
  t.table = static_cast<const float*>(a.relpos_table.data);
  t.relpos_q = static_cast<const int32_t*>(a.relpos_q.data);
  t.relpos_k = static_cast<const int32_t*>(a.relpos_k.data);
  t.table_h = a.relpos_table.size(0) == 1 ? 0 : R;
  t.relpos_q_b = a.relpos_q.size(0) == 1 ? 0 : s.Sq;
  t.relpos_k_b = a.relpos_k.size(0) == 1 ? 0 : s.Sk;
  if (s.Sq == 0 || s.Sk == 0) return t;
  for (int64_t b = 0; b < s.B; ++b) {
    const int32_t *const q = t.relpos_q + b * t.relpos_q_b, *const k = t.relpos_k + b * t.relpos_k_b;
    const auto of_q = std::minmax_element(q, q + s.Sq), of_k = std::minmax_element(k, k + s.Sk);
    const int64_t least = int64_t{*of_q.first} - *of_k.second, most = int64_t{*of_q.second} - *of_k.first;
    STD_TORCH_CHECK(least >= 0 && most < R, "relpos_q - relpos_k goes from ", least, " to ", most, " in sample ", b,
                    "; allowed are 0 to ", R - 1);
    if (t.relpos_q_b == 0 && t.relpos_k_b == 0) break;
  }
  return t;
}

// Without v (an op that needs the scores only) the problem's v stays empty.
inline AttentionProblem check_attention(const AttentionArgs& a) {
  AttentionProblem s;
  STD_TORCH_CHECK(a.q.dim == 4, "q must be (B, Sq, H, D), got ", a.q.dim, " dimensions");
  STD_TORCH_CHECK(a.k.dim == 4, "k must be (B, Sk, Hk, D), got ", a.k.dim, " dimensions");
  s.dtype = dtype_of_arg(a.q);
  s.B = a.q.size(0);
  s.Sq = a.q.size(1);
  s.H = a.q.size(2);
  s.D = a.q.size(3);
  s.Sk = a.k.size(1);
  s.Hk = a.k.size(2);
  STD_TORCH_CHECK(s.D % 8 == 0 && s.D >= 16 && s.D <= 256, "q has head dim ", s.D,
                  "; allowed are multiples of 8 from 16 to 256");
  STD_TORCH_CHECK(s.Hk > 0 && s.H % s.Hk == 0, "q has ", s.H, " heads; they must be a multiple of the ", s.Hk,
                  " heads of k");
  s.q = head_rows(a.q, a.q.code, s.B, s.Sq, s.H, s.D);
  s.k = head_rows(a.k, a.q.code, s.B, s.Sk, s.Hk, s.D);
  if (a.v) s.v = head_rows(a.v, a.q.code, s.B, s.Sk, s.Hk, s.D);
  STD_TORCH_CHECK(a.bm >= 16 && a.bm % 16 == 0, "bm is ", a.bm, "; allowed are positive multiples of 16");
  STD_TORCH_CHECK(a.bn >= 32 && a.bn % 32 == 0, "bn is ", a.bn, "; allowed are positive multiples of 32");
  s.bm = a.bm;
  s.bn = a.bn;
  s.scale = static_cast<float>(a.scale);
  s.Mq = tiles_of(s.Sq, s.bm);
  s.Nk = tiles_of(s.Sk, s.bn);
  s.lists = tile_lists(a.lists, s.B, s.H, s.Mq, s.Nk);
  s.lists_t = tile_lists(a.lists_t, s.B, s.H, s.Nk, s.Mq);
  STD_TORCH_CHECK(!a.pattern_of || a.lists.index || a.lists_t.index, "pattern_of needs the lists of a mask");
  s.elements = tile_elements(a, s);
  s.terms = score_terms(a, s);
  return s;
}

}  // namespace maskaccel
