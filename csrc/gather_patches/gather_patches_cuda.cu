// gather_patches and its gradients on CUDA. The header states maths and shapes.
//
// work      forward, d_points: a warp owns a point, a lane every 32nd element of its patch. d_video: a block owns 16 x 16
//           pixels and kChannels channels of a frame, a thread a pixel; the block goes through the points of the clip 256 at
//           a time, keeps those whose patch touches it in their order, and every thread adds up what falls on its pixel.
// numerics  as in the header; deterministic, no atomics
// limits    patches below 2^31 elements, fewer than 2^16 frames; 64-bit addressing
#include "common/cuda.h"
#include "common/dispatch.h"
#include "gather_patches/gather_patches.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSide = 16, kChannels = 4;
constexpr int kBlocks = 4;  // blocks that shall fit a multiprocessor: 64 registers a thread, no spills

template <class P> struct Place {
  PatchAxis<P> y, x;
};

template <class P> __device__ __forceinline__ Place<P> place_of(const PatchArgs& a, int64_t point) {
  const P* uv = static_cast<const P*>(a.points) + 2 * point;
  return {patch_axis(uv[1], a.height, a.size, a.mode, a.coordinates, a.border),
          patch_axis(uv[0], a.width, a.size, a.mode, a.coordinates, a.border)};
}

// The four pixels around element (i, j, c) of a patch, or the one.
template <class T, class P, bool between> struct Corners {
  using A = acc_t<T>;
  A v[2][2];
  __device__ __forceinline__ Corners(const PatchArgs& a, const T* frame, const Place<P>& place, int i, int j, int c) {
#pragma unroll
    for (int di = 0; di <= int(between); ++di) {
#pragma unroll
      for (int dj = 0; dj <= int(between); ++dj) {
        const int64_t y = clamp_index(place.y.first + i + di, a.height), x = clamp_index(place.x.first + j + dj, a.width);
        v[di][dj] = to_float(frame[y * a.strides[2] + x * a.strides[3] + c * a.strides[4]]);
      }
    }
  }
};

template <class T, class O, class P, bool between>
__global__ void __launch_bounds__(kThreads, kBlocks) gather_kernel(const __grid_constant__ PatchArgs a) {
  using A = acc_t<T>;
  const int size = int(a.size), channels = int(a.channels), elements = size * size * channels;
  const int64_t own = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (own >= a.points_per_batch) return;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const int64_t n = b * a.points_per_batch + own;
    const Place<P> place = place_of<P>(a, n);
    const T* frame = static_cast<const T*>(a.video) + b * a.strides[0] + patch_frame(a, n) * a.strides[1];
    O* out = static_cast<O*>(a.out) + n * elements;
    for (int e = threadIdx.x % 32; e < elements; e += 32) {
      const int c = e % channels, j = e / channels % size, i = e / channels / size;
      if constexpr (between) {
        const Corners<T, P, true> at(a, frame, place, i, j, c);
        const A f_x = A(place.x.fraction), f_y = A(place.y.fraction);
        const A above = at.v[0][0] + f_x * (at.v[0][1] - at.v[0][0]), below = at.v[1][0] + f_x * (at.v[1][1] - at.v[1][0]);
        out[e] = from_float<O>(above + f_y * (below - above));
      } else {
        const int64_t y = clamp_index(place.y.first + i, a.height), x = clamp_index(place.x.first + j, a.width);
        out[e] = frame[y * a.strides[2] + x * a.strides[3] + c * a.strides[4]];
      }
    }
  }
}

template <class T, class O, class P> __global__ void __launch_bounds__(kThreads, kBlocks) points_kernel(const __grid_constant__ PatchArgs a) {
  using A = acc_t<T>;
  const int size = int(a.size), channels = int(a.channels), elements = size * size * channels;
  const int64_t own = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (own >= a.points_per_batch) return;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const int64_t n = b * a.points_per_batch + own;
    const Place<P> place = place_of<P>(a, n);
    const T* frame = static_cast<const T*>(a.video) + b * a.strides[0] + patch_frame(a, n) * a.strides[1];
    const O* d_out = static_cast<const O*>(a.d_out) + n * elements;
    const A f_x = A(place.x.fraction), f_y = A(place.y.fraction);
    A d_x = 0, d_y = 0;
    for (int e = threadIdx.x % 32; e < elements; e += 32) {
      const int c = e % channels, j = e / channels % size, i = e / channels / size;
      const Corners<T, P, true> at(a, frame, place, i, j, c);
      const A above = at.v[0][1] - at.v[0][0], below = at.v[1][1] - at.v[1][0], d = to_float(d_out[e]);
      d_x += d * (above + f_y * (below - above));
      d_y += d * ((at.v[1][0] + f_x * below) - (at.v[0][0] + f_x * above));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      d_x += __shfl_xor_sync(0xffffffffu, d_x, step);
      d_y += __shfl_xor_sync(0xffffffffu, d_y, step);
    }
    if (threadIdx.x % 32 == 0) {
      P* to = static_cast<P*>(a.d_points) + 2 * n;
      to[0] = along(place.x, P(d_x));
      to[1] = along(place.y, P(d_y));
    }
  }
}

// Rows (columns) of a patch that land on pixel `at` after clamping: [low, high]
struct Span {
  int low, high;
  __device__ __forceinline__ Span(int64_t at, int64_t first, int64_t length, int reach) {
    const int64_t own = at - first, from = at == 0 ? 0 : own, to = at == length - 1 ? reach - 1 : own;
    low = int(from < 0 ? 0 : from < reach ? from : reach);
    high = int(to < 0 ? -1 : to < reach ? to : reach - 1);
  }
};

template <class T, class P, bool between>
__global__ void __launch_bounds__(kThreads, kBlocks) video_kernel(const __grid_constant__ PatchArgs a) {
  using A = acc_t<T>;
  __shared__ int64_t s_y[kThreads], s_x[kThreads], s_point[kThreads];
  __shared__ A s_fy[kThreads], s_fx[kThreads];
  __shared__ int s_count[kWarps];
  const int size = int(a.size), channels = int(a.channels), reach = size + int(between);
  const int tiles_x = int((a.width + kSide - 1) / kSide), slices = (channels + kChannels - 1) / kChannels;
  const int c = int(blockIdx.x) % slices * kChannels, tile = int(blockIdx.x) / slices;
  const int64_t left = int64_t(tile % tiles_x) * kSide, top = int64_t(tile / tiles_x) * kSide;
  const int64_t right = left + kSide - 1, bottom = top + kSide - 1;
  const int64_t x = left + threadIdx.x % kSide, y = top + threadIdx.x / kSide, t = blockIdx.y;
  for (int64_t b = blockIdx.z; b < a.batch; b += gridDim.z) {
    A sum[kChannels] = {};
    for (int64_t chunk = 0; chunk < a.points_per_batch; chunk += kThreads) {
      const int64_t point = b * a.points_per_batch + chunk + threadIdx.x;
      bool touches = chunk + threadIdx.x < a.points_per_batch && patch_frame(a, point) == t;
      Place<P> place{};
      if (touches) {
        place = place_of<P>(a, point);
        touches = clamp_index(place.x.first, a.width) <= right && clamp_index(place.x.first + reach - 1, a.width) >= left &&
                  clamp_index(place.y.first, a.height) <= bottom && clamp_index(place.y.first + reach - 1, a.height) >= top;
      }
      const unsigned votes = __ballot_sync(0xffffffffu, touches);
      if (threadIdx.x % 32 == 0) s_count[threadIdx.x / 32] = __popc(votes);
      __syncthreads();
      int slot = __popc(votes & ((1u << threadIdx.x % 32) - 1u)), count = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < threadIdx.x / 32) slot += s_count[w];
        count += s_count[w];
      }
      if (touches) {
        s_y[slot] = place.y.first, s_x[slot] = place.x.first, s_point[slot] = point;
        s_fy[slot] = A(place.y.fraction), s_fx[slot] = A(place.x.fraction);
      }
      __syncthreads();
      for (int k = 0; k < count && x < a.width && y < a.height; ++k) {
        const Span rows(y, s_y[k], a.height, reach), columns(x, s_x[k], a.width, reach);
        const T* d_out = static_cast<const T*>(a.d_out) + s_point[k] * size * size * channels + c;
        for (int i = rows.low; i <= rows.high; ++i) {
          for (int j = columns.low; j <= columns.high; ++j) {
#pragma unroll
            for (int di = 0; di <= int(between); ++di) {
#pragma unroll
              for (int dj = 0; dj <= int(between); ++dj) {
                if (i - di < 0 || i - di >= size || j - dj < 0 || j - dj >= size) continue;
                const A w = between ? (di ? s_fy[k] : 1 - s_fy[k]) * (dj ? s_fx[k] : 1 - s_fx[k]) : A(1);
                const T* d = d_out + (int64_t(i - di) * size + (j - dj)) * channels;
#pragma unroll
                for (int q = 0; q < kChannels; ++q) {
                  if (c + q < channels) sum[q] += w * to_float(d[q]);
                }
              }
            }
          }
        }
      }
      __syncthreads();
    }
    if (x < a.width && y < a.height) {
      T* out = static_cast<T*>(a.d_video) + (((b * a.frames + t) * a.height + y) * a.width + x) * channels + c;
#pragma unroll
      for (int q = 0; q < kChannels; ++q) {
        if (c + q < channels) out[q] = from_float<T>(sum[q]);
      }
    }
  }
}

unsigned grid(int64_t blocks, int64_t limit) {
  if (blocks >= limit) throw std::invalid_argument("gather_patches: too many points, frames or tiles for one CUDA launch");
  return unsigned(blocks);
}

dim3 point_grid(const PatchArgs& a) {
  return {grid(ceil_div(a.points_per_batch, kWarps), int64_t(1) << 31), unsigned(a.batch < 65535 ? a.batch : 65535)};
}

template <class T, class O, class P> void gather(const PatchArgs& a) {
  const auto stream = cudaStream_t(a.stream);
  if (a.mode == PatchMode::bilinear) gather_kernel<T, O, P, true><<<point_grid(a), kThreads, 0, stream>>>(a);
  else gather_kernel<T, T, P, false><<<point_grid(a), kThreads, 0, stream>>>(a);
  check_launch("gather_patches gather_kernel");
}

template <class T, class O, class P> void points_backward(const PatchArgs& a) {
  const auto stream = cudaStream_t(a.stream);
  if (a.mode == PatchMode::bilinear) {
    points_kernel<T, O, P><<<point_grid(a), kThreads, 0, stream>>>(a);
    check_launch("gather_patches points_kernel");
  } else if (cudaMemsetAsync(a.d_points, 0, size_t(a.batch * a.points_per_batch) * 2 * sizeof(P), stream) != cudaSuccess) {
    throw std::runtime_error("gather_patches: cudaMemsetAsync failed");
  }
}

template <class T, class P> void video_backward(const PatchArgs& a) {
  const int64_t tiles = ceil_div(a.channels, kChannels) * ceil_div(a.width, kSide) * ceil_div(a.height, kSide);
  const dim3 blocks(grid(tiles, int64_t(1) << 31), grid(a.frames, 65536), unsigned(a.batch < 65535 ? a.batch : 65535));
  const auto stream = cudaStream_t(a.stream);
  if (a.mode == PatchMode::bilinear) video_kernel<T, P, true><<<blocks, kThreads, 0, stream>>>(a);
  else video_kernel<T, P, false><<<blocks, kThreads, 0, stream>>>(a);
  check_launch("gather_patches video_kernel");
}

template <class F> void with_types(const PatchArgs& a, F&& f) {
  if (a.size * a.size * a.channels >= int64_t(1) << 31) {
    throw std::invalid_argument("gather_patches: a patch must be below 2^31 elements on CUDA");
  }
  const auto with_points = [&](auto tag) {
    return a.point_dtype == DType::f64 ? f(tag, Tag<double>{}) : f(tag, Tag<float>{});
  };
  if (a.dtype == kUint8) return with_points(Tag<uint8_t>{});
  with_dtype(DType(a.dtype), with_points);
}

}  // namespace

void gather_patches_cuda(const PatchArgs& a) {
  if (a.batch * a.points_per_batch * a.channels == 0) return;
  with_types(a, [&](auto tag, auto point_tag) {
    using T = untag<decltype(tag)>;
    using P = untag<decltype(point_tag)>;
    if constexpr (sizeof(T) == 1) gather<T, float, P>(a);
    else gather<T, T, P>(a);
  });
}

void gather_patches_backward_cuda(const PatchArgs& a) {
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

}  // namespace fourdperf
