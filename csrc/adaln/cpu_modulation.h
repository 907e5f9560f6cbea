// Modulation as the row loops want it: fp32 rows in scratch, rebuilt only when a token reads another row.
#pragma once

#include "../common/vec_pair.h"
#include "cpu_args.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

inline int64_t padded(int64_t d) { return (d + 15) & ~int64_t{15}; }

// Index of the modulation row of token n; -1 where the operand has no value.
MASKACCEL_INLINE const char* row_of(const Modulation& m, const AdalnShape& s, int64_t b, int64_t n) {
  if (m.value == nullptr) return nullptr;
  int64_t offset;
  if (s.rows != nullptr) {
    offset = s.rows[b * s.rows_stride + n] * m.stride_row;
  } else {
    offset = b * m.stride_b + (m.group >= s.N ? 0 : n / m.group) * m.stride_row;
  }
  return static_cast<const char*>(m.value) + offset * size_of(s.mod_dtype);
}

// out = value + table under the law's rounding; absent operands give `neither`.
inline void combine(float* out, const char* row, const void* table, const AdalnShape& s, float neither) {
  const bool narrow = s.flags & kNarrow;
  const Source value{row, s.mod_dtype}, extra{table, s.mod_dtype};
  sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    V v = set1(neither);
    if (row != nullptr) v = load(value, i, part);
    if (table != nullptr) {
      const V t = load(extra, i, part);
      v = row != nullptr ? add(v, t) : t;
      if (narrow && row != nullptr) v = rounded(v, s.mod_dtype);
    }
    store(out + i, v, part);
  });
}

// out = act(gate + table); 1 without a gate
inline void build_gate(float* out, const char* row, const Modulation& m, const AdalnShape& s) {
  combine(out, row, m.table, s, 1.0f);
  const int act = s.flags & kGateActMask;
  if (act == kGateNone || !m.present()) return;
  const bool narrow = s.flags & kNarrow;
  const auto round = [&](float v) {
    return narrow ? s.mod_dtype == Dtype::bf16  ? to_float(bf16{bf16_bits(v)})
                    : s.mod_dtype == Dtype::f16 ? to_float(f16{f16_bits(v)})
                                                : v
                  : v;
  };
  for (int64_t i = 0; i < s.D; ++i) {
    float v = out[i];
    if (act == kGateSigmoid1m) {
      v = 1.0f / (1.0f + __builtin_expf(-round(1.0f - v)));
    } else {
      if (act == kGateClampTanh) v = v > 2.0f ? 2.0f : v < -2.0f ? -2.0f : v;
      v = __builtin_tanhf(v);
    }
    out[i] = round(v);
  }
}

// out = weight + offset, or bias, in fp32; rounded to the weight's dtype where eager would
inline void build_affine(float* out, const void* vector, float plus, float absent, const AdalnShape& s,
                         bool round_sum) {
  const Source src{vector, s.affine_dtype};
  sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    V v = set1(absent);
    if (vector != nullptr) {
      v = load(src, i, part);
      if (plus != 0.0f) {
        v = add(v, set1(plus));
        if (round_sum) v = rounded(v, s.affine_dtype);
      }
    }
    store(out + i, v, part);
  });
}

// The pair of rows that the last loop multiplies by and adds: y = n * mul + add.
struct Affine {
  float *mul, *add;
  const char *scale_row, *shift_row;
  bool built;
};

// fp32 law: norm weight and bias are folded in, y = t * mul + add with t the bare normalised value.
// narrow law: mul = offset + scale and add = shift, each rounded; weight and bias stay apart.
inline void build_affine_pair(Affine& out, const AdalnShape& s, const Modulation& scale, const Modulation& shift,
                              const float* weight, const float* bias, const char* scale_row, const char* shift_row) {
  const bool narrow = s.flags & kNarrow;
  const Source sv{scale_row, s.mod_dtype}, st{scale.table, s.mod_dtype};
  const Source bv{shift_row, s.mod_dtype}, bt{shift.table, s.mod_dtype};
  const V offset = set1(s.offset);
  float* const mul_out = out.mul;
  float* const add_out = out.add;
  const bool has_scale = scale_row != nullptr || scale.table != nullptr;
  sweep(s.D, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    V m = set1(1.0f);
    if (has_scale) {
      m = scale_row != nullptr ? load(sv, i, part) : load(st, i, part);
      if (scale_row != nullptr && scale.table != nullptr) {
        m = add(m, load(st, i, part));
        if (narrow) m = rounded(m, s.mod_dtype);
      }
      m = add(offset, m);
      if (narrow) m = rounded(m, s.mod_dtype);
    }
    V c = set1(0.0f);
    if (shift_row != nullptr) c = load(bv, i, part);
    if (shift.table != nullptr) {
      c = add(c, load(bt, i, part));
      if (narrow) c = rounded(c, s.mod_dtype);
    }
    if (bias != nullptr) c = fma(load(bias + i, part), m, c);
    if (weight != nullptr) m = mul(m, load(weight + i, part));
    store(mul_out + i, m, part);
    store(add_out + i, c, part);
  });
  out.scale_row = scale_row;
  out.shift_row = shift_row;
  out.built = true;
}

// Rebuilds the rows if token n reads others than the last one did; `order` names the type whose pair order they take.
template <class T>
MASKACCEL_INLINE void refresh(Affine& out, const AdalnShape& s, const Modulation& scale, const Modulation& shift,
                              const float* weight, const float* bias, int64_t b, int64_t n, T order) {
  const char* const scale_row = row_of(scale, s, b, n);
  const char* const shift_row = row_of(shift, s, b, n);
  if (out.built && scale_row == out.scale_row && shift_row == out.shift_row) return;
  build_affine_pair(out, s, scale, shift, weight, bias, scale_row, shift_row);
  to_pair_order(out.mul, s.D, order);
  to_pair_order(out.add, s.D, order);
}

// Mean and 1 / deviation of a row, two-pass.
struct Moments {
  float mean, inverse;
};

MASKACCEL_INLINE float inverse_root(float mean_square, float eps) { return 1.0f / __builtin_sqrtf(mean_square + eps); }

template <class S>
MASKACCEL_INLINE Moments moments(const S* row, int64_t d, bool rms, float eps) {
  const float n = static_cast<float>(d);
  const float mean = rms ? 0.0f : row_sum(row, d) / n;
  return {mean, inverse_root(squares(row, d, mean) / n, eps)};
}

}  // namespace
}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
