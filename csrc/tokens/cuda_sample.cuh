// One token for each masked row of logits, and its confidence, in one pass over the row.
//
// A thread walks vectors of the row with an online softmax: largest logit, sum of exponentials, and what the asked
// confidence needs, beside the largest sum of logit and noise; noise is drawn where it can decide. Threads are joined
// by a fixed tree, and so are the parts of a row that several CTAs share where rows are few. Rows that are not masked
// are not read.
#pragma once

#include <climits>

#include "../common/cuda_common.cuh"
#include "flags.h"
#include "philox.h"

namespace maskaccel::cuda {

constexpr int kSampleThreads = 256;
// Bounds of Gumbel noise of u from 2^-24 to 1 - 2^-24: -log(24 log 2) and 24 log 2, and a little.
constexpr float kLeastNoise = -2.82f, kMostNoise = 16.64f;

/// What a part of a row amounts to.
struct Sampled {
  float most, second;   // largest logits
  float sum, weighted;  // of exp(z) with z = (logit - most) / scale, and of z exp(z)
  float score, logit;   // the largest with noise, and its logit
  int id;               // of that; INT_MAX: none yet
  int spoiled;          // a NaN or an infinite logit

  static __device__ __forceinline__ Sampled nothing() {
    return Sampled{-INFINITY, -INFINITY, 0.f, 0.f, -INFINITY, -INFINITY, INT_MAX, 0};
  }
};

/// d / temperature, as a division rounds it.
struct Scale {
  float divisor = 1.f, inverse = 1.f;

  __device__ __forceinline__ float operator()(float d) const {
    const float first = d * inverse;
    return d == -INFINITY ? d : fmaf(fmaf(-first, divisor, d), inverse, first);
  }
};

struct SampleParams {
  const void* logits = nullptr;
  int64_t logits_b = 0, logits_n = 0;
  const float* noise = nullptr;
  int64_t noise_b = 0, noise_n = 0;
  const int64_t *tokens = nullptr, *step = nullptr;
  int64_t mask_id = 0, seed = 0, offset = 0;
  int64_t* ids = nullptr;
  float* confidence = nullptr;
  Sampled* parts = nullptr;  // (B * N, splits); null: a CTA has the whole row
  int64_t rows = 0;          // B * N
  int n = 0, vocabulary = 0, splits = 1;
  float temperature = 0.f;
  Scale scale;  // of the logits in the confidence
  Confidence kind = Confidence::probability;
};

__device__ __forceinline__ void rebase(Sampled& s, float most, const Scale& scale) {
  if (s.most == most) return;
  const float moved = s.most == -INFINITY ? 0.f : scale(s.most - most);  // of nothing, 0 remains 0
  const float factor = expf(moved);
  s.weighted = (s.weighted + s.sum * moved) * factor;
  s.sum *= factor;
  s.most = most;
}

__device__ __forceinline__ Sampled join(Sampled a, Sampled b, const Scale& scale) {
  const float most = fmaxf(a.most, b.most), runner_up = fminf(a.most, b.most);
  a.second = fmaxf(runner_up, fmaxf(a.second, b.second));
  rebase(a, most, scale);
  rebase(b, most, scale);
  a.sum += b.sum;
  a.weighted += b.weighted;
  if (b.score > a.score || (b.score == a.score && b.id < a.id)) {
    a.score = b.score;
    a.logit = b.logit;
    a.id = b.id;
  }
  a.spoiled |= b.spoiled;
  return a;
}

__device__ __forceinline__ Sampled join_warp(Sampled s, const Scale& scale) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Sampled other{shuffle_xor(s.most, mask),     shuffle_xor(s.second, mask), shuffle_xor(s.sum, mask),
                        shuffle_xor(s.weighted, mask), shuffle_xor(s.score, mask),  shuffle_xor(s.logit, mask),
                        shuffle_xor(s.id, mask),       shuffle_xor(s.spoiled, mask)};
    s = join(s, other, scale);
  }
  return s;
}

__device__ __forceinline__ void store_sampled(const SampleParams& p, int64_t row, const Sampled& s) {
  const bool bad = s.spoiled != 0 || s.most == -INFINITY || s.id == INT_MAX;
  const float below = p.scale(s.logit - s.most);  // of the id; its probability is exp(below) / sum
  float confidence = below - logf(s.sum);
  if (p.kind == Confidence::probability) confidence = expf(below) / s.sum;
  if (p.kind == Confidence::margin) confidence = -expm1f(p.scale(s.second - s.most)) / s.sum;
  if (p.kind == Confidence::negative_entropy) confidence = s.weighted / s.sum - logf(s.sum);
  p.ids[row] = bad ? p.mask_id : s.id;
  p.confidence[row] = bad ? NAN : confidence;
}

__device__ __forceinline__ void offer(Sampled& s, float score, float logit, int id) {
  if (score > s.score) {
    s.score = score;
    s.logit = logit;
    s.id = id;
  }
}

template <typename T>
__device__ __forceinline__ Pack<T> load_logits(const T* row, int at, int end) {
  if (at >= 0 && at + kVec <= end) return load_words(row + at);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kVec; ++i) pack[i] = at + i >= 0 && at + i < end ? row[at + i] : T(-INFINITY);
  return pack;
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads) sample_logits_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Sampled of_warps[kSampleThreads / kWarp];
  const int64_t row = blockIdx.x / p.splits;
  const int split = blockIdx.x % p.splits, b = static_cast<int>(row / p.n), n = static_cast<int>(row % p.n);
  const int64_t token = p.tokens[row];
  if (token != p.mask_id) {
    if (threadIdx.x == 0 && split == 0) {
      p.ids[row] = token;
      p.confidence[row] = INFINITY;
    }
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + b * p.logits_b + n * p.logits_n;
  const float* noise = p.noise != nullptr && p.temperature != 0.f ? p.noise + b * p.noise_b + n * p.noise_n : nullptr;
  const maskaccel::Stream stream = stream_of(p.seed, p.offset + b, *p.step, 0, Purpose::sample);
  const uint32_t first_item = static_cast<uint32_t>(n) * static_cast<uint32_t>(p.vocabulary);
  const Scale scale = p.scale;
  // Vectors start where a row of any alignment lies on 16 bytes; the first may begin before the row.
  constexpr int kAligned = 16 / sizeof(T);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(logits) / sizeof(T) % kAligned);
  const int vectors = (p.vocabulary + past + kVec - 1) / kVec, share = (vectors + p.splits - 1) / p.splits;
  const int begin = split * share, end = begin + share < vectors ? begin + share : vectors;

  const bool drawn = p.temperature != 0.f && noise == nullptr;
  // What the winner has at least, as far as the CTA knows. Whichever thread writes last, it is true.
  __shared__ float reached;
  if (threadIdx.x == 0) reached = -INFINITY;
  sync_threads();
  Sampled mine = Sampled::nothing();
  int at = begin + threadIdx.x;
  Pack<T> next;
  if (at < end) next = load_logits(logits, at * kVec - past, p.vocabulary);
  for (; at < end; at += kSampleThreads) {
    const int v = at * kVec - past;
    const Floats z = to_floats<T>(next);
    if (at + kSampleThreads < end) next = load_logits(logits, v + kSampleThreads * kVec, p.vocabulary);
    float most = mine.most;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      mine.spoiled |= z[i] != z[i] || z[i] == INFINITY ? 1 : 0;
      if (p.kind == Confidence::margin) {
        mine.second = fmaxf(mine.second, fminf(most, z[i]));
      }
      most = fmaxf(most, z[i]);
    }
    rebase(mine, most, scale);
    if (most == -INFINITY) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (z[i] == -INFINITY) continue;
      const float below = scale(z[i] - most), share_of = expf(below);
      mine.sum += share_of;
      mine.weighted += share_of * below;
    }
    if (!drawn) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const bool inside = v + i >= 0 && v + i < p.vocabulary;
        offer(mine, noise != nullptr && inside ? z[i] + p.temperature * noise[v + i] : z[i], z[i], v + i);
      }
      continue;
    }
    // Noise has bounds, so most logits cannot win, and need none: a lane draws for the others of its vector alone.
    volatile float& shared = reached;
    float least = fmaxf(fmaxf(mine.score, shared), most + p.temperature * kLeastNoise);
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kVec; ++i) wanted |= z[i] + p.temperature * kMostNoise >= least ? 1u << i : 0u;
    while (wanted != 0) {
      const int i = lowest_bit(wanted);
      wanted &= wanted - 1;
      float logit = z[0];
#pragma unroll
      for (int k = 1; k < kVec; ++k) logit = i == k ? z[k] : logit;
      const float u = uniform_of(random_word(stream, first_item + static_cast<uint32_t>(v + i)));
      offer(mine, logit + p.temperature * -logf(-logf(u)), logit, v + i);
    }
    least = fmaxf(least, mine.score);
    if (least > shared) shared = least;
  }
  mine = join_warp(mine, scale);
  const int lane = threadIdx.x & 31;
  if (lane == 0) of_warps[threadIdx.x / kWarp] = mine;
  sync_threads();
  if (threadIdx.x >= kWarp) return;
  mine = join_warp(lane < kSampleThreads / kWarp ? of_warps[lane] : Sampled::nothing(), scale);
  if (lane != 0) return;
  if (p.parts != nullptr) {
    p.parts[row * p.splits + split] = mine;
  } else {
    store_sampled(p, row, mine);
  }
}

/// Joins the parts of rows: a warp for each.
static __global__ void __launch_bounds__(kSampleThreads) join_samples_kernel(const __grid_constant__ SampleParams p) {
  const int64_t row = int64_t(blockIdx.x) * (kSampleThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.rows || p.tokens[row] != p.mask_id) return;  // whole warps
  Sampled mine = Sampled::nothing();
  for (int i = threadIdx.x & 31; i < p.splits; i += kWarp) mine = join(mine, p.parts[row * p.splits + i], p.scale);
  mine = join_warp(mine, p.scale);
  if ((threadIdx.x & 31) == 0) store_sampled(p, row, mine);
}

}  // namespace maskaccel::cuda
