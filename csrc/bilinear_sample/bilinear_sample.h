// bilinear_sample: read a channels-last map at points, and the first and second derivatives of that.
//
// maths     out[n] = sum_k w_k map[pixel_k],  k = 0..3: (y, x), (y, x+1), (y+1, x), (y+1, x+1); pixels outside are left out
//           w = ((1-fy)(1-fx), (1-fy) fx, fy (1-fx), fy fx);  x + fx = px(x), y + fy = py(y), with slopes sx, sy
//           bwd, for g = d_out:   d_map[pixel_k] += w_k g,  d_xy = (sx sum_k wx_k <g, map_k>, sy sum_k wy_k <g, map_k>)
//           bwd_bwd, for h = gg_map and u = gg_xy, with t_k = ux sx wx_k + uy sy wy_k and wx, wy, wxy the derivatives of w:
//             d_d_out = sum_k w_k h_k + t_k map_k,   d_map[pixel_k] += t_k g
//             d_xy = (sx sum_k wx_k <g, h_k> + wxy_k uy sy <g, map_k>,  sy sum_k wy_k <g, h_k> + wxy_k ux sx <g, map_k>)
//           nearest has one pixel of weight 1, and no slopes.
// shapes    map, gg_map (batch, height, width, channels); xy, gg_xy (batch, points, 2); out, d_out, d_d_out (batch, points,
//           channels). Inputs have a stride along the batch (0: shared) and are contiguous in the rest; outputs contiguous.
// work      d_map and d_xy come filled with zeros and are added to; they, xy and gg_xy have the accumulator's dtype
// numerics  positions round after the product and after the sum, as PyTorch does: no other backend sees another cell
// limits    any sizes; 64-bit addressing; any coordinates, NaN and infinities included (fourdperf/ops/bilinear_sample.py)
#pragma once
#include <cmath>

#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

enum class Sampling : int { bilinear = 0, nearest_floor = 1, nearest_round = 2 };
enum class Border : int { clamp = 0, zeros = 1, reflect = 2 };

struct SampleRule {
  Sampling mode;
  bool is_signed, align_corners;
  Border border;
};

struct SampleArgs {
  const void *map, *xy, *d_out, *gg_map, *gg_xy;  // gg_map may be null
  void *out, *d_d_out, *d_map, *d_xy;             // d_map and d_xy may be null: not wanted
  int64_t map_stride, xy_stride, d_out_stride, gg_map_stride, gg_xy_stride;  // along the batch
  DType dtype;  // of map, d_out, gg_map, out and d_d_out
  int64_t batch, height, width, channels, points;
  SampleRule rule;
  int threads;                    // CPU
  const int64_t *order, *starts;  // CUDA: points sorted by cell (order, starts of the cells), or null to sum d_map by atomics
  void* stream;                   // CUDA
};

FOURDPERF_DECLARE_CPU(bilinear_sample_fwd, SampleArgs)
FOURDPERF_DECLARE_CPU(bilinear_sample_bwd, SampleArgs)
FOURDPERF_DECLARE_CPU(bilinear_sample_bwd_bwd, SampleArgs)
void bilinear_sample_fwd_cuda(const SampleArgs& args);
void bilinear_sample_bwd_cuda(const SampleArgs& args);
void bilinear_sample_bwd_bwd_cuda(const SampleArgs& args);

namespace {

// a b + c with two roundings; the compiler may not fuse them.
template <class A> FOURDPERF_HOST_DEVICE A product_plus(A a, A b, A c) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 8) return __dadd_rn(__dmul_rn(a, b), c);
  else return __fadd_rn(__fmul_rn(a, b), c);
#elif defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
  return __builtin_assoc_barrier(a * b) + c;
#else
  volatile A product = a * b;
  return product + c;
#endif
}

FOURDPERF_HOST_DEVICE bool inside(int64_t i, int64_t n) { return uint64_t(i) < uint64_t(n); }  // 0 <= i < n

// Along one axis of n pixels: the lower neighbour (a whole number), the share of the upper one, d position / d coordinate.
// A neighbour that is not inside [0, n) is not in the map; a coordinate without a position has share and slope NaN.
template <class A> struct Place { A whole, share, slope; };

// No branches but on the rule, so that loops over points become vectors.
template <class A> FOURDPERF_HOST_DEVICE Place<A> locate(A x, int64_t n, SampleRule rule) {
  constexpr A nowhere = -2;
  const A cells = A(rule.align_corners ? n - 1 : n), last = A(n - 1);
  const A low = rule.align_corners || rule.mode == Sampling::nearest_floor ? A(0) : A(-0.5);
  A slope = rule.is_signed ? cells / 2 : cells;
  A p = product_plus(rule.is_signed ? x + 1 : x, slope, low);
  if (cells == 0) p = x == x ? A(0) : x;
  if (rule.border == Border::reflect && cells != 0) {
    const A distance = p < low ? low - p : p - low;
    const A turn = distance < 2 * cells ? distance : A(fmod(distance, 2 * cells));
    slope = (p < low) != (turn > cells) ? -slope : slope;
    p = low + (turn <= cells ? turn : 2 * cells - turn);
  }
  bool somewhere = p == p;
  if (rule.border == Border::zeros) {
    const bool outside = p <= A(-1) || p >= A(n);
    slope = outside ? A(0) : slope;
    somewhere = somewhere && !outside;
    p = outside ? nowhere : p;
  } else {
    slope = p >= last || p < A(0) ? A(0) : slope;
    p = p >= last ? last : p;
    p = p < A(0) ? A(0) : p;
  }
  const A whole = rule.mode == Sampling::nearest_round ? rint(p) : floor(p);
  if (rule.mode != Sampling::bilinear) slope = A(0);
  const A share = rule.mode == Sampling::bilinear || p != p ? p - whole : A(0);
  return {somewhere ? whole : nowhere, share, p == p ? slope : p};
}

// Derivative by a coordinate from that by its position: a position that the border holds does not depend on it.
template <class A> FOURDPERF_HOST_DEVICE A chain(A slope, A d_position) { return slope == 0 ? A(0) : slope * d_position; }

}  // namespace
}  // namespace fourdperf
