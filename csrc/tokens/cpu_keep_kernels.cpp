// Random words and metrics by which tokens are ranked. Compiled once per instruction set; see common/isa.h.
#include "cpu_keep.h"
#include "cpu_words.h"

namespace maskaccel {
namespace MASKACCEL_ISA {
namespace {

void words(const Stream& s, uint32_t first, int64_t count, uint32_t* out) {
  const PhiloxWords draw(s);
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, draw(count_from(first + static_cast<uint32_t>(i))));
  for (; i < count; ++i) out[i] = random_word(s, first + static_cast<uint32_t>(i));
}

void aged(const float* score, const int32_t* age, const float* decay, int64_t ages, int64_t count, float* out) {
  const auto last = static_cast<int32_t>(ages < INT32_MAX ? ages - 1 : INT32_MAX);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t at = age[i] < 0 ? 0 : age[i] > last ? last : age[i];
    const float metric = score[i] * decay[at] + 0.0f;
    out[i] = metric != metric ? -__builtin_inff() : metric;
  }
}

void noisy(const float* v, const float* noise, const Stream& s, float temperature, int64_t count, float* out) {
  const PhiloxWords draw(s);
  const V scale = set1(temperature);
  sweep(count, [&](int64_t i, auto part, auto) MASKACCEL_HOT {
    const V g = noise != nullptr ? load(noise + i, part) : gumbel(draw(count_from(static_cast<uint32_t>(i))));
    store(out + i, add(load(v + i, part), mul(scale, g)), part);
  });
}

}  // namespace

const KeepKernels keep_kernels = {words, aged, noisy};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
