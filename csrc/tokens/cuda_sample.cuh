// One token for each masked row of logits, and its confidence, in one pass over the row.
//
// A thread walks vectors of the row with an online softmax: largest logit, sum of exponentials, and what the asked
// confidence needs, beside the largest sum of logit and noise. Threads are joined by a fixed tree, and so are the parts
// of a row that several CTAs share where rows are few. Rows that are not masked are not read.
#pragma once

#include <climits>

#include "../common/cuda_common.cuh"
#include "flags.h"
#include "philox.h"

namespace maskaccel::cuda {

constexpr int kSampleThreads = 256;

/// What a part of a row amounts to.
struct Sampled {
  float most, second;   // largest logits
  float sum, weighted;  // of exp(z - most), and of the same times (z - most)
  float score, logit;   // the largest with noise, and its logit
  int id;               // of that; INT_MAX: none yet
  int spoiled;          // a NaN or an infinite logit

  static __device__ __forceinline__ Sampled nothing() {
    return Sampled{-INFINITY, -INFINITY, 0.f, 0.f, -INFINITY, -INFINITY, INT_MAX, 0};
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
  float temperature = 0.f, inverse_temperature = 1.f;  // the latter scales z = logit * inverse_temperature
  Confidence kind = Confidence::probability;
};

/// exp(v - most), 0 for v = -inf.
__device__ __forceinline__ float exp_below(float v, float most) { return v == -INFINITY ? 0.f : expf(v - most); }

__device__ __forceinline__ void rebase(Sampled& s, float most, float scale) {
  if (s.most == most) return;
  const float factor = exp_below(s.most * scale, most * scale);
  if (factor > 0.f) s.weighted += s.sum * (s.most - most) * scale;
  s.sum *= factor;
  s.weighted *= factor;
  s.most = most;
}

__device__ __forceinline__ Sampled join(Sampled a, Sampled b, float scale) {
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

__device__ __forceinline__ Sampled join_warp(Sampled s, float scale) {
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
  const float scale = p.inverse_temperature;
  const bool bad = s.spoiled != 0 || s.most == -INFINITY || s.id == INT_MAX;
  const float lse = logf(s.sum), chosen = (s.logit - s.most) * scale - lse;  // logarithms of probabilities
  float confidence = chosen;
  if (p.kind == Confidence::probability) confidence = expf(chosen);
  if (p.kind == Confidence::margin) confidence = (1.f - exp_below(s.second * scale, s.most * scale)) / s.sum;
  if (p.kind == Confidence::negative_entropy) confidence = s.weighted / s.sum - lse;
  p.ids[row] = bad ? p.mask_id : s.id;
  p.confidence[row] = bad ? NAN : confidence;
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
  const float* noise = p.noise != nullptr ? p.noise + b * p.noise_b + n * p.noise_n : nullptr;
  const maskaccel::Stream stream = stream_of(p.seed, p.offset + b, *p.step, 0, Purpose::sample);
  const uint32_t first_item = static_cast<uint32_t>(n) * static_cast<uint32_t>(p.vocabulary);
  const float scale = p.inverse_temperature;
  // Vectors start where a row of any alignment lies on 16 bytes; the first may begin before the row.
  constexpr int kAligned = 16 / sizeof(T);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(logits) / sizeof(T) % kAligned);
  const int vectors = (p.vocabulary + past + kVec - 1) / kVec, share = (vectors + p.splits - 1) / p.splits;
  const int begin = split * share, end = begin + share < vectors ? begin + share : vectors;

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
      const float below = (z[i] - most) * scale, share_of = expf(below);
      mine.sum += share_of;
      mine.weighted += share_of * below;
      float score = z[i];
      if (p.temperature != 0.f) {
        const float g = noise != nullptr
                            ? noise[v + i]
                            : -logf(-logf(uniform_of(random_word(stream, first_item + static_cast<uint32_t>(v + i)))));
        score += p.temperature * g;
      }
      if (score > mine.score) {
        mine.score = score;
        mine.logit = z[i];
        mine.id = v + i;
      }
    }
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
  for (int i = threadIdx.x & 31; i < p.splits; i += kWarp)
    mine = join(mine, p.parts[row * p.splits + i], p.inverse_temperature);
  mine = join_warp(mine, p.inverse_temperature);
  if ((threadIdx.x & 31) == 0) store_sampled(p, row, mine);
}

}  // namespace maskaccel::cuda
