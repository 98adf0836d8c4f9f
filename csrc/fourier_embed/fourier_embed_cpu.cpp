// fourier_embed and its gradients on the CPU. The header states maths and shapes; fourier_linear_cpu.cpp has the linear layer.
//
// work      a task is a block of rows whose angles (about kAngles of them) lie side by side in a buffer of the first-level
//           cache, so that vectors are full whatever D and F are: spread x, sines and cosines, then copy rows out
//           (a large output bypasses the caches).
//           Backward reads the incoming gradient once and computes the angles again: that costs less than reading them.
// numerics  as in the header; one rounding at the store
// limits    none; scratch is O(kAngles + D F) a thread
#include <omp.h>

#include "common/dispatch.h"
#include "fourier_embed/fourier_block.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kStream = 1 << 24;  // a float output of 16 MB or more would only push other data out of the caches
constexpr int64_t kAligned = 16;      // rows whose output is a multiple of 64 bytes

template <bool stream, class X> void embed(const FourierArgs& a) {
  using A = acc_t<X>;
  constexpr int64_t step = lanes<A>;
  Angles<A> angles(a, kAligned);
  const int64_t width = 2 * angles.per_row, room = stream ? angles.rows * width : 0;
  Buffer<A> scratch(a.threads * angles.scratch());
  Buffer<X> staged(a.threads * room);
  const int64_t blocks = (a.rows + angles.rows - 1) / angles.rows;
#pragma omp parallel num_threads(a.threads)
  {
    const Block<A> block(angles, &scratch[omp_get_thread_num() * angles.scratch()]);
    X* mine = &staged[omp_get_thread_num() * room];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * angles.rows, rows = smaller(a.rows - row, angles.rows), count = rows * width;
      X* out = static_cast<X*>(a.out) + row * width;
      block.compute(static_cast<const X*>(a.x) + row * a.dims, rows);
      block.write(stream ? mine : out, rows, width);
      if constexpr (stream) {
        int64_t i = 0;
        for (; i + step <= count; i += step) store_streaming(out + i, load<A>(mine + i));
        if (i < count) memcpy(out + i, mine + i, size_t(count - i) * sizeof(X));
      }
    }
    if (stream) stream_fence();
  }
}

// The embedding of wide coordinates, a one behind every row: that is for the bias.
template <class Y> void embed_ones(const FourierArgs& a) {
  using A = acc_t<Y>;
  Angles<A> angles(a);
  const int64_t width = 2 * angles.per_row + 1, blocks = (a.rows + angles.rows - 1) / angles.rows;
  Buffer<A> scratch(a.threads * angles.scratch());
#pragma omp parallel num_threads(a.threads)
  {
    const Block<A> block(angles, &scratch[omp_get_thread_num() * angles.scratch()]);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * angles.rows, rows = smaller(a.rows - row, angles.rows);
      Y* out = static_cast<Y*>(a.out) + row * width;
      block.compute(static_cast<const A*>(a.x) + row * a.dims, rows);
      block.write(out, rows, width);
      for (int64_t r = 1; r <= rows; ++r) out[r * width - 1] = from_float<Y>(1);
    }
  }
}

// d_x of a block of rows, and sum += the block's share of d_frequencies
template <class X, class A>
inline void backward_block(const FourierArgs& a, const Block<A>& block, int64_t row, int64_t rows, A* partial) {
  const auto& angles = *block.angles;
  const A* f = static_cast<const A*>(a.frequencies);
  const X* x = static_cast<const X*>(a.x) + row * a.dims;
  X* d_x = static_cast<X*>(a.d_x) + row * a.dims;
  block.compute(x, rows);
  block.weigh(static_cast<const X*>(a.d_out) + row * 2 * angles.per_row, rows);
  const A* g = block.sines;
  for (int64_t i = 0; i < rows * a.dims; ++i, g += a.bands) {
    const vec<A> scale = broadcast<A>(to_float(x[i]));
    vec<A> sum = {};
    int64_t j = 0;
    for (; j + lanes<A> <= a.bands; j += lanes<A>) {
      const vec<A> v = load<A>(g + j);
      sum += v * load<A>(f + j);
      store(partial + j, load<A>(partial + j) + scale * v);
    }
    A rest = 0;
    for (; j < a.bands; ++j) {
      rest += g[j] * f[j];
      partial[j] += A(to_float(x[i])) * g[j];
    }
    d_x[i] = from_float<X>(reduce_add(sum) + rest);
  }
}

template <class X> void backward(const FourierArgs& a) {
  using A = acc_t<X>;
  Angles<A> angles(a);
  const int64_t tasks = (a.rows + kFourierTask - 1) / kFourierTask, per_thread = angles.scratch() + a.bands;
  Buffer<A> scratch(a.threads * per_thread);
  Buffer<double> sums(tasks * a.bands);
#pragma omp parallel num_threads(a.threads)
  {
    A* mine = &scratch[omp_get_thread_num() * per_thread];
    A* partial = mine + angles.scratch();
    const Block<A> block(angles, mine);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      double* sum = &sums[task * a.bands];
      for (int64_t f = 0; f < a.bands; ++f) sum[f] = 0;
      const int64_t end = smaller((task + 1) * kFourierTask, a.rows);
      for (int64_t row = task * kFourierTask; row < end; row += angles.rows) {
        for (int64_t f = 0; f < a.bands; ++f) partial[f] = 0;
        backward_block<X>(a, block, row, smaller(end - row, angles.rows), partial);
        for (int64_t f = 0; f < a.bands; ++f) sum[f] += partial[f];
      }
    }
  }
  A* d_frequencies = static_cast<A*>(a.d_frequencies);
  for (int64_t f = 0; f < a.bands; ++f) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[task * a.bands + f];
    d_frequencies[f] = A(sum);
  }
}

}  // namespace

void fourier_embed(const FourierArgs& a) {
  if (a.rows * a.dims * a.bands == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using X = untag<decltype(tag)>;
    const int64_t bytes = a.rows * 2 * a.dims * a.bands * int64_t(sizeof(X));
    const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
    if constexpr (sizeof(X) >= 4) {
      if (aligned && bytes >= kStream) return embed<true, X>(a);
    }
    return embed<false, X>(a);
  });
}

void fourier_embed_ones(const FourierArgs& a) {
  if (a.rows == 0) return;
  with_dtype(a.dtype, [&](auto tag) { embed_ones<untag<decltype(tag)>>(a); });
}

void fourier_embed_backward(const FourierArgs& a) {
  if (a.rows * a.dims * a.bands == 0) return;
  with_dtype(a.dtype, [&](auto tag) { backward<untag<decltype(tag)>>(a); });
}

}  // namespace fourdperf::FOURDPERF_ISA
