// cross_attention: many independent queries against one memory of keys and values.
//
// maths     s[i, j] = scale q_i . k_j,  p[i, j] = exp(s[i, j]) / sum_m exp(s[i, m]),  out_i = sum_j p[i, j] v_j,
//           where j and m run over the keys that are not padding. Without any: out_i = 0.
//           stats_i = (m, 1 / sum_j exp(|scale| (x_j - m))), x_j = s[i, j] / |scale|, m near the largest: they give p[i, j]
//           backward: delta_i = sum_j p[i, j] d_out_i . v_j, t[i, j] = p[i, j] (d_out_i . v_j - delta_i),
//           d_q_i = scale sum_j t[i, j] k_j,  d_k_j = scale sum_i t[i, j] q_i,  d_v_j = sum_i p[i, j] d_out_i
// shapes    q (B, Q, H, D), k (B, K, H, D), v (B, K, H, E), d_out (B, Q, H, E), any strides; padding (B, K) bytes or
//           null; out (B, Q, H, E), stats (B, H, 2, Q), d_q, d_k, d_v like q, k, v: contiguous
// work      see cross_attention_tile.h
// numerics  sums and stats in float (double for float64); log(sum exp) in one float would cost the backward two digits
// limits    any sizes; 64-bit addressing
#pragma once
#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

struct Strided {
  const void* data;
  int64_t batch, token, head, channel;  // strides in elements
};

struct CrossAttentionArgs {
  Strided q, k, v;
  const uint8_t* padding;  // (B, K), not 0: this key takes no part; or null
  int64_t batch, queries, keys, heads, size, value_size;  // B, Q, K, H, D, E
  double scale;
  DType dtype;
  void* out;              // forward
  void* stats;            // written by the forward, read by the backward
  Strided d_out;          // backward
  void *d_q, *d_k, *d_v;  // backward
  int threads;
};

FOURDPERF_DECLARE_CPU_AMX(cross_attention, CrossAttentionArgs)
FOURDPERF_DECLARE_CPU_AMX(cross_attention_backward, CrossAttentionArgs)

}  // namespace fourdperf
