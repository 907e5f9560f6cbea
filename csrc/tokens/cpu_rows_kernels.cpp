// Rows of tokens gathered and merged. Compiled once per instruction set; see common/isa.h.
#include <cstring>

#include "../adaln/cpu_normed.h"
#include "cpu_rows.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

template <class T>
MASKACCEL_INLINE const T* row_at(const Rows& r, int64_t b, int64_t n) {
  return static_cast<const T*>(r.data) + b * r.stride_b + n * r.stride_n;
}

// The bits of a row, whatever their type. `next` is the row that will be copied after it, or null.
template <class T>
MASKACCEL_INLINE void copy_row(T* to, const T* from, const T* next, int64_t d, bool past) {
  if (!past) {
    for (int64_t i = 0; next != nullptr && i < d; i += kLine / int64_t{sizeof(T)}) __builtin_prefetch(next + i, 0, 2);
    std::memcpy(to, from, static_cast<size_t>(d) * sizeof(T));
    return;
  }
  // Written past the cache: rows of whole lines.
  constexpr int64_t line = kLine / int64_t{sizeof(float)};
  auto* const words = reinterpret_cast<float*>(to);
  const auto* const source = reinterpret_cast<const float*>(from);
  const auto* const ahead = reinterpret_cast<const float*>(next);
  for (int64_t i = 0, n = d * int64_t{sizeof(T)} / int64_t{sizeof(float)}; i < n; i += line) {
    if (ahead != nullptr) __builtin_prefetch(ahead + i, 0, 2);
#pragma GCC unroll 2
    for (int64_t j = 0; j < line; j += W) stream(words + i + j, load(source + i + j, Full{}));
  }
}

template <class T>
MASKACCEL_INLINE void zero_row(T* to, int64_t d) {
  std::memset(to, 0, static_cast<size_t>(d) * sizeof(T));
}

// f(b, i, row) over rows begin to end of results with `count` rows a sample.
template <class F>
MASKACCEL_INLINE void each_row(int64_t count, int64_t begin, int64_t end, F&& f) {
  int64_t b = begin / count, i = begin - b * count;
  for (int64_t row = begin; row < end; ++row) {
    f(b, i, row);
    if (++i == count) {
      i = 0;
      ++b;
    }
  }
}

void gather(const GatherRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto source = [&](int64_t b, int64_t i) -> const T* {
      const int32_t id = s.ids.of(b)[i];
      return id >= 0 && id < s.N ? row_at<T>(s.x, b, id) : nullptr;
    };
    const T* from = nullptr;
    bool known = false;
    each_row(s.ids.count, begin, end, [&](int64_t b, int64_t i, int64_t row) MASKACCEL_HOT {
      T* const to = static_cast<T*>(s.out) + row * s.D;
      if (!known) from = source(b, i);
      known = i + 1 < s.ids.count && row + 1 < end;
      const T* const next = known ? source(b, i + 1) : nullptr;
      if (from != nullptr) {
        copy_row(to, from, next, s.D, s.past_cache);
      } else {
        zero_row(to, s.D);
      }
      from = next;
    });
    if (s.past_cache) stream_end();
  });
}

// As many columns as there are chains, all rows of the segment after another.
template <class T>
MASKACCEL_INLINE void segment_row(const SegmentRows& s, int64_t b, const int32_t* order, int64_t count, T* to) {
  constexpr int kVectors = 8;
  const V share = set1(s.mean ? 1.0f / static_cast<float>(count) : 1.0f);
  int64_t i = 0;
  for (; i + kVectors * W <= s.D; i += kVectors * W) {
    V sum[kVectors];
    const T* row = row_at<T>(s.x, b, order[0]) + i;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[j] = load(row + j * W, Full{});
    for (int64_t m = 1; m < count; ++m) {
      row = row_at<T>(s.x, b, order[m]) + i;
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[j] = add(sum[j], load(row + j * W, Full{}));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(to + i + j * W, mul(sum[j], share), Full{});
  }
  const auto rest = [&](auto part) MASKACCEL_HOT {
    V sum = load(row_at<T>(s.x, b, order[0]) + i, part);
    for (int64_t m = 1; m < count; ++m) sum = add(sum, load(row_at<T>(s.x, b, order[m]) + i, part));
    store(to + i, mul(sum, share), part);
  };
  for (; i + W <= s.D; i += W) rest(Full{});
  if (i < s.D) rest(Tail{static_cast<int>(s.D - i)});
}

void segment(const SegmentRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    each_row(s.S, begin, end, [&](int64_t b, int64_t i, int64_t row) MASKACCEL_HOT {
      T* const to = static_cast<T*>(s.out) + row * s.D;
      const int32_t from = s.offsets.of(b)[i], until = s.offsets.of(b)[i + 1];
      const int32_t* const order = s.order.of(b) + from;
      if (until - from > 1) {
        segment_row(s, b, order, until - from, to);
      } else if (until > from) {
        copy_row<T>(to, row_at<T>(s.x, b, order[0]), nullptr, s.D, false);
      } else {
        zero_row(to, s.D);
      }
    });
  });
}

// Of the dtype of the rows, or fp32.
template <class T, class F>
MASKACCEL_INLINE void of_operand(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) {
    f(float{});
  } else {
    f(T{});
  }
}

// to = value + pos for a token, where value is a row of rows, the mask token or nothing.
template <class T>
void merge_tokens(const MergeRows& s, int64_t begin, int64_t end) {
  auto* const memory = static_cast<char*>(scratch(static_cast<size_t>(padded(s.D)) * (sizeof(float) + sizeof(T))));
  auto* const wide = reinterpret_cast<float*>(memory);  // the mask token, and as it is stored
  T* const narrow = reinterpret_cast<T*>(wide + padded(s.D));
  const Source mask{s.mask_token, s.mask_dtype};
  sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V v = s.mask_token != nullptr ? load(mask, i, part) : set1(0.0f);
    store(wide + i, v, part);
    store(narrow + i, v, part);
  });
  of_operand<T>(s.pos_dtype, [&](auto of_pos) MASKACCEL_HOT {
    using P = decltype(of_pos);
    each_row(s.N, begin, end, [&](int64_t b, int64_t n, int64_t row) MASKACCEL_HOT {
      T* const to = static_cast<T*>(s.out) + row * s.D;
      const int32_t slot = s.inverse.of(b)[n];
      const T* const from = slot >= 0 ? row_at<T>(s.rows, b, slot) : narrow;
      if (s.pos.data == nullptr) {
        copy_row<T>(to, from, nullptr, s.D, s.past_cache);
        return;
      }
      const P* const pos = row_at<P>(s.pos, b, n);
      if (slot >= 0) {
        sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
          put(to + i, add(load(from + i, part), load(pos + i, part)), part, s.past_cache);
        });
      } else {
        sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
          put(to + i, add(load(wide + i, part), load(pos + i, part)), part, s.past_cache);
        });
      }
    });
  });
}

// f(full row, rows row, slot, i, part) is the value of a kept token; the others keep their row of full.
template <class T, class F>
MASKACCEL_INLINE void merge_full(const MergeRows& s, int64_t begin, int64_t end, F&& f) {
  each_row(s.N, begin, end, [&](int64_t b, int64_t n, int64_t row) MASKACCEL_HOT {
    T* const to = static_cast<T*>(s.out) + row * s.D;
    const T* const full = row_at<T>(s.full, b, n);
    const int32_t slot = s.inverse.of(b)[n];
    if (slot < 0) {
      copy_row<T>(to, full, nullptr, s.D, s.past_cache);
    } else {
      f(b, slot, full, row_at<T>(s.rows, b, slot), to);
    }
  });
}

template <class T>
void merge_of(const MergeRows& s, int64_t begin, int64_t end) {
  const bool past = s.past_cache;
  switch (s.mode) {
    case Merge::replace:
      merge_full<T>(s, begin, end, [&](int64_t, int32_t, const T*, const T* row, T* to) MASKACCEL_HOT {
        copy_row<T>(to, row, nullptr, s.D, past);
      });
      break;
    case Merge::add_gated:
      of_operand<T>(s.gate_dtype, [&](auto of_gate) MASKACCEL_HOT {
        using G = decltype(of_gate);
        merge_full<T>(s, begin, end, [&](int64_t b, int32_t slot, const T* full, const T* row, T* to) MASKACCEL_HOT {
          const G* const gate = s.gate.data != nullptr ? row_at<G>(s.gate, b, slot) : nullptr;
          sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
            const V v = load(row + i, part), w = load(full + i, part);
            put(to + i, gate != nullptr ? fma(load(gate + i, part), v, w) : add(v, w), part, past);
          });
        });
      });
      break;
    case Merge::blend: {
      const V lam = set1(s.lam), rest = set1(s.rest);
      merge_full<T>(s, begin, end, [&](int64_t, int32_t, const T* full, const T* row, T* to) MASKACCEL_HOT {
        sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
          put(to + i, fma(lam, load(full + i, part), mul(rest, load(row + i, part))), part, past);
        });
      });
      break;
    }
    default:
      merge_tokens<T>(s, begin, end);
  }
  if (past) stream_end();
}

void merge(const MergeRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) { merge_of<decltype(zero)>(s, begin, end); });
}

void merge_dfull(const MergeRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    const V lam = set1(s.lam);
    each_row(s.N, begin, end, [&](int64_t b, int64_t n, int64_t row) MASKACCEL_HOT {
      T* const to = static_cast<T*>(s.out) + row * s.D;
      const T* const dout = row_at<T>(s.full, b, n);
      if (s.inverse.of(b)[n] < 0) {
        copy_row<T>(to, dout, nullptr, s.D, s.past_cache);
      } else if (s.mode == Merge::blend) {
        sweep(s.D, [&](int64_t i, auto part, auto)
                       MASKACCEL_HOT { put(to + i, mul(lam, load(dout + i, part)), part, s.past_cache); });
      } else {
        zero_row(to, s.D);
      }
    });
    if (s.past_cache) stream_end();
  });
}

MASKACCEL_INLINE int32_t token_of(const MergeRows& s, int64_t b, int64_t slot) {
  const int32_t id = s.ids.of(b)[slot];
  return id >= 0 && id < s.N ? id : -1;
}

template <class T>
void drows_of(const MergeRows& s, int64_t begin, int64_t end) {
  const V rest = set1(s.rest);
  of_operand<T>(s.gate_dtype, [&](auto of_gate) MASKACCEL_HOT {
    using G = decltype(of_gate);
    each_row(s.K, begin, end, [&](int64_t b, int64_t slot, int64_t row) MASKACCEL_HOT {
      T* const to = static_cast<T*>(s.out) + row * s.D;
      const int32_t id = token_of(s, b, slot);
      if (id < 0) {
        zero_row(to, s.D);
        return;
      }
      const T* const dout = row_at<T>(s.full, b, id);
      if (s.mode == Merge::blend) {
        sweep(s.D, [&](int64_t i, auto part, auto)
                       MASKACCEL_HOT { put(to + i, mul(rest, load(dout + i, part)), part, s.past_cache); });
      } else if (s.gate.data != nullptr) {
        const G* const gate = row_at<G>(s.gate, b, slot);
        sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
          put(to + i, mul(load(gate + i, part), load(dout + i, part)), part, s.past_cache);
        });
      } else {
        copy_row<T>(to, dout, nullptr, s.D, s.past_cache);
      }
    });
  });
  if (s.past_cache) stream_end();
}

void merge_drows(const MergeRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) { drows_of<decltype(zero)>(s, begin, end); });
}

void merge_dgate(const MergeRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    each_row(s.K, begin, end, [&](int64_t b, int64_t slot, int64_t row) MASKACCEL_HOT {
      float* const to = static_cast<float*>(s.out) + row * s.D;
      const int32_t id = token_of(s, b, slot);
      if (id < 0) {
        zero_row(to, s.D);
        return;
      }
      const T *const dout = row_at<T>(s.full, b, id), *const value = row_at<T>(s.rows, b, slot);
      sweep(s.D, [&](int64_t i, auto part, auto)
                     MASKACCEL_HOT { store(to + i, mul(load(dout + i, part), load(value + i, part)), part); });
    });
  });
}

// f(b, i, sum) for each of `count` items of a chunk, into a row of sums that starts at zero.
template <class F>
MASKACCEL_INLINE void sum_chunks(const MergeRows& s, int64_t count, int64_t begin, int64_t end, F&& f) {
  for (int64_t c = begin; c < end; ++c) {
    const int64_t b = c / s.chunks, from = (c - b * s.chunks) * s.chunk;
    const int64_t to = from + s.chunk < count ? from + s.chunk : count;
    float* const sum = s.partial + c * s.D;
    zero_row(sum, s.D);
    for (int64_t i = from; i < to; ++i) f(b, i, sum);
  }
}

void merge_dgate_sum(const MergeRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    sum_chunks(s, s.K, begin, end, [&](int64_t b, int64_t slot, float* sum) MASKACCEL_HOT {
      const int32_t id = token_of(s, b, slot);
      if (id < 0) return;
      const T *const dout = row_at<T>(s.full, b, id), *const value = row_at<T>(s.rows, b, slot);
      sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
        store(sum + i, fma(load(dout + i, part), load(value + i, part), load(sum + i, part)), part);
      });
    });
  });
}

void merge_dmask_sum(const MergeRows& s, int64_t begin, int64_t end) {
  with_dtype(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    sum_chunks(s, s.N, begin, end, [&](int64_t b, int64_t n, float* sum) MASKACCEL_HOT {
      if (s.inverse.of(b)[n] >= 0) return;
      const T* const dout = row_at<T>(s.full, b, n);
      sweep(s.D, [&](int64_t i, auto part, auto)
                     MASKACCEL_HOT { store(sum + i, add(load(dout + i, part), load(sum + i, part)), part); });
    });
  });
}

template <class T>
void modulate_rows(const GatherModulate& g, int64_t begin, int64_t end) {
  const AdalnForward& s = g.norm;
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(padded(s.D)) * NormedRows<T>::kRows * sizeof(float)));
  NormedRows<T> normed(s, [&] { return (memory += padded(s.D)) - padded(s.D); });
  Unwatched none;
  const auto source = [&](int64_t b, int64_t i) -> const T* {
    const int32_t id = g.ids.of(b)[i];
    return id >= 0 && id < s.N ? row_at<T>(s.x, b, id) : nullptr;
  };
  each_row(g.ids.count, begin, end, [&](int64_t b, int64_t i, int64_t row) MASKACCEL_HOT {
    T* const y = static_cast<T*>(s.y) + row * s.D;
    T* const r = s.r != nullptr ? static_cast<T*>(s.r) + row * s.D : nullptr;
    const T* const x = source(b, i);
    if (x == nullptr) {
      zero_row(y, s.D);
      if (r != nullptr) zero_row(r, s.D);
      return;
    }
    const bool more = i + 1 < g.ids.count && row + 1 < end;
    normed.row(x, y, nullptr, b, g.ids.of(b)[i], {more ? source(b, i + 1) : nullptr, nullptr}, none);
    if (r != nullptr) copy_row<T>(r, x, nullptr, s.D, s.past_cache);
  });
  if (s.past_cache) stream_end();
}

void gather_modulate(const GatherModulate& g, int64_t begin, int64_t end) {
  with_dtype(g.norm.dtype, [&](auto zero) { modulate_rows<decltype(zero)>(g, begin, end); });
}

}  // namespace

const RowsKernels rows_kernels = {gather,      segment,         merge,           merge_dfull,    merge_drows,
                                  merge_dgate, merge_dgate_sum, merge_dmask_sum, gather_modulate};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
