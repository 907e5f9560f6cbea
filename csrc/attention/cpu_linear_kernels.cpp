// Linear attention; the formulas are in cpu_linear.h. Compiled once per instruction set; see common/isa.h.
//
// All products are of fp32 numbers: sums of features and the matrix A are not representable in the input's dtype.
#include <type_traits>

#include "cpu_gemm.h"
#include "cpu_linear.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

constexpr int64_t kBlock = LinearAttention::kBlock;

struct Relu {
  // The order of the operands lets NaN through.
  MASKACCEL_INLINE V value(V x) { return vmax(set1(0.0f), x); }
  MASKACCEL_INLINE V slope(V x) { return less(set1(0.0f), x, set1(1.0f), set1(0.0f)); }
};

struct Elu1 {
  MASKACCEL_INLINE V below(V x) { return vexp2(mul(vmin(set1(0.0f), x), set1(1.44269504088896340736f))); }
  MASKACCEL_INLINE V value(V x) { return less(set1(0.0f), x, add(x, set1(1.0f)), below(x)); }
  MASKACCEL_INLINE V slope(V x) { return less(set1(0.0f), x, set1(1.0f), below(x)); }
};

// One head of one sample, from token `from` on.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  Rows(const HeadRows& x, int64_t b, int64_t s, int64_t h)
      : data(static_cast<const T*>(x.data) + x.offset(b, s, h)), stride(x.stride_s) {}
};

template <class M, class T>
MASKACCEL_OUTLINE void features(const Rows<T>& x, int64_t rows, int64_t D, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, to += ld) {
    const T* const row = x.data + i * x.stride;
    each_vector(D, [&](int64_t c, auto part) MASKACCEL_HOT {
      store(to + c, M::value(load(row + c, part)), part);
    });
    fill_zero(to, D, ld);
  }
}

// to = slope(x) * from, in the dtype of x.
template <class M, class T>
MASKACCEL_OUTLINE void store_gradient(const Rows<T>& x, const float* from, int64_t ld, int64_t rows, int64_t D, T* to,
                                      int64_t step) {
  for (int64_t i = 0; i < rows; ++i, from += ld, to += step) {
    const T* const row = x.data + i * x.stride;
    each_vector(D, [&](int64_t c, auto part) MASKACCEL_HOT {
      store(to + c, mul(M::slope(load(row + c, part)), load(from + c, part)), part);
    });
  }
}

// Rows of ld numbers, whole vectors throughout.
MASKACCEL_INLINE float dot(const float* a, const float* b, int64_t ld) {
  V sum = set1(0.0f);
  for (int64_t c = 0; c < ld; c += W) sum = fma(load(a + c, Full{}), load(b + c, Full{}), sum);
  return hsum(sum);
}
MASKACCEL_INLINE void add_scaled(float* to, const float* from, float factor, int64_t ld) {
  const V f = set1(factor);
  for (int64_t c = 0; c < ld; c += W) store(to + c, fma(f, load(from + c, Full{}), load(to + c, Full{})), Full{});
}

// Memory of a thread: matrices of block rows, and one (D, D).
struct Space {
  float *a, *b, *c, *square;
  Space(const LinearAttention& s) {
    const int64_t block = kBlock * s.ld;
    a = static_cast<float*>(scratch(static_cast<size_t>(3 * block + s.D * s.ld) * sizeof(float)));
    b = a + block;
    c = b + block;
    square = c + block;
  }
};

// sums += left^T right, and the vector below += the sum over rows of scale[i] * left[i] (null: 1).
void add_outer(const LinearAttention& s, int64_t rows, const float* left, const float* right, const float* scale,
               float* square, float* sums) {
  // A product from zero, then one addition: short chains keep the rounding of long sums small.
  product<Singles>(s.D, whole_vectors(s.D), rows, left, 1, s.ld, right, s.ld, square, s.ld);
  const int64_t n = whole_vectors(s.D);
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t c = 0; c < n; c += W) {
      float* const to = sums + d * s.ld + c;
      store(to, add(load(to, Full{}), load(square + d * s.ld + c, Full{})), Full{});
    }
  float* const below = sums + s.D * s.ld;
  for (int64_t c = 0; c < s.ld; c += W) {
    V sum = set1(0.0f);
    for (int64_t i = 0; i < rows; ++i)
      sum = fma(set1(scale == nullptr ? 1.0f : scale[i]), load(left + i * s.ld + c, Full{}), sum);
    store(below + c, add(load(below + c, Full{}), sum), Full{});
  }
}

MASKACCEL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class M, class T>
void key_sums_of(const LinearAttention& s, int64_t begin, int64_t end) {
  const Space space(s);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / s.keys.chunks, first = (item - head * s.keys.chunks) * s.keys.chunk;
    const int64_t b = head / s.Hk, h = head - b * s.Hk, last = least(s.Sk, first + s.keys.chunk);
    float* const sums = s.keys.partial + item * s.size();
    fill_zero(sums, 0, s.size());
    for (int64_t j = first; j < last; j += kBlock) {
      const int64_t rows = least(kBlock, last - j);
      const Rows<T> v(s.v, b, j, h);
      features<M>(Rows<T>(s.k, b, j, h), rows, s.D, space.a, s.ld);
      pack_stacked<Singles>(v.data, v.stride, rows, s.D, space.b, s.ld);
      add_outer(s, rows, space.a, space.b, nullptr, space.square, sums);
    }
  }
}

void add_chunks(const LinearAttention& s, const LinearSums& sums, int64_t heads, int64_t begin, int64_t end) {
  const int64_t chunks = heads * sums.chunks, size = s.size();
  const V factor = set1(s.factor);
  for (int64_t m = begin; m < end; ++m)
    for (int64_t c = 0; c < size; c += W) {
      V sum = set1(0.0f);
      for (int64_t i = 0; i < chunks; ++i) sum = add(sum, load(sums.partial + (m * chunks + i) * size + c, Full{}));
      store(sums.total + m * size + c, mul(sum, factor), Full{});
    }
}

template <class M, class T>
void outputs_of(const LinearAttention& s, int64_t begin, int64_t end) {
  const Space space(s);
  const int64_t n = whole_vectors(s.D), group = s.H / s.Hk;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / s.q_blocks(), i = (item - head * s.q_blocks()) * kBlock;
    const int64_t b = head / s.H, h = head - b * s.H, rows = least(kBlock, s.Sq - i);
    const float* const sums = s.keys.total + (b * s.Hk + h / group) * s.size();
    features<M>(Rows<T>(s.q, b, i, h), rows, s.D, space.a, s.ld);
    product<Singles>(rows, n, s.D, space.a, s.ld, 1, sums, s.ld, space.b, s.ld);
    for (int64_t r = 0; r < rows; ++r) {
      const V z = set1(dot(space.a + r * s.ld, sums + s.D * s.ld, s.ld) + s.eps);
      T* const out = static_cast<T*>(s.out) + ((b * s.Sq + i + r) * s.H + h) * s.D;
      each_vector(s.D, [&](int64_t c, auto part) MASKACCEL_HOT {
        store(out + c, div(load(space.b + r * s.ld + c, part), z), part);
      });
    }
  }
}

template <class M, class T>
void query_gradients_of(const LinearAttentionBackward& s, int64_t begin, int64_t end) {
  const Space space(s);
  const int64_t n = whole_vectors(s.D), group = s.H / s.Hk;
  float dz[kBlock];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / s.queries.chunks, first = (item - head * s.queries.chunks) * s.queries.chunk;
    const int64_t b = head / s.H, h = head - b * s.H, last = least(s.Sq, first + s.queries.chunk);
    const float* const sums = s.keys.total + (b * s.Hk + h / group) * s.size();
    const float* const below = sums + s.D * s.ld;
    float* const dsums = s.queries.partial + item * s.size();
    fill_zero(dsums, 0, s.size());
    for (int64_t i = first; i < last; i += kBlock) {
      const int64_t rows = least(kBlock, last - i);
      const Rows<T> q(s.q, b, i, h), dout(s.dout, b, i, h);
      float *const f = space.a, *const dn = space.b, *const df = space.c;
      features<M>(q, rows, s.D, f, s.ld);
      product<Singles>(rows, n, s.D, f, s.ld, 1, sums, s.ld, df, s.ld);  // n_i, for now
      pack_rows<Singles>(dout.data, dout.stride, rows, s.D, dn, s.ld);
      for (int64_t r = 0; r < rows; ++r) {
        float* const g = dn + r * s.ld;
        const float z = dot(f + r * s.ld, below, s.ld) + s.eps;
        V sum = set1(0.0f);
        for (int64_t c = 0; c < n; c += W) {
          const V grad = load(g + c, Full{});
          sum = fma(grad, load(df + r * s.ld + c, Full{}), sum);
          store(g + c, div(grad, set1(z)), Full{});
        }
        dz[r] = -(hsum(sum) / z) / z;
      }
      add_outer(s, rows, f, dn, dz, space.square, dsums);
      pack_transposed<Singles>(sums, s.ld, s.D, s.D, space.square, s.ld);
      product<Singles>(rows, n, s.D, dn, s.ld, 1, space.square, s.ld, df, s.ld);
      for (int64_t r = 0; r < rows; ++r) add_scaled(df + r * s.ld, below, dz[r], n);
      T* const dq = static_cast<T*>(s.dq) + ((b * s.Sq + i) * s.H + h) * s.D;
      store_gradient<M>(q, df, s.ld, rows, s.D, dq, s.H * s.D);
    }
  }
}

template <class M, class T>
void key_gradients_of(const LinearAttentionBackward& s, int64_t begin, int64_t end) {
  const Space space(s);
  const int64_t n = whole_vectors(s.D);
  int64_t transposed = -1;  // the head whose dA^T is in space.square
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / s.k_blocks(), j = (item - head * s.k_blocks()) * kBlock;
    const int64_t b = head / s.Hk, h = head - b * s.Hk, rows = least(kBlock, s.Sk - j);
    const float* const dsums = s.queries.total + head * s.size();
    if (transposed != head) pack_transposed<Singles>(dsums, s.ld, s.D, s.D, space.square, s.ld);
    transposed = head;
    const Rows<T> k(s.k, b, j, h), v(s.v, b, j, h);
    const int64_t at = ((b * s.Sk + j) * s.Hk + h) * s.D, step = s.Hk * s.D;
    features<M>(k, rows, s.D, space.a, s.ld);
    product<Singles>(rows, n, s.D, space.a, s.ld, 1, dsums, s.ld, space.c, s.ld);
    for (int64_t r = 0; r < rows; ++r)
      each_vector(s.D, [&](int64_t c, auto part) MASKACCEL_HOT {
        store(static_cast<T*>(s.dv) + at + r * step + c, load(space.c + r * s.ld + c, part), part);
      });
    pack_rows<Singles>(v.data, v.stride, rows, s.D, space.b, s.ld);
    product<Singles>(rows, n, s.D, space.b, s.ld, 1, space.square, s.ld, space.c, s.ld);
    for (int64_t r = 0; r < rows; ++r) add_scaled(space.c + r * s.ld, dsums + s.D * s.ld, 1.0f, n);
    store_gradient<M>(k, space.c, s.ld, rows, s.D, static_cast<T*>(s.dk) + at, step);
  }
}

// f(feature map, a null pointer to the element type)
template <class F>
MASKACCEL_INLINE void typed(const LinearAttention& s, F&& f) {
  const auto run = [&](auto map) {
    with_dtype(s.dtype, [&](auto t) { f(map, static_cast<decltype(t)*>(nullptr)); });
  };
  if (s.elu) {
    run(Elu1{});
  } else {
    run(Relu{});
  }
}

template <class P>
using Pointed = std::remove_pointer_t<P>;

void key_sums(const LinearAttention& s, int64_t begin, int64_t end) {
  typed(s, [&](auto map, auto type) { key_sums_of<decltype(map), Pointed<decltype(type)>>(s, begin, end); });
}
void outputs(const LinearAttention& s, int64_t begin, int64_t end) {
  typed(s, [&](auto map, auto type) { outputs_of<decltype(map), Pointed<decltype(type)>>(s, begin, end); });
}
void query_gradients(const LinearAttentionBackward& s, int64_t begin, int64_t end) {
  typed(s, [&](auto map, auto type) { query_gradients_of<decltype(map), Pointed<decltype(type)>>(s, begin, end); });
}
void key_gradients(const LinearAttentionBackward& s, int64_t begin, int64_t end) {
  typed(s, [&](auto map, auto type) { key_gradients_of<decltype(map), Pointed<decltype(type)>>(s, begin, end); });
}

}  // namespace

const LinearKernels linear_kernels = {key_sums, add_chunks, outputs, query_gradients, key_gradients};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
