// sample_logits on CPU tensors; the contract is in maskaccel/ops/tokens/schema.py.
#include "cpu_sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_checks.h"

namespace maskaccel {
namespace {

constexpr int64_t kChunk = 16384;  // logits
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Row {
  int64_t id = 0;
  double confidence = 0.0;
};

// The chunks of a row together, in their order.
Row finish(const Drawn* drawn, int64_t chunks, double scale, Confidence kind, int64_t mask_id) {
  double most = -kInf, second = -kInf;
  const Drawn* best = nullptr;
  bool bad = false;
  for (int64_t c = 0; c < chunks; ++c) {
    const Drawn& d = drawn[c];
    bad |= d.bad;
    if (d.id >= 0 && (best == nullptr || d.best > best->best)) best = &d;
    second = std::max({second, std::min<double>(most, d.most), kind == Confidence::margin ? d.second : -kInf});
    most = std::max<double>(most, d.most);
  }
  if (bad || best == nullptr) return {mask_id, std::numeric_limits<double>::quiet_NaN()};
  double sum = 0.0, weighted = 0.0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (drawn[c].most == -std::numeric_limits<float>::infinity()) continue;
    const double x = (drawn[c].most - most) * scale, factor = std::exp(x);
    sum += drawn[c].sum * factor;
    if (factor > 0.0) weighted += (drawn[c].weighted + x * drawn[c].sum) * factor;
  }
  const double log_probability = (best->logit - most) * scale - std::log(sum);
  switch (kind) {
    case Confidence::margin:
      return {best->id, -std::expm1((second - most) * scale) / sum};
    case Confidence::negative_entropy:
      return {best->id, weighted / sum - std::log(sum)};
    case Confidence::log_probability:
      return {best->id, log_probability};
    default:
      return {best->id, std::exp(log_probability)};
  }
}

void sample_logits(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg logits = in.tensor("logits"), tokens = in.tensor("tokens"), step = in.tensor("step"),
            noise = in.optional("noise");
  const int64_t mask_id = in.integer();
  Sample s;
  s.seed = in.integer();
  s.offset = in.integer();
  const double temperature = in.number();
  s.temperature = static_cast<float>(temperature);
  const int64_t flags = in.integer();
  STD_TORCH_CHECK(logits.dim == 3 && logits.dense_last(), "logits must be (B, N, V) with a contiguous last dim");
  s.dtype = dtype_of_arg(logits);
  s.logits = logits.data;
  s.stride_b = logits.stride(0);
  s.stride_n = logits.stride(1);
  const int64_t B = logits.size(0);
  s.N = logits.size(1);
  s.V = logits.size(2);
  STD_TORCH_CHECK(s.V >= 1 && s.V < int64_t{1} << 31, "logits has a last dim of ", s.V, "; allowed are 1 to 2^31 - 1");
  check_dense(tokens, codes().i64, "int64", {B, s.N});
  check_dense(noise, codes().f32, "float32", {B, s.N, s.V});
  s.noise = noise ? static_cast<const float*>(noise.data) : nullptr;
  s.step = read_step(step);
  constexpr float kMost = std::numeric_limits<float>::max();
  STD_TORCH_CHECK(s.temperature >= 0.0f && s.temperature <= kMost, "temperature is ", s.temperature,
                  "; it must be 0 or more, and finite");
  STD_TORCH_CHECK(flags >= 0 && flags < 8, "unknown flags ", flags);
  const bool scaled = flags & kScaled;
  STD_TORCH_CHECK(!scaled || s.temperature > 0.0f, "temperature is 0; the confidence can not be scaled by it");
  s.kind = static_cast<Confidence>(flags & 3);
  // A lower temperature than 1e-9 leaves one token all the probability; its products would leave fp32.
  s.scale = scaled ? std::min(1.0 / temperature, 1e9) : 1.0;
  Output ids = long_integers({B, s.N}), confidence({B, s.N}, Dtype::f32);
  const auto* const given = static_cast<const int64_t*>(tokens.data);
  auto* const to = static_cast<int64_t*>(ids.data());
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < B * s.N; ++i) {
    to[i] = given[i];
    confidence.floats()[i] = std::numeric_limits<float>::infinity();
    if (given[i] == mask_id) rows.push_back(i);
  }
  const auto count = static_cast<int64_t>(rows.size());
  s.rows = rows.data();
  s.chunk = std::min(s.V, kChunk);
  s.chunks = (s.V + s.chunk - 1) / s.chunk;
  std::vector<Drawn> drawn(static_cast<size_t>(count * s.chunks));
  s.out = drawn.data();
  const SampleKernels& kernels = sample_kernels();
  parallel(count * s.chunks, grain_for(8 * s.chunk),
           [&](int64_t begin, int64_t end) { kernels.sample(s, begin, end); });
  for (int64_t i = 0; i < count; ++i) {
    const Row row = finish(s.out + i * s.chunks, s.chunks, s.scale, s.kind, mask_id);
    to[rows[i]] = row.id;
    confidence.floats()[rows[i]] = static_cast<float>(row.confidence);
  }
  stack[0] = ids.release();
  stack[1] = confidence.release();
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("sample_logits", sample_logits); }

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
