// modulated_siren on the CPU. The header states maths and shapes.
//
// work      a task is a block of points of one signal; where d_map is summed it is all points of one signal and a block of
//           channels, which no other task touches: no atomics, and one order of every sum, whatever the number of threads.
//           Pixels and weights are worked out once for a point, then vectors along its channels go through all the maths:
//           each input is read once, each output written once.
// numerics  as in the header; one rounding at the store
// limits    d_map is summed by at most batch x (channels in lines of 64 bytes) threads; no scratch
#include <omp.h>

#include "common/dispatch.h"
#include "common/simd.h"
#include "modulated_siren/modulated_siren.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int64_t kPoints = 32;  // of a task
constexpr int64_t kLine = 64;    // bytes

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Points [begin, end) of signal `batch`, channels [first, last).
struct Part { int64_t batch, begin, end, first, last; };

// visit(part): all parts of the work, in parallel.
template <class Visit> void over_parts(const SineArgs& a, Visit&& visit) {
  if (!a.d_map) {
    const int64_t blocks = (a.points + kPoints - 1) / kPoints;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < a.batch * blocks; ++i) {
      const int64_t begin = i % blocks * kPoints;
      visit(Part{i / blocks, begin, smaller(begin + kPoints, a.points), 0, a.channels});
    }
    return;
  }
  const int64_t unit = kLine / size_of(a.dtype), units = (a.channels + unit - 1) / unit;
  int64_t blocks = 1;  // enough for all threads, evenly
  while (blocks < units && a.batch * blocks < 4 * a.threads && a.batch * blocks % a.threads != 0) ++blocks;
  const int64_t size = (units + blocks - 1) / blocks * unit;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < a.batch * blocks; ++i) {
    const int64_t first = i % blocks * size;
    if (first < a.channels) visit(Part{i / blocks, 0, a.points, first, smaller(first + size, a.channels)});
  }
}

// A map at the K pixels of a point. Null: a map of zeros.
template <class T, Modulate M, int K> class Sample {
  using A = acc_t<T>;
  const T* row_[K];
  A weight_[K];
  bool given_;
  int64_t shifts_;

 public:
  Sample(const void* map, PixelStrides strides, int64_t batch, int64_t channels, const Taps<A>& taps)
      : given_(map), shifts_(M == Modulate::both ? channels : 0) {
    for (int k = 0; k < K; ++k) {
      const int64_t offset = batch * strides.batch + taps.y[k] * strides.y + taps.x[k] * strides.x;
      row_[k] = given_ ? static_cast<const T*>(map) + offset : nullptr;
      weight_[k] = taps.weight[k];
    }
  }

  template <class N> Modulation<vec<A>> at(int64_t i, N n) const {
    Modulation<vec<A>> m{};
    if (!given_) return m;
    if constexpr (has_scale(M)) m.scale = sum(i, n);
    if constexpr (has_shift(M)) m.shift = sum(i + shifts_, n);
    return m;
  }

 private:
  template <class N> vec<A> sum(int64_t i, N n) const {
    vec<A> s = broadcast<A>(weight_[0]) * load<A>(row_[0] + i, n);
    for (int k = 1; k < K; ++k) s += broadcast<A>(weight_[k]) * load<A>(row_[k] + i, n);
    return s;
  }
};

// d_map at the K pixels of a point. Null: not wanted.
template <class A, Modulate M, int K> class Scatter {
  A* row_[K];
  A weight_[K];
  bool wanted_;
  int64_t shifts_;

 public:
  Scatter(const SineArgs& a, int64_t batch, const Taps<A>& taps)
      : wanted_(a.d_map && taps.weight[0] == taps.weight[0]), shifts_(M == Modulate::both ? a.channels : 0) {
    for (int k = 0; k < K; ++k) {
      const int64_t pixel = (batch * a.height + taps.y[k]) * a.width + taps.x[k];
      row_[k] = wanted_ ? static_cast<A*>(a.d_map) + pixel * (M == Modulate::both ? 2 : 1) * a.channels : nullptr;
      weight_[k] = taps.weight[k];
    }
  }

  template <class N> void add(Modulation<vec<A>> m, int64_t i, N n) const {
    if (!wanted_) return;
    if constexpr (has_scale(M)) add(m.scale, i, n);
    if constexpr (has_shift(M)) add(m.shift, i + shifts_, n);
  }

 private:
  // All loads come before all stores: rows often lie a multiple of 4096 bytes apart, where a processor takes a load after
  // a store for one of the same place.
  template <class N> void add(vec<A> v, int64_t i, N n) const {
    vec<A> sum[K];
    for (int k = 0; k < K; ++k) sum[k] = load<A>(row_[k] + i, n) + broadcast<A>(weight_[k]) * v;
    for (int k = 0; k < K; ++k) store(row_[k] + i, sum[k], n);
  }
};

template <class T> inline const T* row(const void* p, PointStrides strides, int64_t batch, int64_t point) {
  return static_cast<const T*>(p) + batch * strides.batch + point * strides.point;
}

// A row of a contiguous result of the shape of pre. Null: not wanted.
template <class T> class Result {
  T* row_;

 public:
  Result(const SineArgs& a, void* p, int64_t batch, int64_t point)
      : row_(p ? static_cast<T*>(p) + (batch * a.points + point) * a.channels : nullptr) {}

  template <class N> void put(vec<acc_t<T>> v, int64_t i, N n) const {
    if (row_) store(row_ + i, v, n);
  }
};

struct Forward {
  template <class T, Modulate M, int K>
  static void point(const SineArgs& a, const Part& part, int64_t p, const Taps<acc_t<T>>& taps) {
    using A = acc_t<T>;
    const int64_t b = part.batch;
    const T* pre = row<T>(a.pre, a.pre_strides, b, p);
    const Sample<T, M, K> map(a.map, a.map_strides, b, a.channels, taps);
    const Result<T> out(a, a.out, b, p);
    const A omega = A(a.omega);
    for_vectors<A>(part.last - part.first, [&, first = part.first](int64_t j, auto n) {
      const int64_t i = first + j;
      out.put(sine<M, A>(load<A>(pre + i, n), map.at(i, n), omega), i, n);
    });
  }
};

struct Backward {
  template <class T, Modulate M, int K>
  static void point(const SineArgs& a, const Part& part, int64_t p, const Taps<acc_t<T>>& taps) {
    using A = acc_t<T>;
    const int64_t b = part.batch;
    const T *pre = row<T>(a.pre, a.pre_strides, b, p), *g = row<T>(a.d_out, a.d_out_strides, b, p);
    const Sample<T, M, K> map(a.map, a.map_strides, b, a.channels, taps);
    const Scatter<A, M, K> d_map(a, b, taps);
    const Result<T> d_pre(a, a.d_pre, b, p);
    const A omega = A(a.omega);
    for_vectors<A>(part.last - part.first, [&, first = part.first](int64_t j, auto n) {
      const int64_t i = first + j;
      const auto d = sine_bwd<M, A>(load<A>(g + i, n), load<A>(pre + i, n), map.at(i, n), omega);
      d_pre.put(d.pre, i, n);
      d_map.add(d.map, i, n);
    });
  }
};

struct BackwardBackward {
  template <class T, Modulate M, int K>
  static void point(const SineArgs& a, const Part& part, int64_t p, const Taps<acc_t<T>>& taps) {
    using A = acc_t<T>;
    const int64_t b = part.batch;
    const T *pre = row<T>(a.pre, a.pre_strides, b, p), *g = row<T>(a.d_out, a.d_out_strides, b, p);
    const T* u = a.v_pre ? row<T>(a.v_pre, a.v_pre_strides, b, p) : nullptr;
    const Sample<T, M, K> map(a.map, a.map_strides, b, a.channels, taps), v(a.v_map, a.v_map_strides, b, a.channels, taps);
    const Scatter<A, M, K> d_map(a, b, taps);
    const Result<T> d_d_out(a, a.d_d_out, b, p), d_pre(a, a.d_pre, b, p);
    const A omega = A(a.omega);
    for_vectors<A>(part.last - part.first, [&, first = part.first](int64_t j, auto n) {
      const int64_t i = first + j;
      const vec<A> u_i = u ? load<A>(u + i, n) : vec<A>{};
      const auto d = sine_bwd_bwd<M, A>(u_i, v.at(i, n), load<A>(g + i, n), load<A>(pre + i, n), map.at(i, n), omega);
      d_d_out.put(d.d_out, i, n);
      d_pre.put(d.pre, i, n);
      d_map.add(d.map, i, n);
    });
  }
};

template <class Pass, class T, Modulate M> void run(const SineArgs& a) {
  using A = acc_t<T>;
  over_parts(a, [&](const Part& part) {
    const A* xy = static_cast<const A*>(a.xy) + part.batch * a.xy_stride;
    for (int64_t p = part.begin; p < part.end; ++p) {
      const Taps<A> at = taps(xy[2 * p], xy[2 * p + 1], a.height, a.width, a.bilinear);
      switch (at.count) {
        case 1: Pass::template point<T, M, 1>(a, part, p, at); break;
        case 2: Pass::template point<T, M, 2>(a, part, p, at); break;
        default: Pass::template point<T, M, 4>(a, part, p, at);
      }
    }
  });
}

template <class Pass> void run(const SineArgs& a) {
  if (a.batch == 0 || a.points == 0 || a.channels == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    switch (a.modulate) {
      case Modulate::shift: return run<Pass, T, Modulate::shift>(a);
      case Modulate::scale: return run<Pass, T, Modulate::scale>(a);
      case Modulate::both: return run<Pass, T, Modulate::both>(a);
    }
  });
}

}  // namespace

void modulated_sine_fwd(const SineArgs& a) { run<Forward>(a); }
void modulated_sine_bwd(const SineArgs& a) { run<Backward>(a); }
void modulated_sine_bwd_bwd(const SineArgs& a) { run<BackwardBackward>(a); }

}  // namespace fourdperf::FOURDPERF_ISA
