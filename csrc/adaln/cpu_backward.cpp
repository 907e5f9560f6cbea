// Gradients of norm_modulate, gate_residual and their fusion on CPU tensors.
#include "cpu_checks.h"

namespace maskaccel {
namespace {

// Results of a backward op and the reductions that finish them.
class Gradients {
 public:
  Gradients(AdalnBackward& s, int64_t needs) : s_(s), needs_(needs) {
    s.chunk = s.N < kChunk ? (s.N > 0 ? s.N : 1) : kChunk;
    s.chunks = (s.N + s.chunk - 1) / s.chunk;
  }

  // Gradient of an activation; `slot` receives its data.
  void activation(int64_t bit, void*& slot) {
    const bool wanted = needs_ & bit;
    add(wanted ? Output({s_.B, s_.N, s_.D}, s_.dtype) : nothing(s_.dtype));
    if (wanted) slot = out_[count_ - 1].data();
  }

  // fp32 gradient of a modulation: (B|1, F, D), (B, N, D) with rows, (1, 1, D) of a table that stands alone.
  void modulation(int64_t bit, const Modulation& m, const Arg& value, Partial& p) {
    if (!(needs_ & bit) || !m.present()) return add(nothing(Dtype::f32));
    if (!value) return sum({1, 1, s_.D}, s_.N > 0 ? s_.N : 1, p);
    if (s_.rows != nullptr) return sum({s_.B, s_.N, s_.D}, 1, p);
    sum({value.size(0), value.dim == 3 ? value.size(1) : 1, s_.D}, m.group, p);
  }

  void vector(int64_t bit, const void* value, Partial& p) {
    if (!(needs_ & bit) || value == nullptr) return add(nothing(Dtype::f32));
    sum({s_.D}, s_.N > 0 ? s_.N : 1, p);
  }

  void run() {
    if (s_.B * s_.N == 0) {
      for (int i = 0; i < count_; ++i)
        if (zero_when_empty_[i]) std::memset(out_[i].data(), 0, static_cast<size_t>(out_[i].bytes()));
      return;
    }
    const int64_t row_bytes = s_.D * size_of(s_.dtype), outputs = (s_.dx != nullptr) + (s_.da != nullptr);
    s_.past_cache = row_bytes % kLine == 0 && row_bytes * s_.B * s_.N * outputs >= kPastCacheFrom;
    const AdalnKernels& kernels = adaln_kernels();
    const int64_t grain = grain_for(s_.chunk * s_.D);
    parallel(s_.B * s_.chunks, grain, [&](int64_t begin, int64_t end) { kernels.backward(s_, begin, end); });
    for (int i = 0; i < reductions_; ++i) {
      const AdalnReduce& r = reduce_[i];
      const int64_t rows = r.out_b * ((r.N + r.group - 1) / r.group);
      parallel(rows, grain_for(r.D * r.B), [&](int64_t begin, int64_t end) { kernels.reduce(r, begin, end); });
    }
  }

  void release(StableIValue* stack) {
    for (int i = 0; i < count_; ++i) stack[i] = out_[i].release();
  }

 private:
  static constexpr int64_t kChunk = 64;
  static constexpr int kMost = 10;

  void add(Output&& out, bool zero_when_empty = false) {
    zero_when_empty_[count_] = zero_when_empty;
    out_[count_++] = static_cast<Output&&>(out);
  }

  void sum(std::initializer_list<int64_t> sizes, int64_t group, Partial& p) {
    Output result(sizes, Dtype::f32);
    const int64_t out_b = sizes.size() == 3 ? *sizes.begin() : 1;
    float* const data = result.floats();
    add(static_cast<Output&&>(result), true);
    if (s_.B * s_.N == 0) return;
    const int64_t rows = s_.N / group;
    p.group = group;
    if (out_b == s_.B && (s_.chunk % group == 0 || (s_.chunks == 1 && rows == 1))) {
      p.data = data;
      p.per_sample = rows;
      p.per_chunk = s_.chunk / group;
      return;
    }
    p.per_chunk = s_.chunk % group == 0 ? s_.chunk / group : group % s_.chunk == 0 ? 1 : (s_.chunk - 1) / group + 2;
    if (p.per_chunk > rows) p.per_chunk = rows;
    p.per_sample = s_.chunks * p.per_chunk;
    partial_[reductions_] = Output({s_.B * p.per_sample, s_.D}, Dtype::f32);
    p.data = partial_[reductions_].floats();
    AdalnReduce& r = reduce_[reductions_++];
    r = {p.data, data, s_.B, s_.N, s_.D, s_.chunk, p.per_sample, p.per_chunk, group, out_b};
  }

  AdalnBackward& s_;
  int64_t needs_;
  int count_ = 0, reductions_ = 0;
  Output out_[kMost], partial_[kMost];
  bool zero_when_empty_[kMost] = {};
  AdalnReduce reduce_[kMost];
};

void norm_modulate_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dy = in.tensor("dy"), dy2 = in.optional("dy2"), x = in.tensor("x");
  const Arg scale = in.optional("scale"), shift = in.optional("shift"), scale2 = in.optional("scale2"),
            shift2 = in.optional("shift2"), weight = in.optional("weight"), bias = in.optional("bias"),
            scale_table = in.optional("scale_table"), shift_table = in.optional("shift_table"),
            rows = in.optional("rows");
  AdalnBackward s;
  s.eps = static_cast<float>(in.number());
  s.offset = static_cast<float>(in.number());
  Checked check(s, x);
  check.flags(in.integer());
  const int64_t needs = in.integer();
  check.rows(rows);
  s.x = check.activation(x);
  s.dy = check.activation(dy);
  s.dy2 = check.activation(dy2);
  s.scale = check.modulation(scale, scale_table);
  s.shift = check.modulation(shift, shift_table);
  s.scale2 = check.modulation(scale2);
  s.shift2 = check.modulation(shift2);
  s.weight = check.affine(weight);
  s.bias = check.affine(bias);
  check.row_values();
  Gradients g(s, needs);
  g.activation(kNeedX, s.dx);
  g.modulation(kNeedScale, s.scale, scale, s.dscale);
  g.modulation(kNeedShift, s.shift, shift, s.dshift);
  g.modulation(kNeedScale2, s.scale2, scale2, s.dscale2);
  g.modulation(kNeedShift2, s.shift2, shift2, s.dshift2);
  g.vector(kNeedWeight, s.weight, s.dweight);
  g.vector(kNeedBias, s.bias, s.dbias);
  g.run();
  g.release(stack);
}

void gate_residual_norm_modulate_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dr = in.optional("dr"), dy = in.tensor("dy"), dy2 = in.optional("dy2"), r = in.tensor("r"),
            a = in.tensor("a");
  const Arg gate = in.optional("gate"), gate_table = in.optional("gate_table"),
            post_weight = in.optional("post_weight");
  const Arg scale = in.optional("scale"), shift = in.optional("shift"), scale2 = in.optional("scale2"),
            shift2 = in.optional("shift2"), weight = in.optional("weight"), bias = in.optional("bias"),
            scale_table = in.optional("scale_table"), shift_table = in.optional("shift_table"),
            rows = in.optional("rows");
  AdalnBackward s;
  s.eps = static_cast<float>(in.number());
  s.post_eps = static_cast<float>(in.number());
  s.offset = static_cast<float>(in.number());
  Checked check(s, r);
  check.flags(in.integer());
  const int64_t needs = in.integer();
  check.rows(rows);
  s.dr = check.activation(dr);
  s.dy = check.activation(dy);
  s.dy2 = check.activation(dy2);
  s.x = check.activation(r);
  s.a = check.activation(a);
  s.gate = check.modulation(gate, gate_table);
  s.scale = check.modulation(scale, scale_table);
  s.shift = check.modulation(shift, shift_table);
  s.scale2 = check.modulation(scale2);
  s.shift2 = check.modulation(shift2);
  s.post_weight = check.affine(post_weight);
  s.weight = check.affine(weight);
  s.bias = check.affine(bias);
  check.row_values();
  Gradients g(s, needs);
  g.activation(kNeedX, s.dx);
  g.activation(kNeedA, s.da);
  g.modulation(kNeedGate, s.gate, gate, s.dgate);
  g.modulation(kNeedScale, s.scale, scale, s.dscale);
  g.modulation(kNeedShift, s.shift, shift, s.dshift);
  g.modulation(kNeedScale2, s.scale2, scale2, s.dscale2);
  g.modulation(kNeedShift2, s.shift2, shift2, s.dshift2);
  g.vector(kNeedWeight, s.weight, s.dweight);
  g.vector(kNeedBias, s.bias, s.dbias);
  g.vector(kNeedPost, s.post_weight, s.dpost);
  if (s.da == nullptr && s.dgate.data == nullptr && s.dpost.data == nullptr) s.a = {};
  g.run();
  g.release(stack);
}

void gate_residual_backward(StableIValue* stack, uint64_t, uint64_t) {
  Inputs in(stack);
  const Arg dr = in.tensor("dr"), a = in.tensor("a"), gate = in.optional("gate"),
            gate_table = in.optional("gate_table");
  const Arg post_weight = in.optional("post_weight"), rows = in.optional("rows");
  AdalnBackward s;
  s.post_eps = static_cast<float>(in.number());
  Checked check(s, a);
  check.flags(in.integer());
  const int64_t needs = in.integer();
  check.rows(rows);
  s.dr = check.activation(dr);
  s.a = check.activation(a);
  s.gate = check.modulation(gate, gate_table);
  s.post_weight = check.affine(post_weight);
  check.row_values();
  Gradients g(s, needs);
  g.activation(kNeedA, s.da);
  g.modulation(kNeedGate, s.gate, gate, s.dgate);
  g.vector(kNeedPost, s.post_weight, s.dpost);
  g.run();
  g.release(stack);
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("norm_modulate_backward", norm_modulate_backward);
  m.impl("gate_residual_norm_modulate_backward", gate_residual_norm_modulate_backward);
  m.impl("gate_residual_backward", gate_residual_backward);
}

}  // namespace
}  // namespace maskaccel

STABLE_TORCH_LIBRARY_IMPL(maskaccel, CPU, m) { maskaccel::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CPU, m) { maskaccel::implement(m); }
