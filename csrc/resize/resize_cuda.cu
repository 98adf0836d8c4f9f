// resize on CUDA. The header states maths and shapes.
//
// work      three launches: the sums that rows of W are divided by, then per row its band and weights, both into the
//           workspace; then one thread per V neighbouring inner elements and kRows rows of the output. Neighbouring
//           rows read the same source rows, so these come from the first-level cache.
// numerics  weights in double, rounded once to the accumulator; one rounding at the store; deterministic
// limits    V = 16 bytes where the inner axis and the pointers allow it, else 1; grid-stride loop, 64-bit addressing
#include "common/cuda.h"
#include "common/dispatch.h"
#include "resize/resize.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 8;


__global__ void resize_totals_kernel(ResizeTable table, double* totals) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j < table.n_out) totals[j] = table.total(j);
}

__global__ void resize_weights_kernel(ResizeTable table, const double* totals, double* rows, double* weights) {
  const int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= table.rows()) return;
  const Band band = table.band(r);
  rows[2 * r] = double(band.first);
  rows[2 * r + 1] = double(band.count);
  for (int64_t k = 0; k < band.count; ++k) weights[r * table.max_count() + k] = table.weight(r, band.first + k, totals);
}

// x (outer, columns, inner) -> out (outer, rows, inner); inner counted in packs of V
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads, 4) resize_kernel(const Pack<X, V>* __restrict__ x, Pack<Y, V>* __restrict__ out,
                                                          const double* __restrict__ bands, const double* __restrict__ weights,
                                                          int64_t outer, int64_t columns, int64_t rows, int64_t inner,
                                                          int64_t room) {
  using A = acc_t<X>;
  const int64_t strips = (rows + kRows - 1) / kRows, work = outer * strips * inner;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < work; t += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = t % inner, strip = t / inner % strips, o = t / inner / strips;
    const int64_t end = strip * kRows + kRows < rows ? strip * kRows + kRows : rows;
    for (int64_t r = strip * kRows; r < end; ++r) {
      const int64_t first = int64_t(bands[2 * r]);
      const int count = int(bands[2 * r + 1]);
      A sum[V] = {};
      for (int k = 0; k < count; ++k) {
        const A w = A(weights[r * room + k]);
        const Pack<X, V> source = x[(o * columns + first + k) * inner + i];
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += w * to_float(source.lane[v]);
      }
      Pack<Y, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.lane[v] = from_float<Y>(sum[v]);
      out[(o * rows + r) * inner + i] = result;
    }
  }
}

template <class X, class Y, int V> void launch(const ResizeArgs& a, const ResizeTable& table, const double* bands,
                                               const double* weights) {
  const int64_t inner = a.inner / V, work = a.outer * ceil_div(table.rows(), kRows) * inner;
  const int64_t blocks = ceil_div(work, kThreads);
  resize_kernel<X, Y, V><<<unsigned(blocks < (1 << 30) ? blocks : 1 << 30), kThreads, 0, cudaStream_t(a.stream)>>>(
      static_cast<const Pack<X, V>*>(a.x), static_cast<Pack<Y, V>*>(a.out), bands, weights, a.outer, table.columns(),
      table.rows(), inner, table.max_count());
  check_launch("resize_kernel");
}

template <class X, class Y> void run(const ResizeArgs& a) {
  const ResizeTable table(a.n_in, a.n_out, a.filter, a.antialias, a.adjoint);
  double *totals = a.workspace, *bands = totals + a.n_out, *weights = bands + 2 * table.rows();
  const auto stream = cudaStream_t(a.stream);
  resize_totals_kernel<<<unsigned(ceil_div(a.n_out, kThreads)), kThreads, 0, stream>>>(table, totals);
  check_launch("resize_totals_kernel");
  resize_weights_kernel<<<unsigned(ceil_div(table.rows(), kThreads)), kThreads, 0, stream>>>(table, totals, bands, weights);
  check_launch("resize_weights_kernel");
  constexpr int V = 16 / int(sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
  const bool wide = a.inner % V == 0 && aligned16(a.x) && aligned16(a.out);
  return wide ? launch<X, Y, V>(a, table, bands, weights) : launch<X, Y, 1>(a, table, bands, weights);
}

}  // namespace

void resize_cuda(const ResizeArgs& a) {
  if (a.outer == 0 || a.inner == 0) return;
  with_dtype(a.x_dtype, [&](auto x_tag) {
    using X = untag<decltype(x_tag)>;
    if (a.out_dtype == a.x_dtype) return run<X, X>(a);
    if constexpr (sizeof(X) == 2) {
      return run<X, float>(a);
    } else if constexpr (sizeof(X) == 4) {
      return a.out_dtype == DType::bf16 ? run<X, bf16_t>(a) : run<X, f16_t>(a);
    }
  });
}

}  // namespace fourdperf
