// resize on the CPU. The header states maths and shapes.
//
// work      wide inner axes: a task is a tile of kTile columns of one outer index, all rows of it; the rows that a
//           window spans stay in cache, so memory is read once and written once.
//           narrow inner axes (images resized along their width): a task packs kGroup outer indices side by side,
//           which makes the inner axis kGroup times wider, and unpacks the result.
// numerics  one rounding, at the store
// limits    none beyond the header's; scratch is O(kPacked + window) elements a thread
#include <omp.h>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/simd.h"
#include "resize/resize.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kTile = 1024;
constexpr int64_t kGroup = 16;
constexpr int64_t kPacked = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A> struct Taps {
  int64_t rows, columns, room;
  Buffer<Band> bands;
  Buffer<A> weights;

  explicit Taps(const ResizeTable& table)
      : rows(table.rows()), columns(table.columns()), room(table.max_count()), bands(rows), weights(rows * room) {
    Buffer<double> totals(table.n_out);
    for (int64_t j = 0; j < table.n_out; ++j) totals[j] = table.total(j);
    for (int64_t r = 0; r < rows; ++r) {
      bands[r] = table.band(r);
      for (int64_t k = 0; k < bands[r].count; ++k) {
        weights[r * room + k] = A(table.weight(r, bands[r].first + k, totals.data()));
      }
    }
  }
};

// out[0 .. width) = sum_k w[k] x[k * stride + (0 .. width)]
template <class A, class X, class Y>
inline void weighted_rows(const X* x, int64_t stride, const A* w, int64_t count, Y* out, int64_t width) {
  constexpr int64_t step = lanes<A>;
  int64_t i = 0;
  for (; i + 4 * step <= width; i += 4 * step) {
    vec<A> sum[4] = {};
    for (int64_t k = 0; k < count; ++k) {
      const vec<A> weight = broadcast<A>(w[k]);
      const X* row = x + k * stride + i;
      for (int u = 0; u < 4; ++u) sum[u] += weight * load<A>(row + u * step);
    }
    for (int u = 0; u < 4; ++u) store(out + i + u * step, sum[u]);
  }
  for (; i < width; i += step) {
    const int n = int(smaller(width - i, step));
    vec<A> sum = {};
    for (int64_t k = 0; k < count; ++k) sum += broadcast<A>(w[k]) * load<A>(x + k * stride + i, n);
    store(out + i, sum, n);
  }
}

template <class X, class Y, class A> void resize_wide(const ResizeArgs& a, Taps<A>& taps) {
  const X* x = static_cast<const X*>(a.x);
  Y* out = static_cast<Y*>(a.out);
  const int64_t tiles = (a.inner + kTile - 1) / kTile;
#pragma omp parallel for num_threads(a.threads) collapse(2) schedule(static)
  for (int64_t o = 0; o < a.outer; ++o) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t i = tile * kTile, width = smaller(a.inner - i, kTile);
      for (int64_t r = 0; r < taps.rows; ++r) {
        const Band band = taps.bands[r];
        weighted_rows<A>(x + (o * taps.columns + band.first) * a.inner + i, a.inner, &taps.weights[r * taps.room],
                         band.count, out + (o * taps.rows + r) * a.inner + i, width);
      }
    }
  }
}

// Rows r of one packed chunk, chosen so that their sources fit kPacked elements (one row at least).
template <class A> int64_t chunk_end(Taps<A>& taps, int64_t begin, int64_t inner) {
  int64_t end = begin + 1;
  const int64_t first = taps.bands[begin].first;
  while (end < taps.rows && (taps.bands[end].first + taps.bands[end].count - first) * inner * kGroup <= kPacked &&
         (end + 1 - begin) * inner * kGroup <= kPacked) ++end;
  return end;
}

template <class X, class Y, class A> void resize_narrow(const ResizeArgs& a, Taps<A>& taps) {
  const int64_t groups = (a.outer + kGroup - 1) / kGroup, wide = a.inner * kGroup;
  int64_t span = 0, height = 0;  // sources and rows of the largest chunk
  for (int64_t begin = 0, end; begin < taps.rows; begin = end) {
    end = chunk_end(taps, begin, a.inner);
    const Band last = taps.bands[end - 1];
    const int64_t s = last.first + last.count - taps.bands[begin].first;
    span = s > span ? s : span;
    height = end - begin > height ? end - begin : height;
  }
  Buffer<A> scratch(a.threads * (span + height) * wide);  // before the parallel region: nothing in there may throw
#pragma omp parallel num_threads(a.threads)
  {
    A* packed = &scratch[omp_get_thread_num() * (span + height) * wide];
    A* result = packed + span * wide;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t o = g * kGroup, members = smaller(a.outer - o, kGroup);
      for (int64_t begin = 0, end; begin < taps.rows; begin = end) {
        end = chunk_end(taps, begin, a.inner);
        const int64_t first = taps.bands[begin].first;
        const int64_t sources = taps.bands[end - 1].first + taps.bands[end - 1].count - first;
        for (int64_t m = 0; m < members; ++m) {
          const X* x = static_cast<const X*>(a.x) + ((o + m) * taps.columns + first) * a.inner;
          for (int64_t e = 0; e < sources * a.inner; ++e) packed[e * kGroup + m] = to_float(x[e]);
        }
        for (int64_t r = begin; r < end; ++r) {
          const Band band = taps.bands[r];
          weighted_rows<A>(&packed[(band.first - first) * wide], wide, &taps.weights[r * taps.room], band.count,
                           &result[(r - begin) * wide], wide);
        }
        for (int64_t m = 0; m < members; ++m) {
          Y* out = static_cast<Y*>(a.out) + ((o + m) * taps.rows + begin) * a.inner;
          for (int64_t e = 0; e < (end - begin) * a.inner; ++e) out[e] = from_float<Y>(result[e * kGroup + m]);
        }
      }
    }
  }
}

template <class X, class Y> void run(const ResizeArgs& a) {
  using A = acc_t<X>;
  Taps<A> taps(ResizeTable(a.n_in, a.n_out, a.filter, a.antialias, a.adjoint));
  if (a.inner >= kGroup || a.outer * a.inner < kGroup) return resize_wide<X, Y>(a, taps);
  resize_narrow<X, Y>(a, taps);
}

}  // namespace

void resize(const ResizeArgs& a) {
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

}  // namespace fourdperf::FOURDPERF_ISA
