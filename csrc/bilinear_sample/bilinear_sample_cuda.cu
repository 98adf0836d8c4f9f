// bilinear_sample in CUDA C++. The header states maths and shapes.
//
// work      a point belongs to a group of 1 to 32 neighbouring threads, which walk over its channels V at a time (16 bytes
//           of the map's dtype where sizes and pointers allow it, else one). Every thread works the point's place out for
//           itself: that is cheaper than to share it. The dot products of bwd and bwd_bwd are summed over the group by shuffles.
//           d_map is summed by atomics (on sm_90 four floats at once), or by sum_by_cell_kernel: a group of threads owns
//           one pixel and adds the points of the four cells around it in their order.
// numerics  sums in float, double for double; atomics make the order of sums in d_map vary, sum_by_cell_kernel does not
// limits    any sizes; 64-bit addressing; grid-stride loops
#include "bilinear_sample/bilinear_sample.h"
#include "common/cuda.h"
#include "common/dispatch.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 256;

// x, y: places of a point; first, has: number of its lower left pixel, and which of the K pixels the map has.
template <class A, int K> struct Corners {
  Place<A> x, y;
  int64_t first;
  bool has[K];

  __device__ __forceinline__ Corners(const SampleArgs& a, const A* xy)
      : x(locate(xy[0], a.width, a.rule)), y(locate(xy[1], a.height, a.rule)) {
    const int64_t left = int64_t(x.whole), top = int64_t(y.whole);
    first = top * a.width + left;
#pragma unroll
    for (int k = 0; k < K; ++k) has[k] = inside(left + (k & 1), a.width) && inside(top + (k >> 1), a.height);
  }

  __device__ __forceinline__ int64_t pixel(const SampleArgs& a, int k) const { return first + (k & 1) + (k >> 1) * a.width; }

  __device__ __forceinline__ A weight(int k) const {
    if constexpr (K == 1) return 1 + x.share + y.share;
    return (k & 1 ? x.share : 1 - x.share) * (k >> 1 ? y.share : 1 - y.share);
  }

  // t of the header's bwd_bwd
  __device__ __forceinline__ A tangent(int k, A ux, A uy) const {
    const A along_x = ux * x.slope * (k >> 1 ? y.share : 1 - y.share), along_y = uy * y.slope * (k & 1 ? x.share : 1 - x.share);
    return (k & 1 ? along_x : -along_x) + (k >> 1 ? along_y : -along_y);
  }
};

template <class T, int V, class A> __device__ __forceinline__ void load_pack(const T* p, A* to) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_float(pack.lane[v]);
}

template <class T, int V, class A> __device__ __forceinline__ void store_pack(T* p, const A* from) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.lane[v] = from_float<T>(from[v]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

template <int V, class A> __device__ __forceinline__ void add_pack(A* p, A weight, const A* g) {
#if __CUDA_ARCH__ >= 900
  if constexpr (V % 4 == 0 && sizeof(A) == 4) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      atomicAdd(reinterpret_cast<float4*>(p + v), make_float4(weight * g[v], weight * g[v + 1], weight * g[v + 2], weight * g[v + 3]));
    }
  } else
#endif
  {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(p + v, weight * g[v]);
  }
}

// Sum over the threads of a group (blockDim.x of them, a power of two up to 32); every thread of the warp takes part.
template <class A> __device__ __forceinline__ A group_sum(A x) {
  for (int offset = blockDim.x / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class T, int V, int K> __global__ void __launch_bounds__(kThreads) fwd_kernel(SampleArgs a) {
  using A = acc_t<T>;
  const int64_t total = a.batch * a.points, step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t p = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; p < total; p += step) {
    const int64_t b = p / a.points, n = p - b * a.points;
    const Corners<A, K> corners(a, static_cast<const A*>(a.xy) + b * a.xy_stride + 2 * n);
    const T* map = static_cast<const T*>(a.map) + b * a.map_stride;
    T* out = static_cast<T*>(a.out) + p * a.channels;
    for (int64_t i = threadIdx.x * V; i < a.channels; i += blockDim.x * V) {
      A value[K][V] = {}, sum[V] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (corners.has[k]) load_pack<T, V>(map + corners.pixel(a, k) * a.channels + i, value[k]);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += corners.weight(k) * value[k][v];
      }
      store_pack<T, V>(out + i, sum);
    }
  }
}

template <class T, int V, int K, bool Scatter, bool Dots>
__global__ void __launch_bounds__(kThreads) bwd_kernel(SampleArgs a) {
  using A = acc_t<T>;
  const int64_t total = a.batch * a.points, step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < total; base += step) {
    const int64_t mine = base + threadIdx.y, p = mine < total ? mine : total - 1, b = p / a.points, n = p - b * a.points;
    const Corners<A, K> corners(a, static_cast<const A*>(a.xy) + b * a.xy_stride + 2 * n);
    const T* map = static_cast<const T*>(a.map) + b * a.map_stride;
    const T* d_out = static_cast<const T*>(a.d_out) + b * a.d_out_stride + n * a.channels;
    A* d_map = static_cast<A*>(a.d_map) + b * a.height * a.width * a.channels;
    A dots[4] = {};
    for (int64_t i = threadIdx.x * V; i < a.channels && mine < total; i += blockDim.x * V) {
      A g[V];
      load_pack<T, V>(d_out + i, g);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (!corners.has[k]) continue;
        const int64_t at = corners.pixel(a, k) * a.channels + i;
        if constexpr (Dots) {
          A value[V];
          load_pack<T, V>(map + at, value);
#pragma unroll
          for (int v = 0; v < V; ++v) dots[k] += g[v] * value[v];
        }
        if constexpr (Scatter) add_pack<V>(d_map + at, corners.weight(k), g);
      }
    }
    if constexpr (Dots) {
      const Place<A>&x = corners.x, &y = corners.y;
      const A d_x = group_sum((1 - y.share) * (dots[1] - dots[0]) + y.share * (dots[3] - dots[2]));
      const A d_y = group_sum((1 - x.share) * (dots[2] - dots[0]) + x.share * (dots[3] - dots[1]));
      if (threadIdx.x == 0 && mine < total) {
        static_cast<A*>(a.d_xy)[2 * p] = chain(x.slope, d_x);
        static_cast<A*>(a.d_xy)[2 * p + 1] = chain(y.slope, d_y);
      }
    }
  }
}

template <class T, int V, bool HasH, bool Scatter>
__global__ void __launch_bounds__(kThreads) bwd_bwd_kernel(SampleArgs a) {
  using A = acc_t<T>;
  const int64_t total = a.batch * a.points, step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < total; base += step) {
    const int64_t mine = base + threadIdx.y, p = mine < total ? mine : total - 1, b = p / a.points, n = p - b * a.points;
    const Corners<A, 4> corners(a, static_cast<const A*>(a.xy) + b * a.xy_stride + 2 * n);
    const A* u = static_cast<const A*>(a.gg_xy) + b * a.gg_xy_stride + 2 * n;
    const A ux = u[0], uy = u[1];
    const T* map = static_cast<const T*>(a.map) + b * a.map_stride;
    const T* gg_map = static_cast<const T*>(a.gg_map) + b * a.gg_map_stride;
    const T* d_out = static_cast<const T*>(a.d_out) + b * a.d_out_stride + n * a.channels;
    T* d_d_out = static_cast<T*>(a.d_d_out) + p * a.channels;
    A* d_map = static_cast<A*>(a.d_map) + b * a.height * a.width * a.channels;
    A dots[4] = {}, h_dots[4] = {};
    for (int64_t i = threadIdx.x * V; i < a.channels && mine < total; i += blockDim.x * V) {
      A g[V], sum[V] = {};
      load_pack<T, V>(d_out + i, g);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const A w = corners.weight(k), t = corners.tangent(k, ux, uy);
        A value[V] = {}, h[V] = {};
        const int64_t at = corners.pixel(a, k) * a.channels + i;
        if (corners.has[k]) {
          load_pack<T, V>(map + at, value);
          if constexpr (HasH) load_pack<T, V>(gg_map + at, h);
          if constexpr (Scatter) add_pack<V>(d_map + at, t, g);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dots[k] += g[v] * value[v];
          sum[v] += t * value[v];
          if constexpr (HasH) h_dots[k] += g[v] * h[v], sum[v] += w * h[v];
        }
      }
      store_pack<T, V>(d_d_out + i, sum);
    }
    const Place<A>&x = corners.x, &y = corners.y;
    const A both = group_sum((dots[0] - dots[1]) + (dots[3] - dots[2]));
    const A h_x = HasH ? group_sum((1 - y.share) * (h_dots[1] - h_dots[0]) + y.share * (h_dots[3] - h_dots[2])) : A(0);
    const A h_y = HasH ? group_sum((1 - x.share) * (h_dots[2] - h_dots[0]) + x.share * (h_dots[3] - h_dots[1])) : A(0);
    if (threadIdx.x == 0 && mine < total) {
      static_cast<A*>(a.d_xy)[2 * p] = chain(x.slope, h_x + uy * y.slope * both);
      static_cast<A*>(a.d_xy)[2 * p + 1] = chain(y.slope, h_y + ux * x.slope * both);
    }
  }
}

// d_map of bwd, or with Tangent of bwd_bwd, from points sorted by cell: cell (b, y + 1, x + 1) has lower left pixel (y, x).
// threadIdx.x walks over channels, blockIdx.x and threadIdx.y count pixels of a row, blockIdx.y rows of all maps.
template <class T, int V, int K, bool Tangent> __global__ void __launch_bounds__(kThreads) sum_by_cell_kernel(SampleArgs a) {
  using A = acc_t<T>;
  const int64_t column = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, rows = a.batch * a.height;
  if (column >= a.width) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t b = row / a.height, y = row - b * a.height;
    const T* d_out = static_cast<const T*>(a.d_out) + b * a.d_out_stride;
    const A* xy = static_cast<const A*>(a.xy) + b * a.xy_stride;
    const A* gg_xy = static_cast<const A*>(a.gg_xy) + b * a.gg_xy_stride;
    for (int64_t i = threadIdx.x * V; i < a.channels; i += blockDim.x * V) {
      A sum[V] = {};
#pragma unroll 1
      for (int k = 0; k < K; ++k) {
        const int64_t cell = (b * (a.height + 1) + y + 1 - (k >> 1)) * (a.width + 1) + column + 1 - (k & 1);
        const int64_t end = a.starts[cell + 1];
#pragma unroll 1
        for (int64_t s = a.starts[cell]; s < end; ++s) {
          const int64_t n = a.order[s] - b * a.points;
          const Corners<A, K> corners(a, xy + 2 * n);
          const A weight = Tangent ? corners.tangent(k, gg_xy[2 * n], gg_xy[2 * n + 1]) : corners.weight(k);
          A g[V];
          load_pack<T, V>(d_out + n * a.channels + i, g);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += weight * g[v];
        }
      }
      store_pack<A, V>(static_cast<A*>(a.d_map) + (row * a.width + column) * a.channels + i, sum);
    }
  }
}

unsigned grid(int64_t blocks) { return unsigned(blocks < (1 << 30) ? blocks : 1 << 30); }

// Threads as wide as the channels want, up to a warp.
template <int V> dim3 group(const SampleArgs& a) {
  int width = 1;
  while (width < 32 && width * V < a.channels) width *= 2;
  return dim3(width, kThreads / width);
}

template <int V, class Kernel> void launch(Kernel kernel, const SampleArgs& a, const char* name) {
  const dim3 block = group<V>(a);
  kernel<<<grid(ceil_div(a.batch * a.points, block.y)), block, 0, cudaStream_t(a.stream)>>>(a);
  check_launch(name);
}

// (V of 8 would spill on sm_80)
template <class T, int V, bool Tangent> void launch_by_cell(const SampleArgs& a) {
  const dim3 block = group<V>(a);
  const int64_t rows = a.batch * a.height;
  const dim3 blocks(grid(ceil_div(a.width, block.y)), unsigned(rows < 65535 ? rows : 65535));
  const auto stream = cudaStream_t(a.stream);
  if constexpr (Tangent) {
    sum_by_cell_kernel<T, V, 4, true><<<blocks, block, 0, stream>>>(a);
  } else if (a.rule.mode == Sampling::bilinear) {
    sum_by_cell_kernel<T, V, 4, false><<<blocks, block, 0, stream>>>(a);
  } else {
    sum_by_cell_kernel<T, V, 1, false><<<blocks, block, 0, stream>>>(a);
  }
  check_launch("sum_by_cell_kernel");
}

template <class T, int V> void fwd(const SampleArgs& a) {
  if (a.rule.mode == Sampling::bilinear) return launch<V>(fwd_kernel<T, V, 4>, a, "fwd_kernel");
  return launch<V>(fwd_kernel<T, V, 1>, a, "fwd_kernel");
}

template <class T, int V> void bwd(const SampleArgs& a) {
  const bool bilinear = a.rule.mode == Sampling::bilinear, scatter = a.d_map && !a.order, dots = a.d_xy && bilinear;
  if (a.d_map && a.order) launch_by_cell<T, V < 4 ? V : 4, false>(a);
  if (scatter && !bilinear) return launch<V>(bwd_kernel<T, V, 1, true, false>, a, "bwd_kernel");
  if (scatter && dots) return launch<V>(bwd_kernel<T, V, 4, true, true>, a, "bwd_kernel");
  if (scatter) return launch<V>(bwd_kernel<T, V, 4, true, false>, a, "bwd_kernel");
  if (dots) return launch<V>(bwd_kernel<T, V, 4, false, true>, a, "bwd_kernel");
}

template <class T, int V> void bwd_bwd(const SampleArgs& a) {
  const bool scatter = a.d_map && !a.order;
  if (a.d_map && a.order) launch_by_cell<T, V < 4 ? V : 4, true>(a);
  if (a.gg_map && scatter) return launch<V>(bwd_bwd_kernel<T, V, true, true>, a, "bwd_bwd_kernel");
  if (a.gg_map) return launch<V>(bwd_bwd_kernel<T, V, true, false>, a, "bwd_bwd_kernel");
  if (scatter) return launch<V>(bwd_bwd_kernel<T, V, false, true>, a, "bwd_bwd_kernel");
  return launch<V>(bwd_bwd_kernel<T, V, false, false>, a, "bwd_bwd_kernel");
}

// f(tag of T, constant V): V elements of T are 16 bytes if every row of channels starts at a multiple of them, else 1.
template <class F> void with_width(const SampleArgs& a, F&& f) {
  if (a.batch == 0 || a.points == 0 || a.channels == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    constexpr int V = 16 / int(sizeof(untag<decltype(tag)>));
    bool wide = a.channels % V == 0;
    for (const int64_t stride : {a.map_stride, a.d_out_stride, a.gg_map_stride}) wide = wide && stride % V == 0;
    for (const void* p : {a.map, a.d_out, a.gg_map}) wide = wide && aligned16(static_cast<const char*>(p));
    for (const void* p : {a.out, a.d_d_out, a.d_map}) wide = wide && aligned16(static_cast<const char*>(p));
    if (wide) return f(tag, std::integral_constant<int, V>{});
    return f(tag, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void bilinear_sample_fwd_cuda(const SampleArgs& a) {
  with_width(a, [&](auto tag, auto width) { fwd<untag<decltype(tag)>, decltype(width)::value>(a); });
}

void bilinear_sample_bwd_cuda(const SampleArgs& a) {
  with_width(a, [&](auto tag, auto width) { bwd<untag<decltype(tag)>, decltype(width)::value>(a); });
}

void bilinear_sample_bwd_bwd_cuda(const SampleArgs& a) {
  with_width(a, [&](auto tag, auto width) { bwd_bwd<untag<decltype(tag)>, decltype(width)::value>(a); });
}

}  // namespace fourdperf
