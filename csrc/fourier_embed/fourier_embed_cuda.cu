// fourier_embed, its gradients and fourier_linear on CUDA. The header states maths and shapes.
//
// work      embed: a block owns rows of about kTile angles; neighbouring threads, neighbouring bands.
//           backward: a block owns kTaskRows rows; d_sin cos a - d_cos sin a of a tile goes to shared memory, from where a thread
//           sums it along the bands (d_x) and a warp along the coordinates (d_frequencies, into the block's row of the
//           workspace); one more launch adds these rows.
//           linear: a block owns 64 x 64 outputs, a thread 4 x 4; the slice of the embedding is made in shared memory.
//           (Tensor cores are left to the Triton kernel.)
// numerics  as in the header; deterministic, no atomics
// limits    D F below 2^22, M below 2^22; 64-bit addressing
#include "common/cuda.h"
#include "common/dispatch.h"
#include "fourier_embed/fourier_embed.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // blocks that shall fit a multiprocessor: 64 registers a thread, no spills
constexpr int kTile = 2048;
constexpr int64_t kTaskRows = kFourierTask;
constexpr int kSide = 64, kDepth = 8;  // linear: tile of the output, angles of a slice

template <class X, class A>
__global__ void __launch_bounds__(kThreads, kBlocks) embed_kernel(const X* __restrict__ x, const A* __restrict__ f, X* __restrict__ out,
                                                         int64_t rows, int dims, int bands, int rows_per_block) {
  const int per_row = dims * bands;
  for (int64_t row = int64_t(blockIdx.x) * rows_per_block; row < rows; row += int64_t(gridDim.x) * rows_per_block) {
    const int count = int(rows - row < rows_per_block ? rows - row : rows_per_block) * per_row;
    const X* x_block = x + row * dims;
    X* out_block = out + row * 2 * per_row;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int r = i / per_row, coordinate = i / bands;
      A s, c;
      sincos_product(A(to_float(x_block[coordinate])), f[i - coordinate * bands], s, c);
      X* to = out_block + int64_t(r) * per_row + i;
      to[0] = from_float<X>(s);
      to[per_row] = from_float<X>(c);
    }
  }
}

template <class A> __device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class X, class A>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_kernel(const X* __restrict__ d_out, const X* __restrict__ x,
                                                            const A* __restrict__ f, X* __restrict__ d_x,
                                                            double* __restrict__ sums, int64_t rows, int dims, int bands) {
  __shared__ A g[kTile];
  __shared__ A x_tile[kThreads];
  const int64_t per_row = int64_t(dims) * bands;
  const int wide = bands < 128 ? bands : 128, deep = kTile / wide < kThreads ? kTile / wide : kThreads;  // bands, coordinates
  const int64_t row = blockIdx.x * kTaskRows;
  const int count = int(rows - row < kTaskRows ? rows - row : kTaskRows) * dims;
  x += row * dims, d_x += row * dims, d_out += row * 2 * per_row;
  double* sum = sums + int64_t(blockIdx.x) * bands;
  for (int b = threadIdx.x; b < bands; b += kThreads) sum[b] = 0;
  __syncthreads();
  for (int base = 0; base < count; base += deep) {
    const int coordinates = count - base < deep ? count - base : deep;
    if (threadIdx.x < coordinates) x_tile[threadIdx.x] = to_float(x[base + threadIdx.x]);
    __syncthreads();
    A along = 0;
    for (int band = 0; band < bands; band += wide) {
      const int width = bands - band < wide ? bands - band : wide;
      for (int i = threadIdx.x; i < coordinates * width; i += kThreads) {
        const int q = i / width, b = i - q * width;
        const int n = (base + q) / dims;
        const X* d = d_out + n * per_row + int64_t(base + q) * bands + band + b;
        A s, c;
        sincos_product(x_tile[q], f[band + b], s, c);
        g[q * wide + b] = to_float(d[0]) * c - to_float(d[per_row]) * s;
      }
      __syncthreads();
      if (threadIdx.x < coordinates) {
        for (int b = 0; b < width; ++b) along += g[threadIdx.x * wide + b] * f[band + b];
      }
      for (int b = threadIdx.x / 32; b < width; b += kThreads / 32) {
        A across = 0;
        for (int q = threadIdx.x % 32; q < coordinates; q += 32) across += g[q * wide + b] * x_tile[q];
        across = warp_sum(across);
        if (threadIdx.x % 32 == 0) sum[band + b] += across;
      }
      __syncthreads();
    }
    if (threadIdx.x < coordinates) d_x[base + threadIdx.x] = from_float<X>(along);
  }
}

template <class A>
__global__ void add_kernel(const double* __restrict__ sums, A* __restrict__ d_frequencies, int64_t tasks, int bands) {
  const int band = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (band >= bands) return;
  double sum = 0;
  for (int64_t task = threadIdx.x % 32; task < tasks; task += 32) sum += sums[task * bands + band];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) d_frequencies[band] = A(sum);
}

template <class W, class A>
__global__ void __launch_bounds__(kThreads, kBlocks) linear_kernel(const A* __restrict__ x, const A* __restrict__ f,
                                                          const W* __restrict__ weight, const W* __restrict__ bias,
                                                          W* __restrict__ out, int64_t rows, int dims, int bands,
                                                          int64_t features) {
  __shared__ A e[2 * kDepth][kSide + 4], w[2 * kDepth][kSide + 4];  // k after k: sines of the slice, then its cosines
  const int per_row = dims * bands;
  const int64_t row = int64_t(blockIdx.x) * kSide, column = int64_t(blockIdx.y) * kSide;
  const int tx = threadIdx.x % 16 * 4, ty = threadIdx.x / 16 * 4;
  A sum[4][4] = {};
  for (int start = 0; start < per_row; start += kDepth) {
    for (int i = threadIdx.x; i < kSide * kDepth; i += kThreads) {
      const int r = i / kDepth, k = i % kDepth, j = start + k;
      A s = 0, c = 0;
      if (row + r < rows && j < per_row) sincos_product(x[(row + r) * dims + j / bands], f[j % bands], s, c);
      e[k][r] = s;
      e[kDepth + k][r] = c;
      const bool inside = column + r < features && j < per_row;
      const W* from = weight + (column + r) * 2 * per_row + j;
      w[k][r] = inside ? to_float(from[0]) : A(0);
      w[kDepth + k][r] = inside ? to_float(from[per_row]) : A(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2 * kDepth; ++k) {
      A left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = e[k][ty + i], right[i] = w[k][tx + i];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = row + ty + i, m = column + tx + j;
      if (n < rows && m < features) out[n * features + m] = from_float<W>(sum[i][j] + (bias ? to_float(bias[m]) : A(0)));
    }
  }
}

unsigned grid(int64_t blocks) {
  if (blocks >= int64_t(1) << 31) throw std::invalid_argument("fourier_embed: more than 2^31 blocks");
  return unsigned(blocks);
}

void check_sizes(const FourierArgs& a) {
  if (a.dims * a.bands >= int64_t(1) << 22) throw std::invalid_argument("fourier_embed: D F must be below 2^22 on CUDA");
}

template <class X> void embed(const FourierArgs& a) {
  using A = acc_t<X>;
  const int64_t per_row = a.dims * a.bands, rows = per_row < kTile ? kTile / per_row : 1;
  embed_kernel<X, A><<<grid(ceil_div(a.rows, rows)), kThreads, 0, cudaStream_t(a.stream)>>>(
      static_cast<const X*>(a.x), static_cast<const A*>(a.frequencies), static_cast<X*>(a.out), a.rows, int(a.dims),
      int(a.bands), int(rows));
  check_launch("fourier_embed embed_kernel");
}

template <class X> void backward(const FourierArgs& a) {
  using A = acc_t<X>;
  const int64_t tasks = ceil_div(a.rows, kTaskRows);
  const auto stream = cudaStream_t(a.stream);
  backward_kernel<X, A><<<grid(tasks), kThreads, 0, stream>>>(
      static_cast<const X*>(a.d_out), static_cast<const X*>(a.x), static_cast<const A*>(a.frequencies),
      static_cast<X*>(a.d_x), a.workspace, a.rows, int(a.dims), int(a.bands));
  check_launch("fourier_embed backward_kernel");
  add_kernel<A><<<grid(ceil_div(a.bands, kThreads / 32)), kThreads, 0, stream>>>(
      a.workspace, static_cast<A*>(a.d_frequencies), tasks, int(a.bands));
  check_launch("fourier_embed add_kernel");
}

template <class W> void linear(const FourierArgs& a) {
  using A = acc_t<W>;
  if (a.features >= int64_t(1) << 22) throw std::invalid_argument("fourier_linear: M must be below 2^22 on CUDA");
  const dim3 tiles(grid(ceil_div(a.rows, kSide)), unsigned(ceil_div(a.features, kSide)));
  linear_kernel<W, A><<<tiles, kThreads, 0, cudaStream_t(a.stream)>>>(
      static_cast<const A*>(a.x), static_cast<const A*>(a.frequencies), static_cast<const W*>(a.weight),
      static_cast<const W*>(a.bias), static_cast<W*>(a.out), a.rows, int(a.dims), int(a.bands), a.features);
  check_launch("fourier_linear linear_kernel");
}

}  // namespace

void fourier_embed_cuda(const FourierArgs& a) {
  if (a.rows * a.dims * a.bands == 0) return;
  check_sizes(a);
  with_dtype(a.dtype, [&](auto tag) { embed<untag<decltype(tag)>>(a); });
}

void fourier_embed_backward_cuda(const FourierArgs& a) {
  if (a.rows * a.dims * a.bands == 0) return;
  check_sizes(a);
  with_dtype(a.dtype, [&](auto tag) { backward<untag<decltype(tag)>>(a); });
}

void fourier_linear_cuda(const FourierArgs& a) {
  if (a.rows * a.features * a.dims * a.bands == 0) return;
  check_sizes(a);
  with_dtype(a.dtype, [&](auto tag) { linear<untag<decltype(tag)>>(a); });
}

}  // namespace fourdperf
