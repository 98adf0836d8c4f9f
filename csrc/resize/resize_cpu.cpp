// resize on the CPU. The header states maths and shapes.
//
// work      wide inner axes: a task is a tile of kTile columns of one outer index, all rows of it; the rows that a
//           window spans stay in cache, so memory is read once and written once; a large output bypasses the caches;
//           16-bit inputs are widened once per tile.
//           narrow inner axes (images resized along their width): a task transposes kGroup outer indices side by side,
//           which makes the inner axis kGroup times wider, and transposes the result back.
// numerics  one rounding, at the store
// limits    none beyond the header's; scratch is O(kPacked + window) elements a thread
#include <omp.h>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/simd.h"
#include "resize/resize.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kTile = 512;
constexpr int64_t kGroup = 16;
constexpr int64_t kPacked = 16384;
constexpr int64_t kStream = 1 << 24;  // an output of 16 MB or more would only push other data out of the caches

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
template <class A, bool streaming, class X, class Y>
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
    for (int u = 0; u < 4; ++u) {
      if constexpr (streaming) {
        store_streaming(out + i + u * step, sum[u]);
      } else {
        store(out + i + u * step, sum[u]);
      }
    }
  }
  for (; i < width; i += step) {
    const int n = int(smaller(width - i, step));
    vec<A> sum = {};
    for (int64_t k = 0; k < count; ++k) sum += broadcast<A>(w[k]) * load<A>(x + k * stride + i, n);
    store(out + i, sum, n);
  }
}

// Rows [begin, end) of out whose sources, and themselves, fit kPacked elements at `width` elements a row (one row at least).
template <class A> int64_t chunk_end(Taps<A>& taps, int64_t begin, int64_t width) {
  int64_t end = begin + 1;
  const int64_t first = taps.bands[begin].first;
  while (end < taps.rows && (taps.bands[end].first + taps.bands[end].count - first) * width <= kPacked &&
         (end + 1 - begin) * width <= kPacked) ++end;
  return end;
}

// Sources that the rows [begin, end) read; bands move monotonically.
template <class A> int64_t span(Taps<A>& taps, int64_t begin, int64_t end) {
  return taps.bands[end - 1].first + taps.bands[end - 1].count - taps.bands[begin].first;
}

struct Extent { int64_t sources, rows; };

template <class A> Extent largest_chunk(Taps<A>& taps, int64_t width) {
  Extent largest{0, 0};
  for (int64_t begin = 0, end; begin < taps.rows; begin = end) {
    end = chunk_end(taps, begin, width);
    const int64_t sources = span(taps, begin, end);
    largest.sources = sources > largest.sources ? sources : largest.sources;
    largest.rows = end - begin > largest.rows ? end - begin : largest.rows;
  }
  return largest;
}

template <class A, class X> inline void widen_row(const X* x, A* packed, int64_t width) {
  int64_t i = 0;
  for (; i + lanes<A> <= width; i += lanes<A>) store(packed + i, load<A>(x + i));
  for (; i < width; ++i) packed[i] = to_float(x[i]);
}

template <bool streaming, class X, class Y, class A> void resize_wide(const ResizeArgs& a, Taps<A>& taps) {
  constexpr bool half = sizeof(X) == 2;  // widened once per tile, not once per tap
  const X* x = static_cast<const X*>(a.x);
  Y* out = static_cast<Y*>(a.out);
  const int64_t tiles = (a.inner + kTile - 1) / kTile;
  const int64_t tile_width = (a.inner / tiles + 64) / 64 * 64;  // equal tiles, so that the last is no sliver
  const int64_t room = half ? largest_chunk(taps, tile_width).sources * tile_width : 0;
  Buffer<A> scratch(a.threads * room);
#pragma omp parallel num_threads(a.threads)
  {
    A* packed = scratch.data() + omp_get_thread_num() * room;
#pragma omp for collapse(2) schedule(static)
    for (int64_t o = 0; o < a.outer; ++o) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = tile * tile_width, width = smaller(a.inner - i, tile_width);
        if (width <= 0) continue;
        const X* source = x + o * taps.columns * a.inner + i;
        Y* target = out + o * taps.rows * a.inner + i;
        for (int64_t begin = 0, end; begin < taps.rows; begin = end) {
          end = half ? chunk_end(taps, begin, tile_width) : taps.rows;
          const int64_t first = taps.bands[begin].first;
          if constexpr (half) {
            for (int64_t n = 0; n < span(taps, begin, end); ++n) {
              widen_row<A>(source + (first + n) * a.inner, packed + n * tile_width, width);
            }
          }
          for (int64_t r = begin; r < end; ++r) {
            const Band band = taps.bands[r];
            const A* w = &taps.weights[r * taps.room];
            if constexpr (half) {
              weighted_rows<A, streaming>(packed + (band.first - first) * tile_width, tile_width, w, band.count,
                                          target + r * a.inner, width);
            } else {
              weighted_rows<A, streaming>(source + band.first * a.inner, a.inner, w, band.count, target + r * a.inner, width);
            }
          }
        }
      }
    }
    if (streaming) stream_fence();
  }
}

// packed[e * kGroup + m] = x[m * stride + e], for m in [0, members) and e in [0, length); zeros for the other members
template <class A, class X> void pack(const X* x, int64_t stride, int64_t members, int64_t length, A* packed) {
  constexpr int64_t step = lanes<A>;
  for (int64_t m = 0; m < kGroup; m += step) {
    for (int64_t e = 0; e < length; e += step) {
      const int n = int(smaller(length - e, step));
      vec<A> square[step];
      for (int64_t u = 0; u < step; ++u) {
        square[u] = m + u < members ? load<A>(x + (m + u) * stride + e, n) : vec<A>{};
      }
      transpose(square);
      for (int u = 0; u < n; ++u) store(packed + (e + u) * kGroup + m, square[u]);
    }
  }
}

// out[m * stride + e] = packed[e * kGroup + m]
template <class A, class Y> void unpack(const A* packed, int64_t stride, int64_t members, int64_t length, Y* out) {
  constexpr int64_t step = lanes<A>;
  for (int64_t m = 0; m < members; m += step) {
    for (int64_t e = 0; e < length; e += step) {
      const int n = int(smaller(length - e, step));
      vec<A> square[step] = {};
      for (int u = 0; u < n; ++u) square[u] = load<A>(packed + (e + u) * kGroup + m);
      transpose(square);
      for (int64_t u = 0; u < step && m + u < members; ++u) store(out + (m + u) * stride + e, square[u], n);
    }
  }
}

template <class X, class Y, class A> void resize_narrow(const ResizeArgs& a, Taps<A>& taps) {
  const int64_t groups = (a.outer + kGroup - 1) / kGroup, wide = a.inner * kGroup;
  const Extent largest = largest_chunk(taps, wide);
  const int64_t room = (largest.sources + largest.rows) * wide;
  Buffer<A> scratch(a.threads * room);
#pragma omp parallel num_threads(a.threads)
  {
    A* packed = scratch.data() + omp_get_thread_num() * room;
    A* result = packed + largest.sources * wide;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t o = g * kGroup, members = smaller(a.outer - o, kGroup);
      for (int64_t begin = 0, end; begin < taps.rows; begin = end) {
        end = chunk_end(taps, begin, wide);
        const int64_t first = taps.bands[begin].first;
        pack(static_cast<const X*>(a.x) + (o * taps.columns + first) * a.inner, taps.columns * a.inner, members,
             span(taps, begin, end) * a.inner, packed);
        for (int64_t r = begin; r < end; ++r) {
          const Band band = taps.bands[r];
          weighted_rows<A, false>(packed + (band.first - first) * wide, wide, &taps.weights[r * taps.room], band.count,
                                  result + (r - begin) * wide, wide);
        }
        unpack(result, taps.rows * a.inner, members, (end - begin) * a.inner,
               static_cast<Y*>(a.out) + (o * taps.rows + begin) * a.inner);
      }
    }
  }
}

template <class X, class Y> void run(const ResizeArgs& a) {
  using A = acc_t<X>;
  Taps<A> taps(ResizeTable(a.n_in, a.n_out, a.filter, a.antialias, a.adjoint));
  if (a.inner < kGroup && a.outer * a.inner >= kGroup) return resize_narrow<X, Y>(a, taps);
  const int64_t row = a.inner * int64_t(sizeof(Y));
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && row % 64 == 0;
  return aligned && a.outer * taps.rows * row >= kStream ? resize_wide<true, X, Y>(a, taps)
                                                         : resize_wide<false, X, Y>(a, taps);
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
