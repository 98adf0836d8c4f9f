// fourier_embed: sines and cosines of coordinates times frequencies, alone and followed by a linear layer.
//
// maths     a[n, d, f] = x[n, d] w[f];  out[n, d F + f] = sin a,  out[n, D F + d F + f] = cos a
//           backward, with g = d_sin cos a - d_cos sin a:  d_x[n, d] = sum_f w[f] g,  d_w[f] = sum_{n, d} x[n, d] g
//           linear: out[n, m] = bias[m] + sum_k weight[m, k] embedding[n, k]
// shapes    x (N, D), frequencies (F,), embedding and its gradient (N, 2 D F), weight (M, 2 D F), bias (M,); contiguous
// work      memory-bound alone; in front of a linear layer the embedding of a block of rows never leaves the cache
// numerics  angles and sums in float (double for double); see common/sincos.h for the reduction. The gradient of the
//           frequencies is summed in fixed blocks of rows, so the number of threads changes nothing.
// limits    any sizes, 64-bit addressing
#pragma once
#include "common/half.h"
#include "common/isa.h"
#include "common/sincos.h"

namespace fourdperf {

struct FourierArgs {
  const void *x, *frequencies;  // x: dtype (fourier_embed_ones: as frequencies); frequencies: f64 for f64, else f32
  const void* d_out;            // backward: dtype
  void *out, *d_x;              // dtype
  void* d_frequencies;          // as frequencies
  const void *weight, *bias;    // linear: dtype; x is then f64 for f64, else f32; bias may be null
  DType dtype;
  int64_t rows, dims, bands, features;
  int threads;        // CPU
  double* workspace;  // CUDA backward: fourier_workspace() doubles
  void* stream;       // CUDA
};

FOURDPERF_DECLARE_CPU(fourier_embed, FourierArgs)
FOURDPERF_DECLARE_CPU(fourier_embed_ones, FourierArgs)  // rows of 2 D F + 1: a one behind the embedding
FOURDPERF_DECLARE_CPU(fourier_embed_backward, FourierArgs)
FOURDPERF_DECLARE_CPU(fourier_linear, FourierArgs)
void fourier_embed_cuda(const FourierArgs& args);
void fourier_embed_backward_cuda(const FourierArgs& args);
void fourier_linear_cuda(const FourierArgs& args);

namespace {

// The frequencies' gradient: so many rows are summed by one task; tasks are then added in order.
constexpr int64_t kFourierTask = 256;

// Doubles of device memory that a CUDA backward needs: one sum per task and band.
inline int64_t fourier_workspace(int64_t rows, int64_t bands) { return (rows + kFourierTask - 1) / kFourierTask * bands; }

}  // namespace
}  // namespace fourdperf
