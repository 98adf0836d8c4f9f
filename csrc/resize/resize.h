// resize: resample one axis, with the semantics of jax.image.resize.
//
// maths     out[o, j, i] = sum_n W[j, n] x[o, n, i]
//           W[j, n] = k(|s_j - n| / a) / sum_m k(|s_j - m| / a),  s_j = (j + 1/2) n_in / n_out - 1/2,
//           a = max(n_in / n_out, 1) with antialias, else 1; k is the filter below. The adjoint applies W transposed.
// shapes    x (outer, n_in, inner), out (outer, n_out, inner), both contiguous. For the adjoint x is
//           (outer, n_out, inner) and out (outer, n_in, inner): `rows` below is the length of out's axis.
// work      W has few entries per row; a launcher tabulates them once (first column, count, weights), then each tile
//           of columns is read once and written once. Columns outside a row's band are never read, so a NaN or
//           infinity reaches only the outputs whose window covers it.
// numerics  weights in double, rounded once to the accumulator (float for 16-bit types, else the type itself)
// limits    1 <= n_in, n_out <= 2^30, any outer and inner; 64-bit addressing
#pragma once
#include <cmath>

#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

enum class Filter : int { nearest = 0, linear = 1, cubic = 2, lanczos3 = 3, lanczos5 = 4 };

struct ResizeArgs {
  const void* x;
  void* out;
  DType x_dtype, out_dtype;  // equal, or one of them f32 and the other 16-bit
  int64_t outer, n_in, n_out, inner;
  Filter filter;
  bool antialias, adjoint;
  int threads;       // CPU
  double* workspace;  // CUDA: resize_workspace() doubles on the device
  void* stream;      // CUDA
};

FOURDPERF_DECLARE_CPU(resize, ResizeArgs)
void resize_cuda(const ResizeArgs& args);

namespace {

FOURDPERF_HOST_DEVICE double filter_radius(Filter f) {
  return f == Filter::nearest ? 0.5 : f == Filter::linear ? 1. : f == Filter::cubic ? 2. : f == Filter::lanczos3 ? 3. : 5.;
}

FOURDPERF_HOST_DEVICE double sinc_window(double x, double radius) {
  constexpr double pi = 3.14159265358979323846;
  if (x > radius) return 0.;
  if (x <= 1e-3) return 1.;  // the reference's threshold
  return radius * sin(pi * x) * sin(pi * x / radius) / (pi * pi * x * x);
}

// Filter at distance x >= 0; cubic is Keys with a = -1/2, in factors so that nothing cancels. (nearest picks one source: see nearest_source)
FOURDPERF_HOST_DEVICE double filter_value(Filter f, double x) {
  switch (f) {
    case Filter::nearest: return 1.;
    case Filter::linear: return x < 1. ? 1. - x : 0.;
    case Filter::cubic:
      if (x >= 2.) return 0.;
      return x < 1. ? (1. - x) * (1. + x - 1.5 * x * x) : 0.5 * (1. - x) * (2. - x) * (2. - x);
    case Filter::lanczos3: return sinc_window(x, 3.);
    case Filter::lanczos5: return sinc_window(x, 5.);
  }
  return 0.;
}

struct Band { int64_t first, count; };

// W as a band: row r of the operator (or of its transpose) has `count` entries from column `first` on.
struct ResizeTable {
  int64_t n_in, n_out;
  Filter filter;
  bool adjoint, widened;
  double step, support;  // source pixels per output, reach of the filter in source pixels

  FOURDPERF_HOST_DEVICE ResizeTable(int64_t n_in, int64_t n_out, Filter filter, bool antialias, bool adjoint)
      : n_in(n_in), n_out(n_out), filter(filter), adjoint(adjoint), widened(antialias && n_in > n_out),
        step(double(n_in) / double(n_out)), support(filter_radius(filter) * (widened ? step : 1.)) {}

  FOURDPERF_HOST_DEVICE int64_t rows() const { return adjoint ? n_in : n_out; }
  FOURDPERF_HOST_DEVICE int64_t columns() const { return adjoint ? n_out : n_in; }

  // No row has more entries than this.
  FOURDPERF_HOST_DEVICE int64_t max_count() const {
    const double reach = adjoint ? (filter == Filter::nearest ? 1. : 2. * support) / step : 2. * support;
    const int64_t bound = filter == Filter::nearest && !adjoint ? 1 : int64_t(reach) + 2;
    return bound < columns() ? bound : columns();
  }

  FOURDPERF_HOST_DEVICE double centre(int64_t j) const { return (double(j) + 0.5) * step - 0.5; }
  FOURDPERF_HOST_DEVICE int64_t nearest_source(int64_t j) const { return ((2 * j + 1) * n_in) / (2 * n_out); }

  FOURDPERF_HOST_DEVICE static Band clip(double low, double high, int64_t size, int64_t limit) {
    int64_t first = int64_t(ceil(low)), last = int64_t(floor(high));
    if (first < 0) first = 0;
    if (last > size - 1) last = size - 1;
    const int64_t count = last - first + 1;
    return {first, count < 0 ? 0 : count < limit ? count : limit};
  }

  // Source pixels that output j reads.
  FOURDPERF_HOST_DEVICE Band sources(int64_t j, int64_t limit) const {
    if (filter == Filter::nearest) return {nearest_source(j), 1};
    return clip(centre(j) - support, centre(j) + support, n_in, limit);
  }

  FOURDPERF_HOST_DEVICE double raw(int64_t j, int64_t n) const {
    // |s_j - n| / a from whole numbers: one rounding, however long the axis
    const int64_t distance = (2 * j + 1) * n_in - (2 * n + 1) * n_out;
    return filter_value(filter, fabs(double(distance)) / double(2 * (widened ? n_in : n_out)));
  }

  // Sum of the filter over the sources of output j: what row j of W is divided by.
  FOURDPERF_HOST_DEVICE double total(int64_t j) const {
    const Band band = sources(j, n_in);
    double sum = 0.;
    for (int64_t k = 0; k < band.count; ++k) sum += raw(j, band.first + k);
    return sum;
  }

  // Columns of row r that are not zero; at most max_count() of them.
  FOURDPERF_HOST_DEVICE Band band(int64_t r) const {
    if (!adjoint) return sources(r, max_count());
    if (filter == Filter::nearest) {  // the outputs j with nearest_source(j) == r
      const int64_t from = (2 * n_out * r + n_in - 1) / (2 * n_in), to = (2 * n_out * (r + 1) + n_in - 1) / (2 * n_in);
      return {from, to - from};
    }
    return clip((double(r) - support + 0.5) / step - 0.5, (double(r) + support + 0.5) / step - 0.5, n_out, max_count());
  }

  // Entry in row r and column c; totals[j] = total(j).
  FOURDPERF_HOST_DEVICE double weight(int64_t r, int64_t c, const double* totals) const {
    const int64_t j = adjoint ? c : r, n = adjoint ? r : c;
    return filter == Filter::nearest ? 1. : raw(j, n) / totals[j];
  }
};

// Doubles of device memory that a CUDA launch needs: totals, then per row (first, count, weights).
inline int64_t resize_workspace(int64_t n_in, int64_t n_out, Filter filter, bool antialias, bool adjoint) {
  const ResizeTable table(n_in, n_out, filter, antialias, adjoint);
  return n_out + table.rows() * (2 + table.max_count());
}

}  // namespace
}  // namespace fourdperf
