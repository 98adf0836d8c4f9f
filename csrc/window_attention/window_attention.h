// window_attention: 2-D windowed self-attention over a grid of tokens, per frame and head.
//
// maths     out[i] = sum_j p[i, j] v[j],  p[i, :] = softmax over j in window(i) of scale q[i].k[j]
//           window(i) is a rectangle of keys, given axis by axis (WindowAxis), and E extra tokens that every query sees.
//           With WindowBorder::zero, window_y * window_x - |rectangle| more keys take part with score 0 and value 0.
//           lse[i] = log of the softmax's denominator; backward recomputes p = exp(score - lse):
//           ds = p (d_out.v - d_out.out);  dq = scale sum_j ds k,  dk = scale sum_i ds q,  dv = sum_i p d_out
// shapes    q, k, v (frames, height, width, heads, dim) with strides, the last axis dense; extra_k, extra_v
//           (frames, extra, heads, dim) likewise; out and all gradients dense; lse (frames, heads, height, width), float
//           (double for double). d_out has strides as q has.
// work      a dilated axis falls apart into `dilation` residue classes; each is a grid of its own, with larger strides,
//           so that kernels only ever see contiguous windows
// numerics  16-bit types are widened once; scores, softmax and sums in float (double for double)
// limits    height, width, window and dilation >= 1; windows may exceed the grid
#pragma once
#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

enum class WindowBorder : int { mask = 0, shift = 1, zero = 2 };

struct GridStrides { int64_t frame, y, x, head; };
struct ExtraStrides { int64_t frame, token, head; };

struct WindowAttentionArgs {
  const void *q, *k, *v, *extra_k, *extra_v;  // extra_k, extra_v: null where extra == 0
  void *out, *lse;                            // forward writes them, backward reads them
  const void* d_out;
  void *d_q, *d_k, *d_v, *d_extra_k, *d_extra_v;
  DType dtype;
  int64_t frames, height, width, heads, dim, extra;
  GridStrides q_strides, k_strides, v_strides, d_out_strides;
  ExtraStrides extra_k_strides, extra_v_strides;
  int64_t window_y, window_x, dilation_y, dilation_x;
  WindowBorder border;
  double scale;
  int threads;      // CPU
  void* workspace;  // CUDA, backward: two values of lse's type a query
  void* stream;     // CUDA
};

FOURDPERF_DECLARE_CPU(window_attention, WindowAttentionArgs)
FOURDPERF_DECLARE_CPU(window_attention_backward, WindowAttentionArgs)
void window_attention_cuda(const WindowAttentionArgs& args);
void window_attention_backward_cuda(const WindowAttentionArgs& args);

namespace {

// One axis of a residue class: query q sees the keys first(q) .. end(q), key k is seen by the queries
// first_query(k) .. end_query(k). All four are non-decreasing.
struct WindowAxis {
  int64_t size, window;
  bool shift;

  FOURDPERF_HOST_DEVICE WindowAxis(int64_t size, int64_t window, WindowBorder border)
      : size(size), window(window), shift(border == WindowBorder::shift) {}

  FOURDPERF_HOST_DEVICE int64_t first(int64_t q) const {
    int64_t first = q - window / 2;
    if (shift && first > size - window) first = size - window;
    return first > 0 ? first : 0;
  }
  FOURDPERF_HOST_DEVICE int64_t end(int64_t q) const {
    const int64_t end = (shift ? first(q) : q - window / 2) + window;
    return end < size ? end : size;
  }
  FOURDPERF_HOST_DEVICE int64_t first_query(int64_t k) const {
    const int64_t first = shift && k < window ? 0 : k - window + 1 + window / 2;
    return first > 0 ? first : 0;
  }
  FOURDPERF_HOST_DEVICE int64_t end_query(int64_t k) const {
    const int64_t end = shift && k >= size - window ? size : k + window / 2 + 1;
    return end < size ? end : size;
  }
};

// Tokens of residue class r of an axis with `size` tokens.
FOURDPERF_HOST_DEVICE int64_t class_size(int64_t size, int64_t dilation, int64_t r) { return (size - r + dilation - 1) / dilation; }

}  // namespace
}  // namespace fourdperf
