// Checks of scatter_combine that CPU and CUDA share; the contract is in maskaccel/ops/steps/schema.py.
#pragma once

#include "../common/stable.h"

namespace maskaccel {

struct ScatterArgs {
  Arg history, weights, fresh, index, labels, x, gate;
  int64_t newest = 0, rows = 0;  // rows: fresh ones of a sample
  double gamma = 0.0;
  void* data = nullptr;  // of the newest entry, to be written
};

// Whether the elements of `a` and of (B, N, D) of history at `start` lie in ranges of memory that meet.
inline bool meets(const Arg& a, const Arg& history, const char* start, int64_t item, int64_t a_item) {
  if (!a || a.numel() == 0 || history.numel() == 0) return false;
  int64_t span = 1, written = 1;
  for (int64_t i = 0; i < a.dim; ++i) span += (a.size(i) - 1) * a.stride(i);
  for (int64_t i = 1; i < history.dim; ++i) written += (history.size(i) - 1) * history.stride(i);
  const char* const other = static_cast<const char*>(a.data);
  return other < start + written * item && start < other + span * a_item;
}

// All but what a weighted sum checks anyway.
inline ScatterArgs read_scatter(Inputs& in) {
  ScatterArgs s;
  s.history = in.tensor("history");
  s.weights = in.tensor("weights");
  s.fresh = in.tensor("fresh");
  s.index = in.tensor("index");
  s.labels = in.optional("labels");
  s.x = in.optional("x");
  s.gate = in.optional("gate");
  s.newest = in.integer();
  s.gamma = in.number();
  const Arg& h = s.history;
  STD_TORCH_CHECK(h.dim == 4, "history must be (K, B, N, D), got ", h.dim, " dimensions");
  const int64_t K = h.size(0), B = h.size(1), N = h.size(2), D = h.size(3);
  STD_TORCH_CHECK(s.newest >= 0 && s.newest < K, "newest is ", s.newest, "; allowed are 0 to ", K - 1);
  STD_TORCH_CHECK((K == 1 || h.stride(0) != 0) && (B == 1 || h.stride(1) != 0),
                  "history is written to, so it must not be expanded");
  STD_TORCH_CHECK(s.index.code == codes().i32 && s.index.dim == 2 && s.index.size(0) == B && s.index.contiguous(),
                  "index must be contiguous int32 (B, M)");
  s.rows = s.index.size(1);
  STD_TORCH_CHECK(s.fresh.code == h.code && s.fresh.dim == 3 && s.fresh.size(0) == B && s.fresh.size(1) == s.rows &&
                      s.fresh.size(2) == D && s.fresh.contiguous(),
                  "fresh must be contiguous (B, M, D), M as in index, of the dtype of history");
  STD_TORCH_CHECK(!s.labels || (s.labels.code == codes().i32 && s.labels.dim == 2 && s.labels.size(0) == B &&
                                s.labels.size(1) == N && s.labels.contiguous()),
                  "labels must be contiguous int32 (B, N)");
  STD_TORCH_CHECK(s.gamma >= 0.0 && s.gamma <= 1.0, "gamma is ", s.gamma, "; allowed are 0 to 1");
  STD_TORCH_CHECK(s.gamma == 0.0 || s.labels, "gamma above 0 needs labels");
  const int64_t item = size_of(dtype_of_arg(h));
  MASKACCEL_SHIM(aoti_torch_get_data_ptr(h.handle, &s.data));
  if (h.numel() > 0) s.data = static_cast<char*>(s.data) + s.newest * h.stride(0) * item;
  for (const Arg* a : {&s.fresh, &s.x, &s.gate}) {
    if (!*a) continue;
    STD_TORCH_CHECK(!meets(*a, h, static_cast<const char*>(s.data), item, size_of(dtype_of_arg(*a))), a->name,
                    " shares memory with history[newest], which is written");
  }
  return s;
}

}  // namespace maskaccel
