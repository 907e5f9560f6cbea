// Linear attention: what the CPU kernels are told. Free of torch.
//
// Of a sample and key head, with phi the feature map, c = 1 ("sum") or 1 / Sk ("mean"):
//
//   A = c sum_j phi(k_j)^T v_j  (D x D)      s = c sum_j phi(k_j)  (D)
//   z_i = phi(q_i) . s + eps                 o_i = n_i / z_i,  n_i = phi(q_i) A
//
// Backward, of g_i = d o_i; the query heads of a key head add up in dA and ds:
//
//   dn_i = g_i / z_i                         dz_i = -(g_i . n_i) / z_i^2
//   dq_i = phi'(q_i) * (dn_i A^T + dz_i s)   dA = c sum_i phi(q_i)^T dn_i,  ds = c sum_i dz_i phi(q_i)
//   dk_j = phi'(k_j) * (v_j dA^T + ds)       dv_j = phi(k_j) dA
//
// so the backward is a pass over keys (A, s), one over queries (dq, dA, ds) and one over keys again. Sums over tokens
// are formed in chunks whose number depends on the shape alone, then added in order: the same bits on any number of
// threads.
#pragma once

#include "cpu_problem.h"

namespace maskaccel {

// A (D, D) matrix and a vector below it, rows of `ld` numbers.
struct LinearSums {
  float* partial = nullptr;  // (B, Hk, chunks of all heads of the key head)
  float* total = nullptr;    // (B, Hk)
  int64_t chunk = 0;         // tokens
  int64_t chunks = 0;        // of a head
};

struct LinearAttention {
  static constexpr int64_t kBlock = 64;  // tokens at a time
  int64_t B = 0, Sq = 0, Sk = 0, H = 0, Hk = 0, D = 0, ld = 0;
  Dtype dtype = Dtype::f32;
  bool elu = false;
  float factor = 1.0f, eps = 0.0f;  // c, and the term of z
  HeadRows q, k, v;
  LinearSums keys;      // A and s
  void* out = nullptr;  // (B, Sq, H, D)
  int64_t size() const { return (D + 1) * ld; }
  int64_t q_blocks() const { return (Sq + kBlock - 1) / kBlock; }
  int64_t k_blocks() const { return (Sk + kBlock - 1) / kBlock; }
};

struct LinearAttentionBackward : LinearAttention {
  HeadRows dout;
  LinearSums queries;                                  // dA and ds
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // contiguous
};

struct LinearKernels {
  void (*key_sums)(const LinearAttention&, int64_t begin, int64_t end);  // chunks of all key heads
  // Matrices of all key heads; `heads` query heads of each have partial sums.
  void (*add_chunks)(const LinearAttention&, const LinearSums&, int64_t heads, int64_t begin, int64_t end);
  void (*outputs)(const LinearAttention&, int64_t begin, int64_t end);                  // blocks of all query heads
  void (*query_gradients)(const LinearAttentionBackward&, int64_t begin, int64_t end);  // chunks of all query heads
  void (*key_gradients)(const LinearAttentionBackward&, int64_t begin, int64_t end);    // blocks of all key heads
};

MASKACCEL_DISPATCH(LinearKernels, linear_kernels)

}  // namespace maskaccel
