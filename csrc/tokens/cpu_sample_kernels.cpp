// One token and its confidence from a row of logits. Compiled once per instruction set; see common/isa.h.
#include <cmath>

#include "cpu_sample.h"
#include "cpu_words.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

constexpr int64_t kBlock = 512;  // logits that are read from memory once and then stay in the nearest cache
constexpr float kInf = __builtin_inff();
constexpr float kFaint = -105.0f;  // e^x is 0 from here on, and x e^x no NaN

struct Block {
  alignas(64) float logits[kBlock];
  int64_t vectors;
  V most;
};

// The logits from v on, -inf past the last of them; lanes of `bad` with a NaN or +inf become 1.
template <class T>
MASKACCEL_INLINE void read(Block& block, const T* logits, int64_t count, V& bad) {
  const V inf = set1(kInf), one = set1(1.0f);
  V most[2] = {set1(-kInf), set1(-kInf)};
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const V v = load(logits + i + j * W, Full{});
      bad = less(v, inf, bad, one);
      most[j] = vmax(most[j], v);
      store(block.logits + i + j * W, v, Full{});
    }
  }
  for (; i < count; i += W) {
    store(block.logits + i, set1(-kInf), Full{});
    const Tail part{static_cast<int>(count - i < W ? count - i : W)};
    if (part.n == W) {
      store(block.logits + i, load(logits + i, Full{}), Full{});
    } else {
      store(block.logits + i, load(logits + i, part), part);
    }
    const V v = load(block.logits + i, Full{});
    bad = less(v, inf, bad, one);
    most[0] = vmax(most[0], v);
  }
  block.vectors = (count + W - 1) / W;
  block.most = vmax(most[0], most[1]);
}

// The largest of a vector, and the lane operations that are too rare to be worth vectors.
struct Lanes {
  alignas(64) float at[W];
  explicit Lanes(V v) { store(at, v, Full{}); }
  float most() const {
    float m = at[0];
    for (int i = 1; i < W; ++i) m = at[i] > m ? at[i] : m;
    return m;
  }
};

struct Sums {
  double plain = 0.0, weighted = 0.0;  // of e^x, and of x e^x
};

// Of a block, many short sums: the rounding of fp32 grows with the length of one.
template <bool WEIGHTED>
MASKACCEL_INLINE void add_powers(const Block& block, float most, double scale, Sums& sums) {
  constexpr int kChains = WEIGHTED ? 4 : 8;
  const auto whole = static_cast<float>(scale);
  const V top = set1(most), factor = set1(whole), faint = set1(kFaint);
  const V rest = set1(static_cast<float>(scale - whole));  // an error of the factor would grow with x
  V s[kChains], w[kChains];
  for (int j = 0; j < kChains; ++j) s[j] = w[j] = set1(0.0f);
  const auto one = [&](int64_t i, int j) MASKACCEL_HOT {
    const V below = vmax(set1(-1e28f), sub(load(block.logits + i * W, Full{}), top));
    const V x = vmax(faint, fma(below, rest, mul(below, factor)));
    const V power = vexp(x);
    s[j] = add(s[j], power);
    if constexpr (WEIGHTED) w[j] = fma(x, power, w[j]);
  };
  int64_t i = 0;
  for (; i + kChains <= block.vectors; i += kChains) {
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) one(i + j, j);
  }
  for (; i < block.vectors; ++i) one(i, 0);
  const auto total = [](V* v) MASKACCEL_HOT {
#pragma GCC unroll 3
    for (int n = kChains / 2; n > 0; n /= 2)
      for (int j = 0; j < n; ++j) v[j] = add(v[j], v[j + n]);
    return static_cast<double>(hsum(v[0]));
  };
  sums.plain += total(s);
  if constexpr (WEIGHTED) sums.weighted += total(w);
}

MASKACCEL_INLINE void keep_two(const Block& block, V& first, V& second) {
  for (int64_t i = 0; i < block.vectors; ++i) {
    const V v = load(block.logits + i * W, Full{});
    second = vmax(second, vmin(first, v));
    first = vmax(first, v);
  }
}

// The largest logit + temperature * noise so far. Few vectors hold a larger one, so each is looked at as a whole first.
struct Best {
  float value = -kInf;
  int32_t id = -1;
  MASKACCEL_HOT bool below_some(V v) const { return any_less(set1(value), v); }
  void take(V v, int64_t from) {
    const Lanes lanes(v);
    for (int i = 0; i < W; ++i) {
      if (!(lanes.at[i] > value)) continue;
      value = lanes.at[i];
      id = static_cast<int32_t>(from + i);
    }
  }
};

// Noise below what a word can give: -log(-log(u)) <= -log(1 - u), whose last factor is at least a power of two. The
// margin covers the rounding of both.
MASKACCEL_INLINE V most_noise(Words word) {
  const V rest = uniforms(exclusive(word, set1_words(~0u)));  // 1 - u, exactly
  const V exponent = to_floats(shift_right<23>(as_words(rest)));
  return mul(sub(set1(127.0f), exponent), set1(0.69325f));
}
constexpr float kMostNoise = 16.64f;  // of the word whose bits are all 1

template <class F>
MASKACCEL_INLINE void keep_best(const Block& block, int64_t from, Best& best, F&& noisy) {
  for (int64_t i = 0; i < block.vectors; ++i) {
    const V v = noisy(load(block.logits + i * W, Full{}), i);
    if (best.below_some(v)) best.take(v, from + i * W);
  }
}

// The same with the noise of the counters, drawn where it could matter.
MASKACCEL_INLINE void keep_best_drawn(const Block& block, int64_t from, Best& best, const PhiloxWords& draw,
                                      uint32_t first_item, V temperature) {
  const V most = mul(temperature, set1(kMostNoise));
  const Words items = count_from(first_item + static_cast<uint32_t>(from));
  for (int64_t i = 0; i < block.vectors; ++i) {
    const V v = load(block.logits + i * W, Full{});
    if (!best.below_some(add(v, most))) continue;
    const Words word = draw(add(items, set1_words(static_cast<uint32_t>(i * W))));
    if (!best.below_some(add(v, mul(temperature, most_noise(word))))) continue;
    const V noisy = add(v, mul(temperature, gumbel(word)));
    if (best.below_some(noisy)) best.take(noisy, from + i * W);
  }
}

// `known` is what an earlier chunk of the row reached: no other token counts.
template <class T>
void draw_chunk(const Sample& s, const T* logits, const float* noise, const Stream& stream, uint32_t first_item,
                int64_t from, int64_t to, float known, Drawn& out) {
  const PhiloxWords draw(stream);
  const V temperature = set1(s.temperature);
  const bool margin = s.kind == Confidence::margin, entropy = s.kind == Confidence::negative_entropy;
  V bad = set1(0.0f), first = set1(-kInf), second = set1(-kInf);
  Best best;
  best.value = known;
  Sums sums;
  float most = -kInf;
  Block block;
  for (int64_t at = from; at < to; at += kBlock) {
    const int64_t count = to - at < kBlock ? to - at : kBlock;
    read(block, logits + at, count, bad);
    const float here = Lanes(block.most).most();
    if (here > most) {
      const double x = (static_cast<double>(most) - here) * s.scale;  // -inf at first
      const double factor = std::exp(x);
      sums.weighted = factor > 0.0 ? (sums.weighted + x * sums.plain) * factor : 0.0;
      sums.plain *= factor;
      most = here;
    }
    if (here > -kInf) {
      if (entropy) {
        add_powers<true>(block, most, s.scale, sums);
      } else {
        add_powers<false>(block, most, s.scale, sums);
      }
    }
    if (margin) keep_two(block, first, second);
    if (s.temperature == 0.0f) {
      keep_best(block, at, best, [](V v, int64_t) MASKACCEL_HOT { return v; });
    } else if (noise != nullptr) {
      keep_best(block, at, best, [&](V v, int64_t i) MASKACCEL_HOT {
        const int64_t left = count - i * W;
        const float* const given = noise + at + i * W;
        const V g = left >= W ? load(given, Full{}) : load(given, Tail{static_cast<int>(left)});
        return add(v, mul(temperature, g));
      });
    } else {
      keep_best_drawn(block, at, best, draw, first_item, temperature);
    }
  }
  out.best = best.value;
  out.id = best.id;
  out.logit = out.id >= 0 ? to_float(logits[out.id]) : 0.0f;
  out.most = most;
  if (margin) {
    const Lanes a(first), b(second);
    out.second = -kInf;
    bool skipped = false;  // one of the lanes that hold the largest
    for (int i = 0; i < W; ++i) {
      out.second = b.at[i] > out.second ? b.at[i] : out.second;
      if (!skipped && a.at[i] == most) {
        skipped = true;
      } else {
        out.second = a.at[i] > out.second ? a.at[i] : out.second;
      }
    }
  }
  out.sum = sums.plain;
  out.weighted = sums.weighted;
  out.bad = Lanes(bad).most() > 0.0f;
}

template <class T>
void sample_of(const Sample& s, int64_t begin, int64_t end) {
  float known = -kInf;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t at = c / s.chunks, from = (c - at * s.chunks) * s.chunk;
    const int64_t row = s.rows[at], b = row / s.N, n = row - b * s.N;
    const Stream stream = stream_of(s.seed, s.offset + b, s.step, 0, Purpose::sample);
    if (from == 0) known = -kInf;
    draw_chunk(s, static_cast<const T*>(s.logits) + b * s.stride_b + n * s.stride_n,
               s.noise != nullptr ? s.noise + row * s.V : nullptr, stream, static_cast<uint32_t>(n * s.V), from,
               from + s.chunk < s.V ? from + s.chunk : s.V, known, s.out[c]);
    known = s.out[c].best;
  }
}

void sample(const Sample& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto t) { sample_of<decltype(t)>(s, begin, end); });
}

}  // namespace

const SampleKernels sample_kernels = {sample};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
