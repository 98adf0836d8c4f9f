// gather_patches and its gradients on the CPU. The header states maths and shapes.
//
// work      forward, d_points: a task is a point; rows of a patch that lie inside the frame and whose pixels are
//           neighbours in memory are read in one piece. d_video: points are sorted by frame; a task is a band of rows of a
//           frame, summed in a buffer of the second-level cache and written once. It goes through the frame's points in order, so
//           the number of threads changes nothing.
// numerics  as in the header
// limits    none; scratch is a few patch rows and a band a thread, and 48 bytes a point in backward
#include <omp.h>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/simd.h"
#include "gather_patches/gather_patches.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kBand = 65536;  // elements of a band

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class P> struct Place {
  PatchAxis<P> y, x;
  int64_t b, t, point;
};

template <class P> Place<P> place_of(const PatchArgs& a, int64_t point) {
  const P* uv = static_cast<const P*>(a.points) + 2 * point;
  return {patch_axis(uv[1], a.height, a.size, a.mode, a.coordinates, a.border),
          patch_axis(uv[0], a.width, a.size, a.mode, a.coordinates, a.border), point / a.points_per_batch,
          patch_frame(a, point), point};
}

// `pixels` pixels of row y of a patch, channels together; Y is T, or the type of sums
template <class T, class P, class Y>
inline void fetch_row(const PatchArgs& a, const Place<P>& place, int64_t y, int64_t pixels, Y* to) {
  const int64_t *s = a.strides, first = place.x.first;
  const T* row = static_cast<const T*>(a.video) + place.b * s[0] + place.t * s[1];
  row += clamp_index(place.y.first + y, a.height) * s[2];
  if (first >= 0 && first + pixels <= a.width && s[4] == 1 && s[3] == a.channels) {
    row += first * s[3];
    if constexpr (sizeof(T) == sizeof(Y)) {
      memcpy(to, row, size_t(pixels * a.channels) * sizeof(T));
    } else {
      for (int64_t k = 0; k < pixels * a.channels; ++k) to[k] = to_float(row[k]);
    }
    return;
  }
  for (int64_t j = 0; j < pixels; ++j) {
    const T* pixel = row + clamp_index(first + j, a.width) * s[3];
    for (int64_t c = 0; c < a.channels; ++c, ++to) {
      if constexpr (sizeof(T) == sizeof(Y)) *to = pixel[c * s[4]];
      else *to = to_float(pixel[c * s[4]]);
    }
  }
}

template <class T, class P> void copy_patches(const PatchArgs& a) {
  const int64_t row = a.size * a.channels;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t n = 0; n < a.batch * a.points_per_batch; ++n) {
    const Place<P> place = place_of<P>(a, n);
    T* out = static_cast<T*>(a.out) + n * a.size * row;
    for (int64_t i = 0; i < a.size; ++i) fetch_row<T>(a, place, i, a.size, out + i * row);
  }
}

// Scratch of one point: pixels of a row, their differences along x, and the rows interpolated along x of this and the row before.
template <class A> struct Rows {
  int64_t n, room;
  A *pixels, *step, *step_before, *row, *row_before, *d_out;

  static int64_t padded(const PatchArgs& a) { return ((a.size + 1) * a.channels + 2 * lanes<A>) / lanes<A> * lanes<A>; }

  Rows(const PatchArgs& a, A* scratch) : n(a.size * a.channels), room(padded(a)) {
    for (int64_t i = 0; i < 6 * room; ++i) scratch[i] = 0;
    pixels = scratch, step = pixels + room, step_before = step + room, row = step_before + room, row_before = row + room;
    d_out = row_before + room;
  }

  template <class T, class P> void advance(const PatchArgs& a, const Place<P>& place, int64_t y) {
    A* swap = step;
    step = step_before, step_before = swap;
    swap = row;
    row = row_before, row_before = swap;
    fetch_row<T>(a, place, y, a.size + 1, pixels);
    const A f = A(place.x.fraction);
    for (int64_t k = 0; k < n; ++k) {
      step[k] = pixels[k + a.channels] - pixels[k];
      row[k] = pixels[k] + f * step[k];
    }
  }
};

template <class T, class O, class P> void interpolate(const PatchArgs& a) {
  using A = acc_t<T>;
  const int64_t room = 6 * Rows<A>::padded(a);
  Buffer<A> scratch(a.threads * room);
#pragma omp parallel num_threads(a.threads)
  {
    Rows<A> rows(a, &scratch[omp_get_thread_num() * room]);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.batch * a.points_per_batch; ++n) {
      const Place<P> place = place_of<P>(a, n);
      const A f = A(place.y.fraction);
      O* out = static_cast<O*>(a.out) + n * a.size * rows.n;
      rows.template advance<T>(a, place, 0);
      for (int64_t i = 0; i < a.size; ++i, out += rows.n) {
        rows.template advance<T>(a, place, i + 1);
        for (int64_t k = 0; k < rows.n; ++k) {
          out[k] = from_float<O>(rows.row_before[k] + f * (rows.row[k] - rows.row_before[k]));
        }
      }
    }
  }
}

template <class T, class O, class P> void points_backward(const PatchArgs& a) {
  using A = acc_t<T>;
  if (a.mode != PatchMode::bilinear) {
    memset(a.d_points, 0, size_t(a.batch * a.points_per_batch) * 2 * sizeof(P));
    return;
  }
  const int64_t room = 6 * Rows<A>::padded(a);
  Buffer<A> scratch(a.threads * room);
#pragma omp parallel num_threads(a.threads)
  {
    Rows<A> rows(a, &scratch[omp_get_thread_num() * room]);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.batch * a.points_per_batch; ++n) {
      const Place<P> place = place_of<P>(a, n);
      const vec<A> f = broadcast<A>(A(place.y.fraction));
      const O* d_out = static_cast<const O*>(a.d_out) + n * a.size * rows.n;
      vec<A> d_x = {}, d_y = {};
      rows.template advance<T>(a, place, 0);
      for (int64_t i = 0; i < a.size; ++i, d_out += rows.n) {
        rows.template advance<T>(a, place, i + 1);
        for (int64_t k = 0; k < rows.n; ++k) rows.d_out[k] = to_float(d_out[k]);
        for (int64_t k = 0; k < rows.n; k += lanes<A>) {
          const vec<A> d = load<A>(rows.d_out + k), before = load<A>(rows.step_before + k);
          d_x += d * (before + f * (load<A>(rows.step + k) - before));
          d_y += d * (load<A>(rows.row + k) - load<A>(rows.row_before + k));
        }
      }
      P* d_point = static_cast<P*>(a.d_points) + 2 * n;
      d_point[0] = along(place.x, P(reduce_add(d_x)));
      d_point[1] = along(place.y, P(reduce_add(d_y)));
    }
  }
}

// The share of one point in the rows [low, high) of its frame. `column` holds a row of d_out weighted along y, with
// `channels` zeros on either side.
template <class O, class A, class P>
inline void add_point(const PatchArgs& a, const Place<P>& place, int64_t low, int64_t high, A* column, A* band) {
  const bool between = a.mode == PatchMode::bilinear;
  const int64_t c = a.channels, n = a.size * c, reach = a.size + between;
  if (clamp_index(place.y.first, a.height) >= high || clamp_index(place.y.first + reach - 1, a.height) < low) return;
  const O* d_out = static_cast<const O*>(a.d_out) + place.point * a.size * n;
  const A f_x = A(place.x.fraction), f_y = A(place.y.fraction);
  for (int64_t i = 0; i < reach; ++i) {
    const int64_t y = clamp_index(place.y.first + i, a.height);
    if (y < low || y >= high) continue;
    const O *here = d_out + i * n, *above = here - n;
    A* to = column + c;
    if (!between) for (int64_t k = 0; k < n; ++k) to[k] = to_float(here[k]);
    else if (i == 0) for (int64_t k = 0; k < n; ++k) to[k] = (1 - f_y) * to_float(here[k]);
    else if (i == a.size) for (int64_t k = 0; k < n; ++k) to[k] = f_y * to_float(above[k]);
    else for (int64_t k = 0; k < n; ++k) to[k] = (1 - f_y) * to_float(here[k]) + f_y * to_float(above[k]);
    A* row = band + (y - low) * a.width * c;
    if (place.x.first >= 0 && place.x.first + reach <= a.width) {
      row += place.x.first * c;
      if (between) for (int64_t k = 0; k < reach * c; ++k) row[k] += (1 - f_x) * to[k] + f_x * column[k];
      else for (int64_t k = 0; k < n; ++k) row[k] += to[k];
      continue;
    }
    for (int64_t j = 0; j < reach; ++j) {
      A* pixel = row + clamp_index(place.x.first + j, a.width) * c;
      for (int64_t k = j * c; k < (j + 1) * c; ++k) {
        pixel[k - j * c] += between ? (1 - f_x) * to[k] + f_x * column[k] : to[k];
      }
    }
  }
}

template <class T, class P> void video_backward(const PatchArgs& a) {
  using A = acc_t<T>;
  const int64_t points = a.batch * a.points_per_batch, frames = a.batch * a.frames, row = a.width * a.channels;
  Buffer<Place<P>> sorted(points);
  Buffer<int64_t> start(frames + 1);
  for (int64_t f = 0; f <= frames; ++f) start[f] = 0;
  const auto frame_of = [&](int64_t n) { return n / a.points_per_batch * a.frames + patch_frame(a, n); };
  for (int64_t n = 0; n < points; ++n) ++start[frame_of(n)];
  for (int64_t f = 1; f <= frames; ++f) start[f] += start[f - 1];
  for (int64_t n = points - 1; n >= 0; --n) sorted[--start[frame_of(n)]] = place_of<P>(a, n);
  const int64_t height = row < kBand ? smaller(kBand / row, a.height) : 1, bands = (a.height + height - 1) / height;
  const int64_t padding = (a.size + 2) * a.channels, room = height * row + padding;
  Buffer<A> scratch(a.threads * room);
#pragma omp parallel num_threads(a.threads)
  {
    A* column = &scratch[omp_get_thread_num() * room];
    A* band = column + padding;
    for (int64_t k = 0; k < padding; ++k) column[k] = 0;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < frames * bands; ++task) {
      const int64_t frame = task / bands, low = task % bands * height, high = smaller(low + height, a.height);
      const int64_t count = (high - low) * row;
      for (int64_t k = 0; k < count; ++k) band[k] = 0;
      for (int64_t n = start[frame]; n < start[frame + 1]; ++n) add_point<T>(a, sorted[n], low, high, column, band);
      T* out = static_cast<T*>(a.d_video) + (frame * a.height + low) * row;
      for (int64_t k = 0; k < count; ++k) out[k] = from_float<T>(band[k]);
    }
  }
}

template <class F> void with_types(const PatchArgs& a, F&& f) {
  const auto with_points = [&](auto tag) {
    return a.point_dtype == DType::f64 ? f(tag, Tag<double>{}) : f(tag, Tag<float>{});
  };
  if (a.dtype == kUint8) return with_points(Tag<uint8_t>{});
  with_dtype(DType(a.dtype), with_points);
}

}  // namespace

void gather_patches(const PatchArgs& a) {
  if (a.batch * a.points_per_batch * a.channels == 0) return;
  with_types(a, [&](auto tag, auto point_tag) {
    using T = untag<decltype(tag)>;
    using P = untag<decltype(point_tag)>;
    if (a.mode != PatchMode::bilinear) return copy_patches<T, P>(a);
    if constexpr (sizeof(T) == 1) return interpolate<T, float, P>(a);
    else return interpolate<T, T, P>(a);
  });
}

void gather_patches_backward(const PatchArgs& a) {
  if (a.batch * a.points_per_batch * a.channels == 0) return;
  with_types(a, [&](auto tag, auto point_tag) {
    using T = untag<decltype(tag)>;
    using P = untag<decltype(point_tag)>;
    if constexpr (sizeof(T) == 1) {
      if (a.d_points) points_backward<T, float, P>(a);
    } else {
      if (a.d_video) video_backward<T, P>(a);
      if (a.d_points) points_backward<T, T, P>(a);
    }
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
