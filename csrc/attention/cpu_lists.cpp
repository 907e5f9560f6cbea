// tile_lists on CPU tensors; the contract is in maskaccel/ops/attention/schema.py.
#include <algorithm>
#include <vector>

#include "cpu_args.h"

namespace maskaccel {
namespace {

using Word = uint32_t;
constexpr int64_t kBits = 32;

// Rows of tiles as words of bits: those kept, and of those the ones kept in part.
struct TileBits {
  int64_t rows = 0, tiles = 0, words = 0;
  std::vector<Word> kept, partial;
  TileBits(int64_t slabs, int64_t rows_, int64_t tiles_)
      : rows(rows_), tiles(tiles_), words((tiles_ + kBits - 1) / kBits) {
    kept.resize(static_cast<size_t>(slabs * rows * words));
    partial.resize(kept.size());
  }
  // The tiles of word w that exist.
  Word valid(int64_t w) const {
    const int64_t left = tiles - w * kBits;
    return left >= kBits ? ~Word{0} : (Word{1} << left) - 1;
  }
};

// Word i of the result holds bit i of all words. (Hacker's Delight, 2nd ed., section 7-3, mirrored.)
void transpose_words(Word* a) {
  Word mask = 0x0000ffffu;
  for (int j = 16; j != 0; j >>= 1, mask ^= mask << j)
    for (int k = 0; k < 32; k = (k + j + 1) & ~j) {
      const Word t = ((a[k] >> j) ^ a[k + j]) & mask;
      a[k] ^= t << j;
      a[k + j] ^= t;
    }
}

// A slab (one sample and head) of the transposed mask; `from` and `to` are its words.
void transpose_slab(const Word* from, int64_t rows, int64_t tiles, Word* to) {
  const int64_t words = (tiles + kBits - 1) / kBits, words_t = (rows + kBits - 1) / kBits;
  Word square[kBits];
  for (int64_t wt = 0; wt < words_t; ++wt)
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t i = 0; i < kBits; ++i) {
        const int64_t m = wt * kBits + i;
        square[i] = m < rows ? from[m * words + w] : 0;
      }
      transpose_words(square);
      for (int64_t i = 0; i < std::min(kBits, tiles - w * kBits); ++i) to[(w * kBits + i) * words_t + wt] = square[i];
    }
}

int32_t* append(Word word, int64_t first, int32_t* to) {
  for (; word != 0; word &= word - 1) *to++ = static_cast<int32_t>(first) + __builtin_ctz(word);
  return to;
}

// The list of one row: partial tiles, full ones, and then, so that every entry is defined, those left out.
void write_row(const TileBits& t, int64_t row, int32_t* index, int32_t* count) {
  const Word* const kept = t.kept.data() + row * t.words;
  const Word* const partial = t.partial.data() + row * t.words;
  int32_t* to = index;
  for (int64_t w = 0; w < t.words; ++w) to = append(partial[w], w * kBits, to);
  count[0] = static_cast<int32_t>(to - index);
  for (int64_t w = 0; w < t.words; ++w) to = append(kept[w] & ~partial[w], w * kBits, to);
  count[1] = static_cast<int32_t>(to - index) - count[0];
  for (int64_t w = 0; w < t.words; ++w) to = append(~kept[w] & t.valid(w), w * kBits, to);
}

// The order of schema.py. A counting sort of the rows of each slab, then class by class what each slab has of it.
void order_rows(const int32_t* count, int64_t slabs, int64_t rows, int64_t most, int32_t* order) {
  std::vector<int32_t> sorted(static_cast<size_t>(slabs * rows));
  const auto total = [&](int64_t r) { return static_cast<int64_t>(count[2 * r]) + count[2 * r + 1]; };
  for (int64_t s = 0; s < slabs; ++s) {
    std::vector<int64_t> place(static_cast<size_t>(most) + 2, s * rows);  // by number of tiles left out
    for (size_t i = 1; i < place.size(); ++i) place[i] = 0;
    const auto key = [&](int64_t r) { return static_cast<size_t>(most - total(r)); };
    for (int64_t r = s * rows; r < (s + 1) * rows; ++r) ++place[key(r) + 1];
    for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
    for (int64_t r = s * rows; r < (s + 1) * rows; ++r) sorted[place[key(r)]++] = static_cast<int32_t>(r);
  }
  std::vector<int64_t> at(static_cast<size_t>(slabs));
  for (int64_t s = 0; s < slabs; ++s) at[s] = s * rows;
  for (int digits = 32; digits >= 0; --digits) {
    const int64_t least = digits == 0 ? 0 : int64_t{1} << (digits - 1);
    for (int64_t s = 0; s < slabs; ++s)
      while (at[s] < (s + 1) * rows && total(sorted[at[s]]) >= least) *order++ = sorted[at[s]++];
  }
}

struct ListsCall {
  Arg bits, pattern_of;
  int64_t B = 0, H = 0, rows = 0, tiles = 0;
};

ListsCall read(Inputs& in) {
  ListsCall c;
  c.bits = in.tensor("bits");
  c.pattern_of = in.optional("pattern_of");
  c.tiles = in.integer();
  check_int32(c.bits);
  STD_TORCH_CHECK(c.bits.dim == 4, "bits must be (B, H, M, W), got ", c.bits.dim, " dimensions");
  STD_TORCH_CHECK(c.tiles >= 0 && c.tiles < int64_t{1} << 31, "tiles is ", c.tiles, "; allowed are 0 to 2^31 - 1");
  c.B = c.bits.size(0);
  c.H = c.bits.size(1);
  c.rows = c.bits.size(2);
  check_sizes(c.bits, {c.B, c.H, c.rows, (c.tiles + kBits - 1) / kBits});
  STD_TORCH_CHECK(c.B * c.H * std::max(c.rows, c.tiles) < int64_t{1} << 31, "bits has too many rows or tiles");
  if (!c.pattern_of) return c;
  check_int32(c.pattern_of);
  STD_TORCH_CHECK(c.pattern_of.dim == 4, "pattern_of must be 4-D, got ", c.pattern_of.dim, " dimensions");
  check_full_or_one(c.pattern_of, 0, c.B);
  check_full_or_one(c.pattern_of, 1, c.H);
  check_sizes(c.pattern_of, {c.pattern_of.size(0), c.pattern_of.size(1), c.rows, c.tiles});
  return c;
}

// The words of one slab.
void read_slab(const ListsCall& c, int64_t slab, const TileBits& t, Word* kept, Word* partial) {
  const Word* const bits = static_cast<const Word*>(c.bits.data) + slab * c.rows * t.words;
  const int32_t* pattern = nullptr;
  if (c.pattern_of) {
    const int64_t Bp = c.pattern_of.size(0), Hp = c.pattern_of.size(1);
    const int64_t b = Bp == 1 ? 0 : slab / c.H, h = Hp == 1 ? 0 : slab % c.H;
    pattern = static_cast<const int32_t*>(c.pattern_of.data) + (b * Hp + h) * c.rows * c.tiles;
  }
  for (int64_t m = 0; m < c.rows; ++m)
    for (int64_t w = 0; w < t.words; ++w) {
      const int64_t at = m * t.words + w, first = w * kBits;
      kept[at] = bits[at] & t.valid(w);
      Word in_part = 0;
      if (pattern != nullptr) {
        const int32_t* const p = pattern + m * c.tiles + first;
        const int64_t n = std::min(kBits, c.tiles - first);
        for (int64_t i = 0; i < n; ++i) in_part |= static_cast<Word>(p[i] >= 0) << i;
      }
      partial[at] = kept[at] & in_part;
    }
}

void tile_lists(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const ListsCall c = read(in);
  const bool transpose = in.boolean();
  const int64_t slabs = c.B * c.H, rows = transpose ? c.tiles : c.rows, length = transpose ? c.rows : c.tiles;
  TileBits t(slabs, c.rows, c.tiles);
  TileBits result(transpose ? slabs : 0, c.tiles, c.rows);
  parallel(slabs, grain_for(c.rows * c.tiles), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t at = s * c.rows * t.words, at_t = s * result.rows * result.words;
      read_slab(c, s, t, t.kept.data() + at, t.partial.data() + at);
      if (!transpose) continue;
      transpose_slab(t.kept.data() + at, c.rows, c.tiles, result.kept.data() + at_t);
      transpose_slab(t.partial.data() + at, c.rows, c.tiles, result.partial.data() + at_t);
    }
  });
  const TileBits& all = transpose ? result : t;
  const auto integers = [](std::initializer_list<int64_t> sizes) {
    return Output(sizes.begin(), static_cast<int>(sizes.size()), codes().i32, int64_t{sizeof(int32_t)});
  };
  Output index = integers({c.B, c.H, rows, length}), count = integers({c.B, c.H, rows, 2});
  Output order = integers({slabs * rows});
  int32_t* const counts = static_cast<int32_t*>(count.data());
  parallel(slabs * rows, grain_for(length), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      write_row(all, r, static_cast<int32_t*>(index.data()) + r * length, counts + 2 * r);
  });
  order_rows(counts, slabs, rows, length, static_cast<int32_t*>(order.data()));
  stack[0] = index.release();
  stack[1] = count.release();
  stack[2] = order.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("tile_lists", tile_lists); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
