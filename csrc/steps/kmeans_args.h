// Checks of kmeans that CPU and CUDA share; the contract is in maskaccel/ops/steps/schema.py.
#pragma once

#include "../common/stable.h"

namespace maskaccel {

struct KMeansArgs {
  Arg x, init;
  int64_t B = 0, N = 0, D = 0, k = 0, iters = 0, metric = 0;
};

inline KMeansArgs read_kmeans(Inputs& in) {
  KMeansArgs a;
  a.x = in.tensor("x");
  a.init = in.optional("init");
  a.k = in.integer();
  a.iters = in.integer();
  a.metric = in.integer();
  STD_TORCH_CHECK(a.x.dim == 3 && a.x.dense_last(), "x must be (B, N, D) with a contiguous last dim");
  dtype_of_arg(a.x);  // refuses others
  a.B = a.x.size(0);
  a.N = a.x.size(1);
  a.D = a.x.size(2);
  STD_TORCH_CHECK(a.D > 0, "x must have a last dim of at least 1");
  STD_TORCH_CHECK(a.k >= 1 && a.k <= a.N && a.k <= 1024, "k is ", a.k, "; allowed are 1 to the smaller of ", a.N,
                  " tokens and 1024");
  STD_TORCH_CHECK(a.iters >= 0 && a.iters <= 1000, "iters is ", a.iters, "; allowed are 0 to 1000");
  STD_TORCH_CHECK(a.metric >= 0 && a.metric <= 2, "metric is ", a.metric, "; allowed are 0 to 2");
  STD_TORCH_CHECK(!a.init || (a.init.code == codes().f32 && a.init.dim == 3 && a.init.size(0) == a.B &&
                              a.init.size(1) == a.k && a.init.size(2) == a.D && a.init.contiguous()),
                  "init must be contiguous float32 (B, k, D)");
  return a;
}

}  // namespace maskaccel
