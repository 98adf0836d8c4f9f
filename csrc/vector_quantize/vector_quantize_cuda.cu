// vector_quantize and code_sums on CUDA. The header states maths and shapes.
//
// work      search: a block owns kRows rows, a thread kOwn of them against kOwn codes of a tile; tiles of codes, kSlice
//           channels at a time, pass through shared memory, and a thread keeps the least score of each of its rows. Sums: a
//           warp owns a code, a lane every 32nd channel, and goes through the code's rows in their order.
// numerics  as on the CPU: one chain of multiply-adds a score, half types widened; no atomics
// limits    fewer than 2^31 codes; 64-bit addressing
#include "common/cuda.h"
#include "common/dispatch.h"
#include "vector_quantize/vector_quantize.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 256, kSide = 16, kOwn = 4, kRows = kSide * kOwn, kSlice = 16;
constexpr int kBlocks = 2;  // blocks that shall fit a multiprocessor: 128 registers a thread, no spills

template <class T> __global__ void terms_kernel(const __grid_constant__ QuantizeArgs a) {
  using A = acc_t<T>;
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= a.codes) return;
  const T* code = static_cast<const T*>(a.codebook) + k * a.channels;
  A square = 0;
  for (int64_t c = 0; c < a.channels; ++c) square += to_float(code[c]) * to_float(code[c]);
  const CodeTerms<A> terms = code_terms(square, a.metric);
  static_cast<A*>(a.terms)[2 * k] = terms.half;
  static_cast<A*>(a.terms)[2 * k + 1] = terms.factor;
}

template <class T> __global__ void __launch_bounds__(kThreads, kBlocks) search_kernel(const __grid_constant__ QuantizeArgs a) {
  using A = acc_t<T>;
  __shared__ A s_z[kSlice][kRows + 1], s_code[kSlice][kRows + 1];
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const T *z = static_cast<const T*>(a.z), *codebook = static_cast<const T*>(a.codebook);
  const A* terms = static_cast<const A*>(a.terms);
  const int64_t first = int64_t(blockIdx.x) * kRows;
  Nearest<A> nearest[kOwn];
  for (int64_t tile = 0; tile < a.codes; tile += kRows) {
    A score[kOwn][kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t k = tile + x + j * kSide;
      const A half = k < a.codes ? terms[2 * k] : std::numeric_limits<A>::infinity();
#pragma unroll
      for (int i = 0; i < kOwn; ++i) score[i][j] = half;
    }
    for (int64_t slice = 0; slice < a.channels; slice += kSlice) {
      __syncthreads();
      for (int e = threadIdx.x; e < kSlice * kRows; e += kThreads) {
        const int c = e % kSlice, r = e / kSlice;
        const int64_t n = first + r, k = tile + r, at = slice + c;
        s_z[c][r] = n < a.rows && at < a.channels ? to_float(z[n * a.channels + at]) : A(0);
        s_code[c][r] = k < a.codes && at < a.channels ? -terms[2 * k + 1] * to_float(codebook[k * a.channels + at]) : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kSlice; ++c) {
        A own[kOwn], code[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) own[i] = s_z[c][y + i * kSide], code[i] = s_code[c][x + i * kSide];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) score[i][j] += own[i] * code[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) nearest[i].offer(score[i][j], tile + x + j * kSide);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int step = kSide / 2; step > 0; step /= 2) {  // the kSide threads of a row are one half of a warp
      const A other = __shfl_xor_sync(0xffffffffu, nearest[i].score, step);
      const int64_t at = __shfl_xor_sync(0xffffffffu, nearest[i].index, step);
      nearest[i].offer(other, at);
    }
    const int64_t n = first + y + i * kSide;
    if (x == 0 && n < a.rows) put_index(a, n, nearest[i].index);
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ CodeSumsArgs a) {
  using A = acc_t<T>;
  const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (k >= a.codes) return;
  const T* x = static_cast<const T*>(a.x);
  for (int64_t c = threadIdx.x % 32; c < a.channels; c += 32) {
    A sum = 0;
    for (int64_t i = a.starts[k]; i < a.starts[k + 1]; ++i) sum += to_float(x[a.order[i] * a.channels + c]);
    static_cast<T*>(a.out)[k * a.channels + c] = from_float<T>(sum);
  }
}

unsigned grid(int64_t blocks) {
  if (blocks >= int64_t(1) << 31) throw std::invalid_argument("vector_quantize: too many rows for one CUDA launch");
  return unsigned(blocks);
}

}  // namespace

void vector_quantize_cuda(const QuantizeArgs& a) {
  if (a.codes < 1 || a.codes > kMostCodes) throw std::invalid_argument("vector_quantize: there must be 1 to 2^31 - 1 codes");
  if (a.rows == 0) return;
  const auto stream = cudaStream_t(a.stream);
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    terms_kernel<T><<<grid(ceil_div(a.codes, kThreads)), kThreads, 0, stream>>>(a);
    check_launch("vector_quantize terms_kernel");
    search_kernel<T><<<grid(ceil_div(a.rows, kRows)), kThreads, 0, stream>>>(a);
    check_launch("vector_quantize search_kernel");
  });
}

void code_sums_cuda(const CodeSumsArgs& a) {
  if (a.codes == 0 || a.channels == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    sums_kernel<untag<decltype(tag)>><<<grid(ceil_div(a.codes, kThreads / 32)), kThreads, 0, cudaStream_t(a.stream)>>>(a);
    check_launch("code_sums sums_kernel");
  });
}

}  // namespace fourdperf
