// The forecast of a whole stack in one launch: the residual stream is read and written once, whatever the number of sites.
#pragma once

#include "cuda_steps.cuh"

namespace maskaccel::cuda {

/// The call of site 0; the operands of the other sites follow at these strides (elements).
struct SitesParams : HistoryParams {
  int sites = 1;
  int64_t history_s = 0, weights_s = 0, gate_s = 0;
};

/// A thread sums one vector of one token over all sites in registers. Sums of a site first, as the reference does: Taylor
/// weights cancel within a site. H: dtype of the history; T: dtype of x and of the result. An fp32 history has twice the
/// bytes in flight and would spill in 64 registers on sm_100 and sm_120.
template <typename H, typename T>
__global__ void __launch_bounds__(256, sizeof(H) == 4 ? 3 : 4) sites_kernel(const __grid_constant__ SitesParams p) {
  const int vectors = (p.width + kVec - 1) / kVec;
  const int64_t total = int64_t(p.batch) * p.tokens * vectors;
  for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < total; k += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = k / vectors;
    const int d = static_cast<int>(k % vectors) * kVec, b = static_cast<int>(row / p.tokens);
    const int n = static_cast<int>(row % p.tokens);
    const H* history = static_cast<const H*>(p.history) + b * p.history_b + int64_t(n) * p.width;
    int64_t gate = b * p.gate_b + (n / p.group) * p.gate_g;
    HistoryParams site = p;  // only its weights move
    Floats sum = zeros();
    for (int s = 0; s < p.sites; ++s) {
      Floats one = zeros();
      for (int t = 0; t < p.terms; ++t) {
        add_term(site, t, d, to_floats<H>(load_pack(history + t * p.history_k, d, p.width, p.history_vec)), one);
      }
      if (p.gate != nullptr) {
        const Floats g = load_operand<T>(p.gate, gate, p.gate_wide, d, p.width, p.gate_vec);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += g[i] * one[i];
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += one[i];
      }
      history += p.history_s;
      gate += p.gate_s;
      site.weights += p.weights_s;
    }
    site.gate = nullptr;  // in the sum already
    store_sum<T>(site, b, n, d, sum);
  }
}

}  // namespace maskaccel::cuda
