// Clusters of tokens: what the CPU kernels are told. Free of torch.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace maskaccel {

enum class Metric : int { l2, l1, cosine };

struct Assign {
  const void* x = nullptr;
  int64_t stride_b = 0, stride_n = 0, N = 0, D = 0, k = 0;
  int64_t chunk = 0, chunks = 0;  // tokens of a chunk, chunks of a sample
  Dtype dtype = Dtype::f32;
  Metric metric = Metric::l2;
  float* centroids = nullptr;        // (B, k, D)
  const float* scale = nullptr;      // (B, k) one over the length of each centroid; for cosine
  int32_t* labels = nullptr;         // (B, N)
  float* distance = nullptr;         // (B, N, k) or null
  float* sums = nullptr;             // (B, chunks, k, D) or null; written where there is a member
  int32_t* counts = nullptr;         // (B, chunks, k), with sums
};

struct Center {
  int64_t D = 0, k = 0, chunks = 0;
  const float* sums = nullptr;
  const int32_t* counts = nullptr;
  float* centroids = nullptr;
};

struct KMeansKernels {
  void (*start)(const Assign&, int64_t begin, int64_t end);   // clusters of all samples: evenly spaced tokens
  void (*assign)(const Assign&, int64_t begin, int64_t end);  // chunks of all samples
  void (*center)(const Center&, int64_t begin, int64_t end);  // clusters of all samples
};

MASKACCEL_DISPATCH(KMeansKernels, kmeans_kernels)

}  // namespace maskaccel
