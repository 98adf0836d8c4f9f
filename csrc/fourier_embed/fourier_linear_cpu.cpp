// fourier_linear on the CPU: out = embedding weight^T + bias, the embedding of a block of rows made in cache.
//
// maths     and shapes: see the header
// work      the weight is packed once into panels of kVecs vectors of columns, k after k. A task is a block of rows: embed
//           them, then for each panel multiply kRows rows at a time with all sums in registers. Large outputs bypass
//           the caches. torch has the 16-bit layers done by fourier_embed_ones and its own products, where those are fast.
//           With AVX512-BF16 and a bf16 weight, embedding and weight are bf16 and sums float, as in torch.
// numerics  sums over k in order, in float (double for double), one rounding at the store. Other 16-bit cases keep the
//           embedding in float.
// limits    none; scratch is O(block of rows) a thread and one copy of the weight
#include <omp.h>

#include "common/dispatch.h"
#include "fourier_embed/fourier_block.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kVecs = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kStream = 1 << 24;  // an output of 16 MB or more would only push other data out of the caches

// How a panel multiplies: the type of the embedding, the k that one step takes, and the step.
template <class A, class W> struct Dot {
  using E = A;
  using Wide = vec<A>;
  static constexpr int64_t depth = 1;
  static E pack(W w) { return to_float(w); }
  static Wide spread(const E* e) { return broadcast<A>(*e); }
  static Wide fetch(const E* panel) { return load<A>(panel); }
  static vec<A> add(vec<A> sum, Wide e, Wide w) { return sum + e * w; }
};

#ifdef __AVX512BF16__
template <> struct Dot<float, bf16_t> {
  using E = bf16_t;
  using Wide = __m512i;
  static constexpr int64_t depth = 2;
  static E pack(bf16_t w) { return w; }
  static Wide spread(const E* e) {
    int pair;
    memcpy(&pair, e, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Wide fetch(const E* panel) { return _mm512_loadu_si512(panel); }
  static vec<float> add(vec<float> sum, Wide e, Wide w) { return _mm512_dpbf16_ps(sum, (__m512bh)e, (__m512bh)w); }
};
#endif

// Panel p holds columns p * width .. + width: for every step of k, `depth` entries of each column. Zeros beyond M.
template <class A, class W> struct Panels {
  using D = Dot<A, W>;
  static constexpr int64_t width = kVecs * lanes<A>;
  int64_t k, count;
  Buffer<typename D::E> weight;
  Buffer<A> bias;

  explicit Panels(const FourierArgs& a)
      : k(2 * a.dims * a.bands), count((a.features + width - 1) / width), weight(count * width * k), bias(count * width) {
    const W *w = static_cast<const W*>(a.weight), *b = static_cast<const W*>(a.bias);
    for (int64_t m = 0; m < count * width; ++m) {
      typename D::E* to = &weight[m / width * width * k + m % width * D::depth];
      bias[m] = b && m < a.features ? to_float(b[m]) : A(0);
      for (int64_t i = 0; i < k; ++i) {
        to[i / D::depth * width * D::depth + i % D::depth] = m < a.features ? D::pack(w[m * k + i]) : typename D::E{};
      }
    }
  }
};

// R rows times one panel
template <int R, bool stream, class A, class W>
inline void multiply(const typename Dot<A, W>::E* e, int64_t k, const typename Dot<A, W>::E* panel, const A* bias, W* out,
                     int64_t features, int64_t columns) {
  using D = Dot<A, W>;
  vec<A> sum[R][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load<A>(bias + v * lanes<A>);
  }
  for (int64_t i = 0; i < k; i += D::depth) {
    typename D::Wide w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) w[v] = D::fetch(panel + (i * kVecs + v * D::depth) * lanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename D::Wide x = D::spread(e + r * k + i);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = D::add(sum[r][v], x, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (columns == kVecs * lanes<A>) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (stream) store_streaming(out + r * features + v * lanes<A>, sum[r][v]);
        else store(out + r * features + v * lanes<A>, sum[r][v]);
      }
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int64_t left = columns - v * lanes<A>;
        if (left > 0) store(out + r * features + v * lanes<A>, sum[r][v], int(smaller(left, lanes<A>)));
      }
    }
  }
}

template <int R, bool stream, class A, class W>
inline void multiply_rows(int64_t rows, const typename Dot<A, W>::E* e, int64_t k, const typename Dot<A, W>::E* panel,
                          const A* bias, W* out, int64_t features, int64_t columns) {
  if (rows == R) return multiply<R, stream, A, W>(e, k, panel, bias, out, features, columns);
  if constexpr (R > 1) multiply_rows<R - 1, stream, A, W>(rows, e, k, panel, bias, out, features, columns);
}

template <class W, bool stream> void linear(const FourierArgs& a) {
  using A = acc_t<W>;
  using E = typename Dot<A, W>::E;
  Angles<A> angles(a, kRows);
  Panels<A, W> panels(a);
  const int64_t k = panels.k, room = angles.rows * k;
  Buffer<A> scratch(a.threads * angles.scratch());
  Buffer<E> embedding(a.threads * room);
  const int64_t blocks = (a.rows + angles.rows - 1) / angles.rows;
#pragma omp parallel num_threads(a.threads)
  {
    const Block<A> block(angles, &scratch[omp_get_thread_num() * angles.scratch()]);
    E* mine = &embedding[omp_get_thread_num() * room];
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * angles.rows, rows = smaller(a.rows - row, angles.rows);
      block.compute(static_cast<const A*>(a.x) + row * a.dims, rows);
      block.write(mine, rows, k);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t column = p * panels.width, columns = smaller(a.features - column, panels.width);
        for (int64_t r = 0; r < rows; r += kRows) {
          multiply_rows<kRows, stream, A, W>(smaller(rows - r, kRows), mine + r * k, k, &panels.weight[column * k],
                                             &panels.bias[column], static_cast<W*>(a.out) + (row + r) * a.features + column,
                                             a.features, columns);
        }
      }
    }
    if (stream) stream_fence();
  }
}

template <class W> void run(const FourierArgs& a) {
  const int64_t row = a.features * int64_t(sizeof(W));
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && row % 64 == 0;
  return aligned && a.rows * row >= kStream ? linear<W, true>(a) : linear<W, false>(a);
}

}  // namespace

void fourier_linear(const FourierArgs& a) {
  if (a.rows * a.features * a.dims * a.bands == 0) return;
  with_dtype(a.dtype, [&](auto tag) { run<untag<decltype(tag)>>(a); });
}

}  // namespace fourdperf::FOURDPERF_ISA
