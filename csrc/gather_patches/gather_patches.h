// gather_patches: square patches of a video around points.
//
// maths     p = position of u along an axis (see Coordinates), clamped by the border rule; k = p rounded, f = p - k
//           out[b, n, i, j, c] = sum over d, e in {0, 1} of w_d(f_y) w_e(f_x) video[b, t, clamp(y + i + d), clamp(x + j + e), c]
//           with y = k_y - size / 2, x = k_x - size / 2, w_0(f) = 1 - f, w_1(f) = f; f is 0 unless mode is bilinear
// shapes    video (B, T, H, W, C) with any strides, t (B, N) int64, points (B, N, 2), out (B, N, size, size, C);
//           d_video (B, T, H, W, C) contiguous; all but the video contiguous
// work      a patch is read where it lies; the video's gradient is gathered by its owner (a band of rows on the CPU, a
//           pixel on CUDA) from the points in order: no atomics
// numerics  positions in the type of the points, sums in float (double for double), one rounding at the store
// limits    frames of at least one pixel; 64-bit addressing
#pragma once
#include <cmath>

#include "common/half.h"
#include "common/isa.h"

namespace fourdperf {

enum class PatchMode : int { round = 0, floor = 1, bilinear = 2 };
enum class Coordinates : int { scaled = 0, corners = 1, centers = 2, pixels = 3 };
enum class PatchBorder : int { shift = 0, replicate = 1 };
constexpr int kUint8 = 4;  // dtype code, after those of DType

struct PatchArgs {
  const void *video, *d_out;  // d_out: as out
  const int64_t* t;    // one of these two
  const int32_t* t32;
  const void* points;
  void *out, *d_video, *d_points;  // out: dtype, f32 for uint8 with bilinear; a gradient may be null: not wanted
  int dtype;                       // DType or kUint8
  DType point_dtype;               // f32 or f64
  int64_t batch, frames, height, width, channels;
  int64_t strides[5];
  int64_t points_per_batch, size;
  PatchMode mode;
  Coordinates coordinates;
  PatchBorder border;
  int threads;   // CPU
  void* stream;  // CUDA
};

FOURDPERF_DECLARE_CPU(gather_patches, PatchArgs)
FOURDPERF_DECLARE_CPU(gather_patches_backward, PatchArgs)
void gather_patches_cuda(const PatchArgs& args);
void gather_patches_backward_cuda(const PatchArgs& args);

namespace {

FOURDPERF_HOST_DEVICE float to_float(uint8_t x) { return float(x); }

// A patch along one axis: its first pixel before clamping, the fraction beyond it, d p / d u.
template <class P> struct PatchAxis {
  int64_t first;
  P fraction, slope;
};

template <class P>
FOURDPERF_HOST_DEVICE PatchAxis<P> patch_axis(P u, int64_t length, int64_t size, PatchMode mode, Coordinates coordinates,
                                              PatchBorder border) {
  const P scale = coordinates == Coordinates::pixels ? P(1) : P(coordinates == Coordinates::corners ? length - 1 : length);
  const P place = coordinates == Coordinates::centers ? u * scale - P(0.5) : u * scale;
  const P raw = place == place || mode == PatchMode::bilinear ? place : P(0);
  const P low = P(border == PatchBorder::shift ? size / 2 : -size - 1);
  const P high = P(border == PatchBorder::shift ? length - size + size / 2 : length + size);
  const P p = raw < low ? low : raw > high ? high : raw;
  const P whole = mode == PatchMode::round ? rint(p) : floor(p);
  return {(whole == whole ? int64_t(whole) : 0) - size / 2, mode == PatchMode::bilinear ? p - whole : P(0),
          raw >= low && raw <= high ? scale : P(0)};
}

// d u for d p; nothing where the border holds the point, be d p NaN or infinite.
template <class P> FOURDPERF_HOST_DEVICE P along(const PatchAxis<P>& axis, P d_p) {
  return axis.slope == 0 ? P(0) : axis.slope * d_p;
}

FOURDPERF_HOST_DEVICE int64_t clamp_index(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// The frame of a point, counted in its video.
FOURDPERF_HOST_DEVICE int64_t patch_frame(const PatchArgs& a, int64_t point) {
  return clamp_index(a.t ? a.t[point] : a.t32[point], a.frames);
}

}  // namespace
}  // namespace fourdperf
