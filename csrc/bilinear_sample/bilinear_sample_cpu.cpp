// bilinear_sample on the CPU. The header states maths and shapes.
//
// work      fwd: a thread owns points. Where a map is larger than the second-level cache, points are visited cell by
//           cell, so that its pixels come from the first level; results larger than the caches are written past them.
//           bwd, bwd_bwd: points are sorted by the map row of their lower neighbours (and along it), and a thread owns
//           a band of map rows; only points on the row above a band are visited twice. No atomics: every sum has one
//           order, whatever the number of threads. Each row of d_out is read once, each pixel from the first-level cache.
// numerics  vectors along the channels; the sums of 16-bit types are kept in float, rounded once
// limits    bwd runs on at most batch x height threads; scratch is 16 bytes a point and 8 a cell (at most kCells a row)
#include <omp.h>

#include "bilinear_sample/bilinear_sample.h"
#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/simd.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kStreamed = 16 << 20;  // bytes of output from which on it is written past the caches
constexpr int64_t kCached = 256 << 10;   // bytes of one map up to which fwd visits points as they come
constexpr int64_t kKeys = 16384;         // stretches that points are sorted into, if the rows of the maps are not more

constexpr int64_t kAhead = 2;            // points from one row of d_out to the one asked for in advance
constexpr int64_t kPrefetched = 16384;   // bytes of it

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The places of up to kBlock points, worked out side by side.
constexpr int kBlock = 64;

template <class A> struct Places { A whole[kBlock], share[kBlock], slope[kBlock]; };

template <Sampling M, Border B, class A> void locate_as(const A* x, int count, int64_t n, SampleRule rule, Places<A>& places) {
  rule.mode = M;
  rule.border = B;
  for (int i = 0; i < count; ++i) {
    const Place<A> place = locate(x[i], n, rule);
    places.whole[i] = place.whole, places.share[i] = place.share, places.slope[i] = place.slope;
  }
}

template <Sampling M, class A> void locate_as(const A* x, int count, int64_t n, SampleRule rule, Places<A>& places) {
  switch (rule.border) {
    case Border::clamp: return locate_as<M, Border::clamp>(x, count, n, rule, places);
    case Border::zeros: return locate_as<M, Border::zeros>(x, count, n, rule, places);
    case Border::reflect: return locate_as<M, Border::reflect>(x, count, n, rule, places);
  }
}

template <class A> struct Block {
  A x[kBlock], y[kBlock];
  Places<A> along_x, along_y;

  void locate(int count, const SampleArgs& a) {
    one_axis(x, count, a.width, a.rule, along_x);
    one_axis(y, count, a.height, a.rule, along_y);
  }

 private:
  static void one_axis(const A* x, int count, int64_t n, SampleRule rule, Places<A>& places) {
    switch (rule.mode) {
      case Sampling::bilinear: return locate_as<Sampling::bilinear>(x, count, n, rule, places);
      case Sampling::nearest_floor: return locate_as<Sampling::nearest_floor>(x, count, n, rule, places);
      case Sampling::nearest_round: return locate_as<Sampling::nearest_round>(x, count, n, rule, places);
    }
  }
};

// The four pixels around one point, or the one nearest to it (K = 1); -1: not in the map.
template <class A, int K> struct Corners {
  Place<A> x, y;
  int64_t pixel[K], kept[K];  // kept: those that the visitor of this point may write to

  Corners(const Block<A>& block, int at, const SampleArgs& a)
      : x{block.along_x.whole[at], block.along_x.share[at], block.along_x.slope[at]},
        y{block.along_y.whole[at], block.along_y.share[at], block.along_y.slope[at]} {
    const int64_t left = int64_t(x.whole), top = int64_t(y.whole), first = top * a.width + left;
    for (int k = 0; k < K; ++k) {
      const bool in = inside(left + (k & 1), a.width) & inside(top + (k >> 1), a.height);
      pixel[k] = in ? first + (k & 1) + (k >> 1) * a.width : -1;
    }
  }

  void weights(A* w) const {
    if constexpr (K == 1) {
      w[0] = 1 + x.share + y.share;
    } else {
      w[0] = (1 - x.share) * (1 - y.share), w[1] = x.share * (1 - y.share);
      w[2] = (1 - x.share) * y.share, w[3] = x.share * y.share;
    }
  }
};

// <derivative of the weights by x share, y share, both; dots>
template <class A> A along_x(const Place<A>& y, const A* dots) {
  return (1 - y.share) * (dots[1] - dots[0]) + y.share * (dots[3] - dots[2]);
}
template <class A> A along_y(const Place<A>& x, const A* dots) {
  return (1 - x.share) * (dots[2] - dots[0]) + x.share * (dots[3] - dots[1]);
}
template <class A> A along_both(const A* dots) { return (dots[0] - dots[1]) + (dots[3] - dots[2]); }

// Pixels of one map: outside of it there are zeros to read, and a place to write what nobody reads.
template <class T, int K> inline void rows(T* map, T* elsewhere, const int64_t* pixel, int64_t channels, T** row) {
  for (int k = 0; k < K; ++k) row[k] = pixel[k] < 0 ? elsewhere : map + pixel[k] * channels;
}

// Points sorted by the row (batch, y) of their lower neighbours, along it by stretches of columns; stable.
class ByRow {
 public:
  int64_t n_rows;
  Buffer<int64_t> order;  // point numbers, batch * points + n
  Buffer<int64_t> start;  // of each row in `order`

  template <class A>
  explicit ByRow(const SampleArgs& a, Tag<A>)
      : n_rows(a.batch * a.height), order(a.batch * a.points), start(n_rows + 1) {
    const int64_t total = a.batch * a.points;
    int shift = 0;
    while (n_rows * ((a.width >> shift) + 1) > kKeys && (a.width >> shift) > 0) ++shift;
    const int64_t per_row = (a.width >> shift) + 1, keys = n_rows * per_row;
    const int64_t chunks = larger(1, smaller(a.threads, total / larger(1, keys)));
    Buffer<int64_t> key(total), next(chunks * keys);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t t = 0; t < chunks; ++t) {
      int64_t* count = &next[t * keys];
      for (int64_t i = 0; i < keys; ++i) count[i] = 0;
      Block<A> block;
      for (int64_t p = total * t / chunks, end = total * (t + 1) / chunks; p < end; p += kBlock) {
        const int size = int(smaller(kBlock, end - p));
        int64_t b = p / a.points, n = p % a.points, batch[kBlock];
        for (int i = 0; i < size; ++i) {
          const A* xy = static_cast<const A*>(a.xy) + b * a.xy_stride + 2 * n;
          block.x[i] = xy[0], block.y[i] = xy[1], batch[i] = b;
          if (++n == a.points) n = 0, ++b;
        }
        block.locate(size, a);
        for (int i = 0; i < size; ++i) {
          const int64_t column = int64_t(block.along_x.whole[i]), y = int64_t(block.along_y.whole[i]);
          const int64_t row = batch[i] * a.height + larger(0, smaller(y, a.height - 1));
          key[p + i] = row * per_row + (larger(0, smaller(column, a.width - 1)) >> shift);
          ++count[key[p + i]];
        }
      }
    }
    int64_t sum = 0;
    for (int64_t i = 0; i < keys; ++i) {
      if (i % per_row == 0) start[i / per_row] = sum;
      for (int64_t t = 0; t < chunks; ++t) {
        const int64_t count = next[t * keys + i];
        next[t * keys + i] = sum;
        sum += count;
      }
    }
    start[n_rows] = sum;
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t t = 0; t < chunks; ++t) {
      for (int64_t p = total * t / chunks, end = total * (t + 1) / chunks; p < end; ++p) order[next[t * keys + key[p]]++] = p;
    }
  }

  // First row of band i out of n: bands hold about as many points as one another.
  int64_t band(int64_t i, int64_t n) {
    const int64_t wanted = start[n_rows] * i / n;
    int64_t low = 0, high = n_rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      start[middle] < wanted ? low = middle + 1 : high = middle;
    }
    return i == 0 ? 0 : i == n ? n_rows : low;
  }
};

// Whether the result (batch, points, channels) is larger than the caches, and in whole vectors.
template <class T> bool streams(const SampleArgs& a, const void* result) {
  return a.batch * a.points * a.channels * int64_t(sizeof(T)) >= kStreamed && a.channels % lanes<acc_t<T>> == 0 &&
         uintptr_t(result) % kVectorBytes == 0;
}

// ---- fwd

template <class T, int K, bool Stream> void fwd(const SampleArgs& a) {
  using A = acc_t<T>;
  const int64_t total = a.batch * a.points, c = a.channels, cells = a.height * a.width;
  Buffer<T> zeros(c);
  memset(zeros.data(), 0, size_t(c) * sizeof(T));
  const int64_t bytes = c * int64_t(sizeof(T));  // of one pixel; sorting costs as much as reading a few lines of cache
  const bool sorted = bytes >= 256 && cells * bytes > kCached && 4 * a.points > cells;
  SampleArgs none = a;
  none.batch = none.points = 0;
  ByRow by_row(sorted ? a : none, Tag<A>{});
#pragma omp parallel num_threads(a.threads)
  {
    Block<A> block;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < (total + kBlock - 1) / kBlock; ++chunk) {
      const int64_t begin = chunk * kBlock;
      const int size = int(smaller(kBlock, total - begin));
      int64_t point[kBlock], batch[kBlock];
      for (int i = 0; i < size; ++i) {
        const int64_t p = sorted ? by_row.order[begin + i] : begin + i, b = p / a.points;
        const A* xy = static_cast<const A*>(a.xy) + b * a.xy_stride + 2 * (p - b * a.points);
        block.x[i] = xy[0], block.y[i] = xy[1], point[i] = p, batch[i] = b;
      }
      block.locate(size, a);
      for (int i = 0; i < size; ++i) {
        const Corners<A, K> corners(block, i, a);
        const T* row[K];
        A w[K];
        rows<const T, K>(static_cast<const T*>(a.map) + batch[i] * a.map_stride, zeros.data(), corners.pixel, c, row);
        corners.weights(w);
        T* out = static_cast<T*>(a.out) + point[i] * c;
        for_vectors<A>(c, [&](int64_t i, auto n) {
          vec<A> sum = broadcast<A>(w[0]) * load<A>(row[0] + i, n);
          for (int k = 1; k < K; ++k) sum += broadcast<A>(w[k]) * load<A>(row[k] + i, n);
          if constexpr (Stream) store_streaming(out + i, sum); else store(out + i, sum, n);
        });
      }
    }
    if constexpr (Stream) stream_fence();
  }
}

// ---- bwd and bwd_bwd

// row_k[i ..] += w_k g. All loads come before all stores: rows often lie a multiple of 4096 bytes apart, where a processor
// takes a load after a store for one of the same place.
template <int K, class A, class N>
inline void add_rows(A* const* row, const A* w, vec<A> g, int64_t i, N n) {
  vec<A> sum[K];
  for (int k = 0; k < K; ++k) sum[k] = load<A>(row[k] + i, n) + broadcast<A>(w[k]) * g;
  for (int k = 0; k < K; ++k) store(row[k] + i, sum[k], n);
}

// dots_k = <g, row_k>; d_row_k += w_k g
template <class T, int K, bool Scatter, bool Dots>
inline void point_bwd(const T* g, const T* const* row, acc_t<T>* const* d_row, const acc_t<T>* w, acc_t<T>* dots, int64_t c) {
  using A = acc_t<T>;
  vec<A> dot[K] = {};
  for_vectors<A>(c, [&](int64_t i, auto n) {
    const vec<A> g_i = load<A>(g + i, n);
    if constexpr (Scatter) add_rows<K>(d_row, w, g_i, i, n);
    for (int k = 0; k < K && Dots; ++k) dot[k] += g_i * load<A>(row[k] + i, n);
  });
  if constexpr (Dots) {
    for (int k = 0; k < K; ++k) dots[k] = reduce_add(dot[k]);
  }
}

// d_g = sum_k w_k h_row_k + t_k row_k; dots_k = <g, row_k>; h_dots_k = <g, h_row_k>; d_row_k += t_k g
template <class T, bool HasH, bool Scatter, bool Stream>
inline void point_bwd_bwd(const T* g, const T* const* row, const T* const* h_row, acc_t<T>* const* d_row, const acc_t<T>* w,
                          const acc_t<T>* t, T* d_g, acc_t<T>* dots, acc_t<T>* h_dots, int64_t c) {
  using A = acc_t<T>;
  vec<A> dot[4] = {}, h_dot[4] = {};
  for_vectors<A>(c, [&](int64_t i, auto n) {
    const vec<A> g_i = load<A>(g + i, n);
    vec<A> sum = {};
    for (int k = 0; k < 4; ++k) {
      const vec<A> v = load<A>(row[k] + i, n);
      sum += broadcast<A>(t[k]) * v;
      dot[k] += g_i * v;
      if constexpr (HasH) {
        const vec<A> h = load<A>(h_row[k] + i, n);
        sum += broadcast<A>(w[k]) * h;
        h_dot[k] += g_i * h;
      }
    }
    if constexpr (Scatter) add_rows<4>(d_row, t, g_i, i, n);
    if constexpr (Stream) store_streaming(d_g + i, sum); else store(d_g + i, sum, n);
  });
  for (int k = 0; k < 4; ++k) dots[k] = reduce_add(dot[k]);
  for (int k = 0; k < 4 && HasH; ++k) h_dots[k] = reduce_add(h_dot[k]);
}

// Asks for a row of memory that will be read soon. Rows in sorted order follow no pattern that a processor would foresee.
template <class T> inline void prefetch(const T* row, int64_t size) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0, bytes = smaller(size * int64_t(sizeof(T)), kPrefetched); i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// visit(p, b, corners, own): every point under the band of rows that it writes to; pixels of other bands are -1 there.
// Where a point's two rows lie in two bands it is visited twice, and `own` is true in the band of its lower neighbours.
template <class T, int K, class Visit> void by_bands(const SampleArgs& a, ByRow& by_row, bool scatter, Visit&& visit) {
  using A = acc_t<T>;
  const int64_t bands = a.threads == 1 ? 1 : smaller(4 * a.threads, by_row.n_rows);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t band = 0; band < bands; ++band) {
    const int64_t begin = by_row.band(band, bands), end = by_row.band(band + 1, bands);
    const bool above = K == 4 && scatter && begin < end && begin % a.height != 0;
    Block<A> block;
    for (int64_t row = begin - above; row < end; ++row) {
      const int64_t b = row / a.height;
      const A* xy = static_cast<const A*>(a.xy) + b * a.xy_stride;
      for (int64_t i = by_row.start[row]; i < by_row.start[row + 1]; i += kBlock) {
        const int size = int(smaller(kBlock, by_row.start[row + 1] - i));
        for (int at = 0; at < size; ++at) {
          const int64_t n = by_row.order[i + at] - b * a.points;
          block.x[at] = xy[2 * n], block.y[at] = xy[2 * n + 1];
        }
        block.locate(size, a);
        for (int at = 0; at < size; ++at) {
          Corners<A, K> corners(block, at, a);
          for (int k = 0; k < K; ++k) {
            const int64_t pixel_row = b * a.height + int64_t(corners.y.whole) + (k >> 1);
            corners.kept[k] = pixel_row >= begin && pixel_row < end ? corners.pixel[k] : -1;
          }
          const int64_t ahead = smaller(i + at + kAhead, by_row.start[row + 1] - 1);
          const int64_t n = by_row.order[ahead] - b * a.points;
          prefetch(static_cast<const T*>(a.d_out) + b * a.d_out_stride + n * a.channels, a.channels);
          visit(by_row.order[i + at], b, corners, row >= begin);
        }
      }
    }
    stream_fence();
  }
}

// Where d_map has no pixel to write to, each thread writes to a row of its own.
template <class A> struct Elsewhere {
  int64_t channels;
  Buffer<A> memory;
  Elsewhere(int threads, int64_t channels) : channels(channels), memory(threads * (channels + 16)) {}
  A* mine() { return &memory[omp_get_thread_num() * (channels + 16)]; }
};

template <class T, int K, bool Scatter, bool Dots> void bwd(const SampleArgs& a) {
  using A = acc_t<T>;
  const int64_t c = a.channels, map_size = a.height * a.width * c;
  Buffer<T> zeros(c);
  memset(zeros.data(), 0, size_t(c) * sizeof(T));
  Elsewhere<A> elsewhere(a.threads, c);
  ByRow by_row(a, Tag<A>{});
  by_bands<T, K>(a, by_row, Scatter, [&](int64_t p, int64_t b, const Corners<A, K>& corners, bool own) {
    const T* g = static_cast<const T*>(a.d_out) + b * a.d_out_stride + (p - b * a.points) * c;
    const T* row[K];
    A *d_row[K], w[K], dots[K];
    rows<const T, K>(static_cast<const T*>(a.map) + b * a.map_stride, zeros.data(), corners.pixel, c, row);
    if constexpr (Scatter) {
      rows<A, K>(static_cast<A*>(a.d_map) + b * map_size, elsewhere.mine(), corners.kept, c, d_row);
      corners.weights(w);
    }
    if (!own) return point_bwd<T, K, Scatter, false>(g, row, d_row, w, dots, c);
    point_bwd<T, K, Scatter, Dots>(g, row, d_row, w, dots, c);
    if constexpr (Dots) {
      A* d_xy = static_cast<A*>(a.d_xy) + 2 * p;
      d_xy[0] = chain(corners.x.slope, along_x(corners.y, dots));
      d_xy[1] = chain(corners.y.slope, along_y(corners.x, dots));
    }
  });
}

template <class T, bool HasH, bool Scatter, bool Stream> void bwd_bwd(const SampleArgs& a) {
  using A = acc_t<T>;
  const int64_t c = a.channels, map_size = a.height * a.width * c;
  Buffer<T> zeros(c);
  memset(zeros.data(), 0, size_t(c) * sizeof(T));
  Elsewhere<A> elsewhere(a.threads, c);
  ByRow by_row(a, Tag<A>{});
  by_bands<T, 4>(a, by_row, Scatter, [&](int64_t p, int64_t b, const Corners<A, 4>& corners, bool own) {
    const T* g = static_cast<const T*>(a.d_out) + b * a.d_out_stride + (p - b * a.points) * c;
    const A* u = static_cast<const A*>(a.gg_xy) + b * a.gg_xy_stride + 2 * (p - b * a.points);
    const T *row[4], *h_row[4];
    A *d_row[4], w[4], t[4], dots[4], h_dots[4] = {};
    rows<const T, 4>(static_cast<const T*>(a.map) + b * a.map_stride, zeros.data(), corners.pixel, c, row);
    if constexpr (HasH) {
      rows<const T, 4>(static_cast<const T*>(a.gg_map) + b * a.gg_map_stride, zeros.data(), corners.pixel, c, h_row);
      corners.weights(w);
    }
    if constexpr (Scatter) rows<A, 4>(static_cast<A*>(a.d_map) + b * map_size, elsewhere.mine(), corners.kept, c, d_row);
    const Place<A>&x = corners.x, &y = corners.y;
    const A ux = u[0] * x.slope, uy = u[1] * y.slope;
    t[0] = -ux * (1 - y.share) - uy * (1 - x.share), t[1] = ux * (1 - y.share) - uy * x.share;
    t[2] = -ux * y.share + uy * (1 - x.share), t[3] = ux * y.share + uy * x.share;
    if (!own) return point_bwd<T, 4, Scatter, false>(g, row, d_row, t, dots, c);
    point_bwd_bwd<T, HasH, Scatter, Stream>(g, row, h_row, d_row, w, t, static_cast<T*>(a.d_d_out) + p * c, dots, h_dots, c);
    A* d_xy = static_cast<A*>(a.d_xy) + 2 * p;
    d_xy[0] = chain(x.slope, along_x(y, h_dots) + uy * along_both(dots));
    d_xy[1] = chain(y.slope, along_y(x, h_dots) + ux * along_both(dots));
  });
}

template <class T, bool HasH, bool Scatter> void bwd_bwd(const SampleArgs& a) {
  return streams<T>(a, a.d_d_out) ? bwd_bwd<T, HasH, Scatter, true>(a) : bwd_bwd<T, HasH, Scatter, false>(a);
}

bool nothing(const SampleArgs& a) { return a.batch == 0 || a.points == 0 || a.channels == 0; }

}  // namespace

void bilinear_sample_fwd(const SampleArgs& a) {
  if (nothing(a)) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    const bool past_caches = streams<T>(a, a.out);
    if (a.rule.mode == Sampling::bilinear) return past_caches ? fwd<T, 4, true>(a) : fwd<T, 4, false>(a);
    return past_caches ? fwd<T, 1, true>(a) : fwd<T, 1, false>(a);
  });
}

void bilinear_sample_bwd(const SampleArgs& a) {
  if (nothing(a)) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    if (a.rule.mode != Sampling::bilinear) return a.d_map ? bwd<T, 1, true, false>(a) : void();
    if (a.d_map && a.d_xy) return bwd<T, 4, true, true>(a);
    if (a.d_map) return bwd<T, 4, true, false>(a);
    if (a.d_xy) return bwd<T, 4, false, true>(a);
  });
}

void bilinear_sample_bwd_bwd(const SampleArgs& a) {
  if (nothing(a)) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    if (a.gg_map) return a.d_map ? bwd_bwd<T, true, true>(a) : bwd_bwd<T, true, false>(a);
    return a.d_map ? bwd_bwd<T, false, true>(a) : bwd_bwd<T, false, false>(a);
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
