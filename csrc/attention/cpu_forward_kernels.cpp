// Tiled attention, forward. Compiled once per instruction set; see common/isa.h.
//
// Online softmax (Milakov and Gimelshein, arXiv:1805.02867, tiled as by Dao et al., arXiv:2205.14135). Scores are
// formed keys by queries, so maximum, exponentials and sum of a query stay in its lane of a vector. Maximum and scores
// are in units of log2.
#include <cmath>

#include "cpu_forward.h"
#include "cpu_gemm.h"
#include "cpu_score_tile.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

// Per query, of the tiles so far: the largest score as formed and in units of log2, and the sum of the exponentials;
// and what the sums before the last tile are to be multiplied by.
struct Softmax {
  float *score, *largest, *total, *decay;
  Softmax at(int64_t i) const { return {score + i, largest + i, total + i, decay + i}; }
};

// Scores of N vectors of queries turned into probabilities in place, as left operand O (stacked along the keys).
template <class O, int N>
MASKACCEL_INLINE void softmax_columns(float* scores, int64_t ld, int64_t keys, float factor, const Softmax& at) {
  const V by = set1(factor);
  V most[N], sum[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) most[v] = set1(kMinusInf);
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) most[v] = vmax(most[v], load(scores + j * ld + v * W, Full{}));
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    store(at.score + v * W, vmax(load(at.score + v * W, Full{}), most[v]), Full{});
    const V before = load(at.largest + v * W, Full{});
    const V now = vmax(before, mul(most[v], by));
    store(at.largest + v * W, now, Full{});
    // A query that has kept nothing yet: -inf - 0, not -inf - -inf.
    most[v] = less(now, set1(-std::numeric_limits<float>::max()), set1(0.0f), now);
    store(at.decay + v * W, vexp2(sub(before, most[v])), Full{});
    sum[v] = set1(0.0f);
  }
  const auto exponential = [&](const float* row, int v) MASKACCEL_HOT {
    const V p = vexp2(sub(mul(load(row + v * W, Full{}), by), most[v]));
    sum[v] = add(sum[v], p);
    return p;
  };
  int64_t j = 0;
  for (; j + O::kDepth <= keys; j += O::kDepth) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      float* const row = scores + j * ld;
      float* const to = scores + j / O::kDepth * ld + v * W;
      if constexpr (O::kDepth == 1) {
        store(to, exponential(row, v), Full{});
      } else {
        const V low = exponential(row, v);
        store(to, O::stack(low, exponential(row + ld, v)), Full{});
      }
    }
  }
  if constexpr (O::kDepth > 1) {
    for (int v = 0; v < N && j < keys; ++v)
      store(scores + j / O::kDepth * ld + v * W, O::stack(exponential(scores + j * ld, v), set1(0.0f)), Full{});
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v)
    store(at.total + v * W, fma(load(at.total + v * W, Full{}), load(at.decay + v * W, Full{}), sum[v]), Full{});
}

template <class O>
MASKACCEL_OUTLINE void softmax_tile(const ScoreTile& x, float factor, const Softmax& of) {
  const int64_t lanes = whole_vectors(x.queries);
  int64_t i = 0;
  for (; i + 4 * W <= lanes; i += 4 * W)
    softmax_columns<O, 4>(x.scores + i, x.ld, x.keys, factor, of.at(i));
  for (; i < lanes; i += W) softmax_columns<O, 1>(x.scores + i, x.ld, x.keys, factor, of.at(i));
}

// most = max(most, largest score of each query).
MASKACCEL_OUTLINE void raise_maximum(const ScoreTile& x, float factor, float* most) {
  const int64_t lanes = whole_vectors(x.queries);
  for (int64_t i = 0; i < lanes; i += W) {
    V largest = set1(kMinusInf);
    for (int64_t j = 0; j < x.keys; ++j) largest = vmax(largest, load(x.scores + j * x.ld + i, Full{}));
    store(most + i, vmax(load(most + i, Full{}), mul(largest, set1(factor))), Full{});
  }
}

// The row of mask tiles that a worker is at. Per-query state covers all of it, for the tests that choose tiles are
// made for whole mask tiles; kernel tiles of `tq` queries ("parts") and `tk` keys are what is multiplied.
template <class T>
class TileRow {
 public:
  using O = OperandOf<T>;

  static void plan(AttentionForward& s) {
    s.keys_size = s.Sk * (s.D / O::kDepth);
    s.values_size = (s.Sk + O::kDepth - 1) / O::kDepth * whole_vectors(s.D);
    const int64_t queries = state_rows(s);
    s.work_size = queries * (s.D / O::kDepth + whole_vectors(s.D) + kVectors) + scores_size(s);
  }

  TileRow(const AttentionForward& s, float* work, int64_t b, int64_t h, int64_t m)
      : s_(s), b_(b), h_(h), m_(m), q0_(m * s.bm), queries_(s.Sq - q0_ < s.bm ? s.Sq - q0_ : s.bm) {
    const int64_t rows = state_rows(s), head = b * s.Hk + s.key_head(h) - s.first_head;
    keys_ = s.packed_keys + head * s.keys_size;
    values_ = s.packed_values + head * s.values_size;
    const auto take = [&](int64_t floats) {
      float* const p = work;
      work += floats;
      return p;
    };
    packed_queries_ = take(rows * (s.D / O::kDepth));
    sums_ = take(rows * ld_values());
    state_.score = take(rows);
    state_.largest = take(rows);
    state_.total = take(rows);
    state_.decay = take(rows);
    reference_ = take(rows);
    in_tile_ = take(rows);
    scores_ = take(scores_size(s));
    plain_ = !s.terms.any() && s.scale > 0.0f;
    factor_ = static_cast<float>((plain_ ? s.scale : 1.0) * kLog2e);
    for (int64_t i = 0; i < rows; ++i) {
      state_.score[i] = state_.largest[i] = kMinusInf;
      state_.total[i] = 0.0f;
    }
    for (int64_t i = 0; i < rows * ld_values(); ++i) sums_[i] = 0.0f;
    if (s.reference_lse != nullptr) {
      const float* const lse = s.reference_lse + (b * s.H + h) * s.Sq + q0_;
      for (int64_t i = 0; i < queries_; ++i) reference_[i] = static_cast<float>(lse[i] * kLog2e);
    }
    for (int64_t i = 0; i < queries_; i += s.tq)
      pack_transposed<O>(static_cast<const T*>(s.q.data) + s.q.offset(b, q0_ + i, h), s.q.stride_s, part_size(i), s.D,
                         packed_queries_ + i * (s.D / O::kDepth), s.tq);
    if (s.keep != nullptr) {
      keep_ = s.keep + ((b * s.H + h) * s.Mq + m) * s.keep_words;
      for (int64_t w = 0; w < s.keep_words; ++w) keep_[w] = 0;
    }
  }

  void run() {
    if (s_.lists.index == nullptr) {
      for (int64_t n = 0; n < s_.Nk; ++n) visit(n, nullptr);
    } else {
      const int64_t row = s_.lists.row(b_, h_, m_);
      const int32_t *const tiles = s_.lists.index + row * s_.lists.length, *const count = s_.lists.count + 2 * row;
      for (int64_t i = 0; i < count[0] + count[1]; ++i)
        visit(tiles[i], i < count[0] ? s_.elements.of(b_, h_, m_, tiles[i]) : nullptr);
    }
    with_dtype(s_.out_add_dtype, [&](auto t) { write<decltype(t)>(); });
  }

 private:
  static constexpr int64_t kVectors = 6;  // of per-query state
  static int64_t state_rows(const AttentionForward& s) {
    const int64_t queries = (s.Sq + s.tq - 1) / s.tq * s.tq;
    return queries < s.bm ? queries : s.bm;
  }
  // Pruning needs the scores of a whole mask tile before any of them is used.
  static int64_t scores_size(const AttentionForward& s) { return s.prune ? state_rows(s) * s.bn : s.tq * s.tk; }

  int64_t ld_values() const { return whole_vectors(s_.D); }
  int64_t part_size(int64_t i) const { return queries_ - i < s_.tq ? queries_ - i : s_.tq; }

  // The kernel tile of the part at query i and the keys from j on in mask tile n.
  ScoreTile tile(int64_t i, int64_t n, int64_t j) const {
    ScoreTile x;
    x.b = b_;
    x.h = h_;
    x.q0 = q0_ + i;
    x.queries = part_size(i);
    x.k0 = n * s_.bn + j;
    x.keys = s_.Sk - x.k0 < s_.tk ? s_.Sk - x.k0 : s_.tk;
    x.scores = s_.prune ? scores_ + i * s_.bn + j * s_.tq : scores_;
    x.ld = s_.tq;
    return x;
  }

  // f(i, tile, j) for the kernel tiles of mask tile n.
  template <class F>
  void each_tile(int64_t n, F&& f) const {
    const int64_t keys = s_.Sk - n * s_.bn < s_.bn ? s_.Sk - n * s_.bn : s_.bn;
    for (int64_t i = 0; i < queries_; i += s_.tq)
      for (int64_t j = 0; j < keys; j += s_.tk) f(i, tile(i, n, j), j);
  }

  void form(int64_t i, const ScoreTile& x, int64_t j, const int32_t* bits) const {
    const int64_t words = s_.D / O::kDepth;
    product<O>(x.keys, whole_vectors(x.queries), words, keys_ + x.k0 * words, words, 1, packed_queries_ + i * words,
               x.ld, x.scores, x.ld);
    if (!plain_) add_terms(s_.terms, x, s_.scale);
    if (bits != nullptr) apply_pattern(x, bits + i * s_.elements.words + j / 32, s_.elements.words);
  }

  void absorb(int64_t i, const ScoreTile& x) const {
    softmax_tile<O>(x, factor_, state_.at(i));
    const int64_t ld = ld_values();
    product<O>(x.queries, ld, (x.keys + O::kDepth - 1) / O::kDepth, x.scores, 1, x.ld,
               values_ + x.k0 / O::kDepth * ld, ld, sums_ + i * ld, ld, Start::scaled, state_.decay + i);
  }

  // Takes mask tile n into the sums. `bits`: its pattern, null if it is full.
  void visit(int64_t n, const int32_t* bits) {
    const bool test = keep_ != nullptr || s_.prune;
    if (!test) {
      each_tile(n, [&](int64_t i, const ScoreTile& x, int64_t j) {
        form(i, x, j, bits);
        absorb(i, x);
      });
      return;
    }
    for (int64_t i = 0; i < queries_; ++i) in_tile_[i] = kMinusInf;
    if (s_.reference_lse == nullptr) std::memcpy(reference_, state_.largest, sizeof(float) * queries_);
    each_tile(n, [&](int64_t i, const ScoreTile& x, int64_t j) {
      form(i, x, j, bits);
      raise_maximum(x, factor_, in_tile_ + i);
      if (!s_.prune) absorb(i, x);
    });
    if (!matters()) return;
    if (keep_ != nullptr) keep_[n / 32] |= static_cast<int32_t>(1u << (n % 32));
    if (s_.prune) each_tile(n, [&](int64_t i, const ScoreTile& x, int64_t) { absorb(i, x); });
  }

  // Whether the mask tile whose largest scores are `in_tile_` passes the test of the keep bits.
  bool matters() const {
    bool any = false;
    for (int64_t i = 0; i < queries_; ++i)
      any |= in_tile_[i] > kMinusInf && (reference_[i] == kMinusInf || in_tile_[i] - reference_[i] > s_.threshold);
    return any;
  }

  template <class A>
  void write() const {
    const double unit = plain_ ? s_.scale : 1.0;
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t q = q0_ + i;
      const float total = state_.total[i];
      const bool empty = total == 0.0f;
      s_.lse[(b_ * s_.H + h_) * s_.Sq + q] =
          empty ? kMinusInf : static_cast<float>(state_.score[i] * unit + std::log(static_cast<double>(total)));
      float scale = empty ? 0.0f : 1.0f / total;
      if (s_.out_scale != nullptr)
        scale *= s_.out_scale[b_ * s_.out_scale_b + h_ * s_.out_scale_h + q * s_.out_scale_s];
      const float* const sums = sums_ + i * ld_values();
      const A* const plus = s_.out_add.data == nullptr
                                ? nullptr
                                : static_cast<const A*>(s_.out_add.data) + s_.out_add.offset(b_, q, h_);
      T* const to = static_cast<T*>(s_.out) + ((b_ * s_.Sq + q) * s_.H + h_) * s_.D;
      each_vector(s_.D, [&](int64_t c, auto part) MASKACCEL_HOT {
        V r = empty ? set1(0.0f) : mul(load(sums + c, Full{}), set1(scale));
        if (plus != nullptr) r = add(r, load(plus + c, part));
        store(to + c, r, part);
      });
    }
  }

  const AttentionForward& s_;
  const int64_t b_, h_, m_, q0_, queries_;
  const float *keys_, *values_;  // of the key head
  int32_t* keep_ = nullptr;      // of this row
  bool plain_;                   // scores are inner products times a positive number
  float factor_;                 // from scores as formed to units of log2
  float *packed_queries_, *sums_, *scores_;
  Softmax state_;
  float *reference_, *in_tile_;  // per query, in units of log2: what the test of a mask tile compares
};

template <class T>
void pack_tiles(const AttentionForward& s, int64_t begin, int64_t end) {
  using O = OperandOf<T>;
  const int64_t ld = whole_vectors(s.D), words = s.D / O::kDepth;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t packed = t / s.key_tiles(), first = t % s.key_tiles() * s.tk, head = s.first_head + packed;
    if (!s.tiles_read[packed * s.Nk + first / s.bn]) continue;
    const int64_t b = head / s.Hk, h = head % s.Hk, keys = s.Sk - first < s.tk ? s.Sk - first : s.tk;
    pack_rows<O>(static_cast<const T*>(s.k.data) + s.k.offset(b, first, h), s.k.stride_s, keys, s.D,
                 s.packed_keys + packed * s.keys_size + first * words, words);
    pack_stacked<O>(static_cast<const T*>(s.v.data) + s.v.offset(b, first, h), s.v.stride_s, keys, s.D,
                    s.packed_values + packed * s.values_size + first / O::kDepth * ld, ld);
  }
}

void plan(AttentionForward& s) {
  with_dtype(s.dtype, [&](auto type) { TileRow<decltype(type)>::plan(s); });
}

void pack(const AttentionForward& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto type) { pack_tiles<decltype(type)>(s, begin, end); });
}

void attend(const AttentionForward& s, float* work, int64_t b, int64_t h, int64_t m) {
  with_dtype(s.dtype, [&](auto type) { TileRow<decltype(type)>(s, work, b, h, m).run(); });
}

}  // namespace

const ForwardKernels forward_attention_kernels = {plan, pack, attend};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
