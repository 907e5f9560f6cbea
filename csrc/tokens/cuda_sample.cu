// Binding of sample_logits to CUDA.
#include "cuda_sample.cuh"
#include "cuda_tokens.h"

namespace maskaccel::cuda {
namespace {

void sample_logits(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg logits = in.tensor("logits"), tokens = in.tensor("tokens"), step = in.tensor("step"),
            noise = in.optional("noise");
  SampleParams p;
  p.mask_id = in.integer();
  p.seed = in.integer();
  p.offset = in.integer();
  p.temperature = static_cast<float>(in.number());
  const int64_t flags = in.integer();
  const Call call("sample_logits", logits);
  const Dtype dtype = dtype_of_arg(logits);
  read_rows(call, logits, -1, -1, -1);
  const int64_t batch = logits.size(0), n = logits.size(1), vocabulary = logits.size(2);
  call.check(vocabulary >= 1, "logits must have a last dim of at least 1, got ", shape_text(logits));
  p.logits = logits.data;
  p.logits_b = logits.stride(0);
  p.logits_n = logits.stride(1);
  check_table(call, tokens, codes().i64, "int64", batch, n);
  call.check(tokens.size(0) == batch, "tokens must have the batch of logits, got ", shape_text(tokens));
  p.tokens = static_cast<const int64_t*>(tokens.data);
  p.step = read_step(call, step);
  if (noise) {
    const Activation rows = read_rows(call, noise, batch, n, vocabulary);
    call.check(noise.code == codes().f32, "noise must be float32");
    p.noise = static_cast<const float*>(rows.data);
    p.noise_b = rows.stride_b;
    p.noise_n = rows.stride_n;
  }
  call.check(p.temperature >= 0.f && p.temperature < INFINITY, "temperature is ", p.temperature,
             "; it must be 0 or more and finite");
  call.check(!(flags & kScaled) || p.temperature > 0.f, "a confidence of scaled logits needs a temperature above 0");
  if (flags & kScaled) p.scale = Scale{p.temperature, 1.f / p.temperature};
  p.kind = static_cast<Confidence>(flags & 3);
  p.n = static_cast<int>(n);
  p.vocabulary = static_cast<int>(vocabulary);
  p.rows = batch * n;
  Result ids = long_integers(call, {batch, n}), confidence(call, {batch, n}, Dtype::f32);
  if (p.rows > 0) {
    p.ids = static_cast<int64_t*>(ids.data());
    p.confidence = confidence.floats();
    // Few rows are cut so that about 8 CTAs for each multiprocessor are there, each with 4 vectors a thread at least.
    const int64_t wanted = ceil_div(int64_t(call.info().multiprocessors) * 8, p.rows);
    const int64_t most = std::max<int64_t>(1, ceil_div(vocabulary, kVec) / (4 * kSampleThreads));
    p.splits = static_cast<int>(std::min(wanted, most));
    Workspace workspace(call);
    if (p.splits > 1)
      p.parts = reinterpret_cast<Sampled*>(workspace(p.rows * p.splits * int64_t(sizeof(Sampled) / sizeof(float))));
    call.check(p.rows * p.splits <= kMostRows, "logits is out of range: ", shape_text(logits));
    by_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const dim3 grid(static_cast<unsigned>(p.rows * p.splits));
      launch(call.op(), sample_logits_kernel<T>, grid, kSampleThreads, 0, call.stream(), p);
    });
    if (p.parts != nullptr) {
      const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kSampleThreads / kWarp)));
      launch(call.op(), join_samples_kernel, grid, kSampleThreads, 0, call.stream(), p);
    }
  }
  stack[0] = ids.release();
  stack[1] = confidence.release();
}

void register_ops(Library& m) { m.impl("sample_logits", &sample_logits); }

MASKACCEL_CUDA_LIBRARY(register_ops)

}  // namespace
}  // namespace maskaccel::cuda
