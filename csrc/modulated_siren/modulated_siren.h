// modulated_siren: the sine of a linear layer's output, scaled and shifted by what a map holds at each point, and the first
// and second derivatives of that.
//
// maths     s, t = sum_k w_k map[pixel_k];  a = (1 + s) pre + t;  out = sin(omega a);  kinds without s (or t) take it as 0
//           bwd, for g = d_out:   c = g omega cos(omega a);  d_pre = c (1 + s);  d_s = c pre;  d_t = c
//           bwd_bwd, for u = v_pre and vs, vt = sum_k w_k v_map[pixel_k]:  q = u (1 + s) + vs pre + vt
//             d_d_out = q omega cos(omega a);  e = -g omega^2 sin(omega a) q
//             d_pre = e (1 + s) + c vs;  d_s = e pre + c u;  d_t = e
//           d_map[pixel_k] += w_k (d_s, d_t)
// shapes    pre, out, d_out, v_pre and their gradients (batch, points, channels); map, v_map, d_map (batch, height, width,
//           channels, or twice as many: scales, then shifts); xy (batch, points, 2). Inputs have strides along all axes but the
//           channels (0: shared), xy along the batch alone; outputs are contiguous.
// work      sine and cosine are worked out again from pre and map: nothing else is kept, and no modulation is ever written
// numerics  positions are bilinear_sample's; angles and sums in float (double for double); common/sincos.h has the reduction.
//           d_map comes filled with zeros and is added to; it and xy have the accumulator's dtype.
// limits    any sizes; 64-bit addressing; any coordinates. One that is NaN makes the point's outputs NaN and adds nothing to d_map.
#pragma once
#include "bilinear_sample/bilinear_sample.h"
#include "common/sincos.h"

namespace fourdperf {

enum class Modulate : int { shift = 0, scale = 1, both = 2 };

struct PointStrides { int64_t batch, point; };
struct PixelStrides { int64_t batch, y, x; };

struct SineArgs {
  const void *pre, *map, *xy, *d_out, *v_pre, *v_map;  // v_pre and v_map may be null: zeros
  void *out, *d_d_out, *d_pre, *d_map;                 // of bwd and bwd_bwd d_pre and d_map may be null: not wanted
  PointStrides pre_strides, d_out_strides, v_pre_strides;
  PixelStrides map_strides, v_map_strides;
  int64_t xy_stride;
  DType dtype;  // of all but xy and d_map
  int64_t batch, points, channels, height, width;
  double omega;
  Modulate modulate;
  bool bilinear;                  // else nearest
  int threads;                    // CPU
  const int64_t *order, *starts;  // CUDA: points sorted by cell (order, starts of the cells), or null to sum d_map by atomics
  void* stream;                   // CUDA
};

FOURDPERF_DECLARE_CPU(modulated_sine_fwd, SineArgs)
FOURDPERF_DECLARE_CPU(modulated_sine_bwd, SineArgs)
FOURDPERF_DECLARE_CPU(modulated_sine_bwd_bwd, SineArgs)
void modulated_sine_fwd_cuda(const SineArgs& args);
void modulated_sine_bwd_cuda(const SineArgs& args);
void modulated_sine_bwd_bwd_cuda(const SineArgs& args);

namespace {

FOURDPERF_HOST_DEVICE SampleRule sine_rule(bool bilinear) {
  return {bilinear ? Sampling::bilinear : Sampling::nearest_floor, false, bilinear, Border::clamp};
}

// The pixels of the map that a point reads, and their weights: one, two along a border, or four, all of them different.
// A coordinate that is NaN gives pixel (0, 0) the weight NaN.
template <class A> struct Taps {
  int count;
  int64_t y[4], x[4];
  A weight[4];
};

template <class A> FOURDPERF_HOST_DEVICE Taps<A> taps(A x, A y, int64_t height, int64_t width, bool bilinear) {
  const Place<A> along_x = locate(x, width, sine_rule(bilinear)), along_y = locate(y, height, sine_rule(bilinear));
  const A sum = along_x.share + along_y.share;
  Taps<A> result{};
  if (sum != sum) {
    result.count = 1;
    result.weight[0] = sum;
    return result;
  }
  const int64_t left = int64_t(along_x.whole), top = int64_t(along_y.whole);
  for (int k = 0; k < (bilinear ? 4 : 1); ++k) {
    const int64_t column = left + (k & 1), row = top + (k >> 1);
    if (column >= width || row >= height) continue;  // that side's weight is zero there
    result.y[result.count] = row, result.x[result.count] = column;
    result.weight[result.count++] = (k & 1 ? along_x.share : 1 - along_x.share) * (k >> 1 ? along_y.share : 1 - along_y.share);
  }
  return result;
}

// What a map holds for a vector V of channels, and the derivatives by it.
template <class V> struct Modulation { V scale, shift; };

constexpr bool has_scale(Modulate kind) { return kind != Modulate::shift; }
constexpr bool has_shift(Modulate kind) { return kind != Modulate::scale; }

// (1 + scale) x + shift; A: the type of a channel, V: A or a vector of them
template <Modulate M, class A, class V> FOURDPERF_HOST_DEVICE V modulated(V x, Modulation<V> m) {
  if (has_scale(M)) x = (m.scale + A(1)) * x;
  return has_shift(M) ? x + m.shift : x;
}

template <class V> struct SineGradients {
  V d_out, pre;  // d_out: of bwd_bwd only
  Modulation<V> map;
};

template <Modulate M, class A, class V> FOURDPERF_HOST_DEVICE V sine(V pre, Modulation<V> m, A omega) {
  return sine_product<A>(modulated<M, A>(pre, m), V{} + omega);
}

template <Modulate M, class A, class V>
FOURDPERF_HOST_DEVICE SineGradients<V> sine_bwd(V d_out, V pre, Modulation<V> m, A omega) {
  const V c = d_out * (omega * cosine_product<A>(modulated<M, A>(pre, m), V{} + omega));
  return {V{}, has_scale(M) ? (m.scale + A(1)) * c : c, {c * pre, c}};
}

// u and v: the cotangents of d_pre, and of (d_s, d_t)
template <Modulate M, class A, class V>
FOURDPERF_HOST_DEVICE SineGradients<V> sine_bwd_bwd(V u, Modulation<V> v, V d_out, V pre, Modulation<V> m, A omega) {
  V sine, cosine;
  sincos_product<A>(modulated<M, A>(pre, m), V{} + omega, sine, cosine);
  V q = modulated<M, A>(u, {m.scale, v.shift});
  if (has_scale(M)) q = v.scale * pre + q;
  const V slope = omega * cosine, c = d_out * slope, e = -d_out * (omega * omega) * sine * q;
  const V d_pre = has_scale(M) ? (m.scale + A(1)) * e + c * v.scale : e;
  return {q * slope, d_pre, {e * pre + c * u, e}};
}

}  // namespace
}  // namespace fourdperf
