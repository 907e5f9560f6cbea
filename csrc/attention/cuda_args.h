// Arguments of the CUDA attention kernels. Free of torch; the contract is in maskaccel/ops/attention/schema.py.
#pragma once

#include "../common/cuda_common.cuh"
#include "../common/types.h"

namespace maskaccel::cuda {

enum AttentionFlags : int { kKeep = 1, kPrune = 2 };
enum AttentionNeeds : int { kNeedQ = 1, kNeedK = 2, kNeedV = 4, kNeedS = 8, kSameBits = 16 };

/// A (B, S, H, D) operand with a contiguous last dim; strides in elements.
struct Rows {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;
  bool vec = false;   // every row starts on 16 bytes
  bool wide = false;  // fp32 in a call of a 16-bit dtype (out_add alone)
};

/// Lists of the tiles of a mask, by rows or by columns. All null without a mask: every tile is full.
struct TileLists {
  const int* index = nullptr;  // (batch, heads, lines, width)
  const int* count = nullptr;  // (batch, heads, lines, 2): partial, full
  const int* order = nullptr;  // (batch * heads * lines,)
  int64_t width = 0;
  int batch = 1, heads = 1;  // each 1, or that of q
};

/// An operand that broadcasts: stride 0 in a dim of one element.
struct Broadcast {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_q = 0, stride_k = 0;
  bool wide = true;  // fp32, else the dtype of q
};

struct AttentionArgs {
  Dtype dtype = Dtype::bf16;
  int multiprocessors = 0;  // of the device
  int* counter = nullptr;   // of the rows of tiles taken, 0 before and after the launch; sm_90a with lists alone
  int batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, dim = 0;
  Rows q, k, v;
  float scale = 1.f;

  // The mask: tiles of (bm, bn), tile_rows x tile_columns of them.
  int bm = 128, bn = 128, tile_rows = 0, tile_columns = 0;
  TileLists lists, lists_t;
  const int* pattern_of = nullptr;  // (.., tile_rows, tile_columns); both null: no partial tiles
  int64_t pattern_stride_b = 0, pattern_stride_h = 0;
  const int* patterns = nullptr;  // (P, bm, bn / 32)

  // What is added to the scores.
  Broadcast bias;
  const float* relpos_table = nullptr;
  int64_t relpos_stride_h = 0, relpos_stride_q = 0, relpos_stride_k = 0;  // the latter two over samples
  const int *relpos_q = nullptr, *relpos_k = nullptr;

  // Forward.
  void* out = nullptr;   // (B, Sq, H, D) contiguous
  float* lse = nullptr;  // (B, H, Sq) contiguous; read by the backward
  int* keep = nullptr;   // (B, H, tile_rows, keep_words), zeroed before the launch
  int keep_words = 0, flags = 0;
  float skip_threshold = 0.f;
  const float* reference_lse = nullptr;  // (B, H, Sq)
  Broadcast out_scale;                   // stride_k unused
  Rows out_add;

  // Backward. What is not asked for is null.
  Rows dout, result;                                 // result: softmax(s) v
  const float* dlse = nullptr;                       // (B, H, Sq)
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // contiguous, laid out as q, k, v
  float* ds = nullptr;                               // (B, H, Sq, Sk), zeroed before the launch
  int needs = 0;
};

/// With kPrune a tile is judged by the CTA that holds all its rows: the most it may have.
constexpr int most_pruned_rows(int dim) { return dim <= 128 ? 128 : 64; }

/// The path of every GPU from sm_80 on: mma.sync and cp.async.
void launch_sm80(const AttentionArgs& a, Stream stream);

/// Floats that the backward needs as workspace.
int64_t backward_workspace(const AttentionArgs& a);
void launch_sm80_backward(const AttentionArgs& a, float* workspace, Stream stream);

/// Of each query, padded: lse in log2 units, +inf where a row keeps nothing, and delta. (B, H, padded) each.
struct RowTerms {
  float *lse = nullptr, *delta = nullptr;
  int padded = 0;
};
void launch_row_terms(const AttentionArgs& a, const RowTerms& terms, Stream stream);

/// Of each key the attention it receives: fp32 (B, H, Sk).
void launch_sm80_sums(const AttentionArgs& a, float* sums, Stream stream);

#ifdef MASKACCEL_SM90A
/// The path of sm_90a: wgmma and TMA. Where it does not serve a call, the path above does.
bool sm90_serves(const AttentionArgs& a);
void launch_sm90(const AttentionArgs& a, Stream stream);

/// Its backward adds dq up in no fixed order. `workspace` and `sums` are of so many floats, `sums` zeroed.
bool sm90_backward_serves(const AttentionArgs& a);
int64_t sm90_backward_workspace(const AttentionArgs& a);
int64_t sm90_backward_sums(const AttentionArgs& a);
void launch_sm90_backward(const AttentionArgs& a, float* workspace, float* sums, Stream stream);
#endif

}  // namespace maskaccel::cuda
