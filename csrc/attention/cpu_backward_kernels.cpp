// Gradients of tiled attention. Compiled once per instruction set; see common/isa.h and cpu_backward.h.
#include <cmath>

#include "cpu_backward_items.h"
#include "cpu_gemm.h"
#include "cpu_scores.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

constexpr int64_t kPad = 16;  // words between rows of blocks: rows of a power of two would share few cache sets
constexpr int64_t kMostKeys = 128;

// Hands out the thread's scratch memory in lines.
class Carver {
 public:
  explicit Carver(float* at) : at_(at) {}
  float* take(int64_t words) {
    float* const mine = at_;
    at_ += (words + 15) / 16 * 16;
    return mine;
  }
  // What `take` needs at most.
  static int64_t size(int64_t words) { return (words + 15) / 16 * 16; }

 private:
  float* at_;
};

template <class T>
MASKACCEL_INLINE const T* element(const HeadRows& x, int64_t b, int64_t s, int64_t h) {
  return static_cast<const T*>(x.data) + x.offset(b, s, h);
}

// Operands of `rows` tokens of a head from `first` on, as left and as right ones, padded with zeros to `padded` rows.
template <class T>
void pack_tokens(const HeadRows& x, const AttentionPass& s, int64_t b, int64_t h, int64_t first, int64_t rows,
                 int64_t padded, float* left, float* right) {
  using O = OperandOf<T>;
  constexpr int64_t depth = O::kDepth;
  const T* const from = element<T>(x, b, first, h);
  const int64_t words = s.row_words(depth), stacked = (rows + depth - 1) / depth;
  pack_rows<O>(from, x.stride_s, rows, s.D, left, words);
  fill_zero(left, rows * words, padded * words);
  if (right == left) return;
  pack_stacked<O>(from, x.stride_s, rows, s.D, right, s.padded_dim);
  fill_zero(right, stacked * s.padded_dim, padded / depth * s.padded_dim);
}

struct Rows {
  int64_t b, h, first, rows, padded, at;  // at: row of the workspace
};
inline Rows rows_of(const AttentionPass& s, const Item& item) {
  Rows r = {item.b, item.h, item.first, 0, 0, s.slot_row(item.b, item.h) + item.first};
  r.rows = s.Sq - r.first < AttentionBlocks::kTile ? s.Sq - r.first : AttentionBlocks::kTile;
  r.padded = even(r.rows);
  return r;
}

template <class T>
void pack_queries(const AttentionPass& s, const Rows& r) {
  constexpr int64_t depth = OperandOf<T>::kDepth;
  pack_tokens<T>(s.q, s, r.b, r.h, r.first, r.rows, r.padded, s.q_rows + r.at * s.row_words(depth),
                 s.q_stacked + r.at / depth * s.padded_dim);
  const float* const lse = s.lse + (r.b * s.H + r.h) * s.Sq + r.first;
  for (int64_t i = 0; i < r.padded; ++i) {
    // What is that far below stands for -inf: a bias of the lowest number for all keys.
    const bool some = i < r.rows && !(lse[i] < kFarBelow / 2);
    const double exponent = some ? kLog2e * static_cast<double>(lse[i]) : 0.0, shift = std::nearbyint(exponent);
    s.minus_shift[r.at + i] = some ? static_cast<float>(-shift) : kFarBelow;
    s.share[r.at + i] = some ? static_cast<float>(std::exp2(shift - exponent)) : 0.0f;
  }
}

template <class T>
void prepare_rows(const AttentionBackward& s, const Item& item) {
  constexpr int64_t depth = OperandOf<T>::kDepth;
  const Rows r = rows_of(s, item);
  pack_queries<T>(s, r);
  pack_tokens<T>(s.dout, s, r.b, r.h, r.first, r.rows, r.padded, s.dout_rows + r.at * s.row_words(depth),
                 s.dout_stacked + r.at / depth * s.padded_dim);
  for (int64_t i = 0; i < r.padded; ++i) {
    // A row that keeps nothing has no gradient, whatever stands in out and dlse.
    float sum = 0.0f;
    if (s.share[r.at + i] != 0.0f) {
      const T *const a = element<T>(s.dout, r.b, r.first + i, r.h), *const o = element<T>(s.out, r.b, r.first + i, r.h);
      V total = set1(0.0f);
      each_vector(
          s.D, [&](int64_t d, auto part) MASKACCEL_HOT { total = fma(load(a + d, part), load(o + d, part), total); });
      sum = hsum(total);
      if (s.dlse != nullptr) sum -= s.dlse[(r.b * s.H + r.h) * s.Sq + r.first + i];
    }
    s.delta[r.at + i] = sum;
  }
  if ((s.needs & kNeedQ) == 0) return;
  for (int64_t i = r.first; i < r.first + r.rows; ++i)
    if (s.turns_of(r.b, r.h, i / s.bm) == 0)
      std::memset(static_cast<T*>(s.dq) + ((r.b * s.Sq + i) * s.H + r.h) * s.D, 0, s.D * sizeof(T));
}

// The operands that an item forms of its keys, and its sums.
struct KeyBlock {
  float *k_across, *v_across;  // [D / depth][ld]: right operands, summed over the head dim
  float* k_stacked;            // [keys / depth][padded_dim]: right operand, summed over the keys
  float *dk, *dv;              // [keys][padded_dim]
  float *scores, *dscores;     // [queries][ld]; then probabilities and their gradients, stacked
  float* dscores_rows;         // [queries][ld]: left operand, summed over the keys; dscores where depth is 1
  float* added;                // [depth][kMostKeys]
  float* sums;                 // [3][kMostKeys], of the column sums
  int64_t ld;
};

template <class T>
KeyBlock carve(const AttentionPass& s, bool gradients) {
  using O = OperandOf<T>;
  KeyBlock k{};
  k.ld = s.blocks.keys + kPad;
  const int64_t across = s.D / O::kDepth * k.ld, sums = s.blocks.keys * s.padded_dim, block = s.blocks.queries * k.ld;
  const int64_t stacked = sums / O::kDepth;
  const int64_t all = gradients ? 2 * Carver::size(across) + Carver::size(stacked) + 2 * Carver::size(sums) +
                                      3 * Carver::size(block) + Carver::size(2 * kMostKeys)
                                : Carver::size(across) + Carver::size(block) + Carver::size(4 * kMostKeys);
  Carver carver(static_cast<float*>(scratch(static_cast<size_t>(all) * sizeof(float))));
  k.k_across = carver.take(across);
  k.scores = carver.take(block);
  if (!gradients) {
    k.added = carver.take(kMostKeys);
    k.sums = carver.take(3 * kMostKeys);
    return k;
  }
  k.added = carver.take(2 * kMostKeys);
  k.v_across = carver.take(across);
  k.k_stacked = carver.take(stacked);
  k.dk = carver.take(sums);
  k.dv = carver.take(sums);
  k.dscores = carver.take(block);
  k.dscores_rows = O::kDepth == 1 ? k.dscores : carver.take(block);
  return k;
}

inline ScoreRow score_row(const AttentionPass& s, int64_t row, const int32_t* kept) {
  return {Split(kLog2e * static_cast<double>(s.scale)), s.minus_shift[row], s.share[row], 0.0f, nullptr, kept};
}

MASKACCEL_INLINE void store_some(float* to, V v, int64_t j, int64_t keys) {
  if (j + W <= keys) {
    store(to + j, v, Full{});
  } else if (j < keys) {
    store(to + j, v, Tail{static_cast<int>(keys - j)});
  }
}

template <class T>
class Backward {
  using O = OperandOf<T>;
  static constexpr int64_t kDepth = O::kDepth;
  static constexpr int64_t kColumns = W * kDepth;

 public:
  explicit Backward(const AttentionBackward& s) : s_(s), k_(carve<T>(s, true)) {}

  void run() {
    Item item;
    while (next_item(s_, item)) {
      if (item.pack) {
        prepare_rows<T>(s_, item);
      } else {
        keys(item);
      }
      item_done(s_, item);
    }
  }

 private:
  bool needs(int what) const { return (s_.needs & what) != 0; }

  void keys(const Item& item) {
    pack_keys(item);
    const int64_t heads = s_.queries_per_key();
    bool first = true;
    for (int64_t h = item.hk * heads; h < (item.hk + 1) * heads; ++h)
      each_meeting(s_, item, h, [&](const Meeting& at) {
        meet(item, at, first);
        first = false;
      });
    finish(item, first);
  }

  void pack_keys(const Item& item) {
    const T* const k = element<T>(s_.k, item.b, item.first, item.hk);
    const T* const v = element<T>(s_.v, item.b, item.first, item.hk);
    columns_ = (item.keys + kColumns - 1) / kColumns * kColumns;
    pack_transposed<O>(k, s_.k.stride_s, item.keys, s_.D, k_.k_across, k_.ld);
    if (needs(kNeedQ | kNeedK | kNeedS)) pack_transposed<O>(v, s_.v.stride_s, item.keys, s_.D, k_.v_across, k_.ld);
    if (needs(kNeedQ)) pack_stacked<O>(k, s_.k.stride_s, item.keys, s_.D, k_.k_stacked, s_.padded_dim);
  }

  void meet(const Item& item, const Meeting& at, bool first) {
    const int64_t row = s_.slot_row(at.b, at.h) + at.first, words = s_.row_words(kDepth);
    const int64_t dim = s_.padded_dim, keys = even(item.keys);
    product<O>(at.rows, columns_, s_.D / kDepth, s_.q_rows + row * words, words, 1, k_.k_across, k_.ld, k_.scores,
               k_.ld);
    if (needs(kNeedQ | kNeedK | kNeedS))
      product<O>(at.rows, columns_, s_.D / kDepth, s_.dout_rows + row * words, words, 1, k_.v_across, k_.ld, k_.dscores,
                 k_.ld);
    elements(item, at, row);
    const Start start = first ? Start::zero : Start::own;
    if (needs(kNeedV))
      product<O>(keys, dim, at.rows / kDepth, k_.scores, 1, k_.ld, s_.dout_stacked + row / kDepth * dim, dim, k_.dv,
                 dim, start);
    if (needs(kNeedK))
      product<O>(keys, dim, at.rows / kDepth, k_.dscores, 1, k_.ld, s_.q_stacked + row / kDepth * dim, dim, k_.dk, dim,
                 start);
    if (needs(kNeedQ)) add_to_dq(item, at, row);
  }

  // Scores become probabilities, gradients of probabilities become those of scores, both as operands and in place: two
  // rows make one stacked row, which lies where nothing is left to be read.
  void elements(const Item& item, const Meeting& at, int64_t row) {
    for (int64_t i = 0; i < at.rows; i += kDepth) {
      ScoreRow r[kDepth];
      for (int64_t l = 0; l < kDepth; ++l) {
        r[l] = score_row(s_, row + i + l, at.kept == nullptr ? nullptr : at.kept + (i + l) * at.words);
        r[l].delta = s_.delta[row + i + l];
        if (s_.terms.any() && at.first + i + l < s_.Sq) {
          r[l].added = k_.added + l * kMostKeys;
          added_scores(s_.terms, at.b, at.h, at.first + i + l, item.first, item.keys, k_.added + l * kMostKeys);
        }
      }
      if (needs(kNeedQ | kNeedK | kNeedS)) {
        row_elements<true>(item, at, i, r);
      } else {
        row_elements<false>(item, at, i, r);
      }
    }
  }

  template <bool DS>
  MASKACCEL_HOT void row_elements(const Item& item, const Meeting& at, int64_t i, const ScoreRow* r) {
    float *const s = k_.scores + i * k_.ld, *const dp = k_.dscores + i * k_.ld;
    float* const ds =
        needs(kNeedS) ? s_.ds + ((at.b * s_.H + at.h) * s_.Sq + at.first + i) * s_.Sk + item.first : nullptr;
    if constexpr (kDepth == 1) {
      for (int64_t j = 0; j < columns_; j += W) {
        const V p = probability(r[0], load(s + j, Full{}), j, item.keys);
        store(s + j, p, Full{});
        if (!DS) continue;
        const V g = mul(p, sub(load(dp + j, Full{}), set1(r[0].delta)));
        store(dp + j, g, Full{});
        if (ds != nullptr && at.first + i < s_.Sq) store_some(ds, g, j, item.keys);
      }
    }
#if defined(__AVX512BF16__)
    if constexpr (kDepth == 2) {
      float *const p_to = k_.scores + i / 2 * k_.ld, *const g_to = k_.dscores + i / 2 * k_.ld;
      float* const rows_to = k_.dscores_rows + i * k_.ld;
      for (int64_t j = 0; j < columns_; j += 2 * W) {
        V p[2][2], g[2][2];
#pragma GCC unroll 2
        for (int l = 0; l < 2; ++l)
#pragma GCC unroll 2
          for (int c = 0; c < 2; ++c) {
            const int64_t at_j = j + c * W;
            p[l][c] = probability(r[l], load(s + l * k_.ld + at_j, Full{}), at_j, item.keys);
            if (!DS) continue;
            g[l][c] = mul(p[l][c], sub(load(dp + l * k_.ld + at_j, Full{}), set1(r[l].delta)));
            if (ds != nullptr && at.first + i + l < s_.Sq) store_some(ds + l * s_.Sk, g[l][c], at_j, item.keys);
          }
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          store(p_to + j + c * W, O::stack(p[0][c], p[1][c]), Full{});
          if (DS) store(g_to + j + c * W, O::stack(g[0][c], g[1][c]), Full{});
        }
        if (!DS) continue;
#pragma GCC unroll 2
        for (int l = 0; l < 2; ++l) store(rows_to + l * k_.ld + j / 2, O::follow(g[l][0], g[l][1]), Full{});
      }
    }
#endif
  }

  void add_to_dq(const Item& item, const Meeting& at, int64_t row) {
    const int64_t per_tile = (s_.bm + s_.blocks.queries - 1) / s_.blocks.queries;
    std::atomic<int64_t>& turn = s_.turn[(at.b * s_.H + at.h) * s_.query_blocks + at.m * per_tile + at.part];
    const int64_t tile_blocks = (s_.bn + s_.blocks.keys - 1) / s_.blocks.keys;
    const int64_t mine = s_.turns == nullptr ? item.n * tile_blocks + item.part : s_.turn_of[at.entry] + item.part;
    wait_for(turn, mine);
    float* const sum = s_.dq_sum + row * s_.padded_dim;
    product<O>(at.rows, s_.padded_dim, (item.keys + kDepth - 1) / kDepth, k_.dscores_rows, k_.ld, 1, k_.k_stacked,
               s_.padded_dim, sum, s_.padded_dim, mine == 0 ? Start::zero : Start::own);
    if (mine + 1 == s_.turns_of(at.b, at.h, at.m)) {
      const int64_t there = s_.Sq - at.first < at.rows ? s_.Sq - at.first : at.rows;
      write(sum, there, s_.scale, static_cast<T*>(s_.dq) + ((at.b * s_.Sq + at.first) * s_.H + at.h) * s_.D,
            s_.H * s_.D);
    }
    turn.store(mine + 1, std::memory_order_release);
  }

  void finish(const Item& item, bool empty) {
    const int64_t to = ((item.b * s_.Sk + item.first) * s_.Hk + item.hk) * s_.D, step = s_.Hk * s_.D;
    if (empty) {
      fill_zero(k_.dk, 0, item.keys * s_.padded_dim);
      fill_zero(k_.dv, 0, item.keys * s_.padded_dim);
    }
    if (needs(kNeedK)) write(k_.dk, item.keys, s_.scale, static_cast<T*>(s_.dk) + to, step);
    if (needs(kNeedV)) write(k_.dv, item.keys, 1.0f, static_cast<T*>(s_.dv) + to, step);
  }

  void write(const float* sums, int64_t rows, float factor, T* to, int64_t step) const {
    for (int64_t i = 0; i < rows; ++i, sums += s_.padded_dim, to += step)
      each_vector(s_.D, [&](int64_t d, auto part)
                            MASKACCEL_HOT { store(to + d, mul(load(sums + d, part), set1(factor)), part); });
  }

  const AttentionBackward& s_;
  const KeyBlock k_;
  int64_t columns_ = 0;
};

template <class T>
void run_as(const AttentionBackward& s) {
  Backward<T>(s).run();
}

// sum += part, with what rounding took away kept in `lost` (Kahan): thousands of queries are summed.
MASKACCEL_INLINE void add_exactly(float* sum, float* lost, float* part, int64_t n) {
  for (int64_t j = 0; j < n; j += W) {
    const V before = load(sum + j, Full{}), more = sub(load(part + j, Full{}), load(lost + j, Full{}));
    const V after = add(before, more);
    store(lost + j, sub(sub(after, before), more), Full{});
    store(sum + j, after, Full{});
    store(part + j, set1(0.0f), Full{});
  }
}

template <class T>
void run_sums_as(const AttentionColumnSums& s) {
  using O = OperandOf<T>;
  const KeyBlock k = carve<T>(s, false);
  float *const sum = k.sums, *const lost = sum + kMostKeys, *const part = lost + kMostKeys;
  const int64_t group = s.queries_per_key(), words = s.row_words(O::kDepth);
  Item item;
  for (; next_item(s, item); item_done(s, item)) {
    if (item.pack) {
      pack_queries<T>(s, rows_of(s, item));
      continue;
    }
    const int64_t columns = whole_vectors(item.keys);
    pack_transposed<O>(element<T>(s.k, item.b, item.first, item.hk), s.k.stride_s, item.keys, s.D, k.k_across, k.ld);
    for (int64_t h = item.hk * group; h < (item.hk + 1) * group; ++h) {
      fill_zero(sum, 0, 3 * kMostKeys);
      each_meeting(s, item, h, [&](const Meeting& at) {
        const int64_t row = s.slot_row(at.b, h) + at.first;
        product<O>(at.rows, columns, s.D / O::kDepth, s.q_rows + row * words, words, 1, k.k_across, k.ld, k.scores,
                   k.ld);
        for (int64_t i = 0; i < at.rows && at.first + i < s.Sq; ++i) {
          ScoreRow r = score_row(s, row + i, at.kept == nullptr ? nullptr : at.kept + i * at.words);
          if (s.terms.any()) {
            r.added = k.added;
            added_scores(s.terms, at.b, h, at.first + i, item.first, item.keys, k.added);
          }
          for (int64_t j = 0; j < columns; j += W)
            store(part + j,
                  add(load(part + j, Full{}), probability(r, load(k.scores + i * k.ld + j, Full{}), j, item.keys)),
                  Full{});
        }
        add_exactly(sum, lost, part, columns);
      });
      std::memcpy(s.sums + (item.b * s.H + h) * s.Sk + item.first, sum, item.keys * sizeof(float));
    }
  }
}

int64_t depth(Dtype dtype) { return dtype == Dtype::bf16 ? OperandOf<bf16>::kDepth : 1; }

void run(const AttentionBackward& s) {
  with_dtype(s.dtype, [&](auto t) { run_as<decltype(t)>(s); });
}
void run_sums(const AttentionColumnSums& s) {
  with_dtype(s.dtype, [&](auto t) { run_sums_as<decltype(t)>(s); });
}

}  // namespace

const AttentionBackwardKernels attention_backward_kernels = {depth, run, run_sums};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
