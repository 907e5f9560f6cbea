// Random numbers of the token ops: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
// 2011), one word for each item, and the integer keys by which tokens are ranked. CPU and CUDA kernels share them, so
// they draw the same tokens. Free of CUDA and of torch; the contract is in maskaccel/ops/tokens/schema.py.
#pragma once

#include <cstdint>
#include <cstring>

// static: a source compiled once per instruction set must not share its inline functions (common/isa.h).
#ifdef __CUDACC__
#define MASKACCEL_SHARED static __host__ __device__ __forceinline__
#else
#define MASKACCEL_SHARED static inline __attribute__((always_inline, unused))
#endif

namespace maskaccel {

enum class Purpose : uint32_t { keep, sample, select };

namespace philox {
constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;    // multipliers of counter words 0 and 2
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // what the key words grow by
constexpr int kRounds = 10;
}  // namespace philox

// What the items of one sample share: the key, and the counter words after the item.
struct Stream {
  uint32_t key0, key1, sample, step, route;
};

// `sample` is the number of the sample among all ranks and accumulation steps.
MASKACCEL_SHARED Stream stream_of(int64_t seed, int64_t sample, int64_t step, int64_t route, Purpose purpose) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(sample),
          static_cast<uint32_t>(step), static_cast<uint32_t>(route) | static_cast<uint32_t>(purpose) << 24};
}

// The first result of Philox for one item, which counts modulo 2^32.
MASKACCEL_SHARED uint32_t random_word(const Stream& s, uint32_t item) {
  uint32_t c0 = item, c1 = s.sample, c2 = s.step, c3 = s.route, k0 = s.key0, k1 = s.key1;
  for (int round = 0; round < philox::kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(philox::kMul0) * c0, p1 = static_cast<uint64_t>(philox::kMul1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
  return c0;
}

// Uniform in (0, 1), exact in fp32; Gumbel noise is -log(-log(u)).
MASKACCEL_SHARED float uniform_of(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

// Token t of `random_keep`: the smallest keys are kept, so forced tokens come first and no two keys are equal.
MASKACCEL_SHARED uint64_t keep_key(uint32_t word, uint32_t token, bool forced) {
  return static_cast<uint64_t>(forced ? 0 : 1) << 56 | static_cast<uint64_t>(word) << 24 | token;
}

// A key that falls as v rises, 0.0 and -0.0 alike; v must be no NaN.
MASKACCEL_SHARED uint32_t falling_key(float v) {
  v += 0.0f;  // -0.0 becomes 0.0
  uint32_t bits = 0;
  std::memcpy(&bits, &v, sizeof bits);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// The float whose key is `falling_key`.
MASKACCEL_SHARED float of_falling_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key : ~key & 0x7fffffffu;
  float v = 0.0f;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Rank of token t by descending v, ties ascending: the smallest key is the best token.
MASKACCEL_SHARED uint64_t rank_key(float v, uint32_t token) {
  return static_cast<uint64_t>(falling_key(v)) << 32 | token;
}

}  // namespace maskaccel
