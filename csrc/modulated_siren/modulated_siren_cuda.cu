// modulated_siren in CUDA C++. The header states maths and shapes.
//
// work      a group of 1 to 32 neighbouring threads walks over the channels of its points, V at a time (4 where sizes and
//           pointers allow it, else one; one for double). Forward: one point after another. Gradients: a group owns a run of
//           neighbouring points of one signal, and sums d_map in registers for as long as they lie in one cell of the map;
//           then come atomics (on sm_90 four floats at once). Or, for sums in a fixed order, sum_by_cell_kernel: a group
//           owns one pixel and adds the points of the four cells around it in their order, working their gradients out again.
//           Every thread works a point's pixels and weights out for itself, once for all of its channels in turn.
// numerics  sums in float, double for double; atomics make the order of sums in d_map vary, sum_by_cell_kernel does not.
//           Angles beyond the fast reduction go through one loop over the V lanes, as on the CPU.
// limits    any sizes; 64-bit addressing; grid-stride loops
#include "common/cuda.h"
#include "common/dispatch.h"
#include "modulated_siren/modulated_siren.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 1;  // without a number ptxas spills to fit one block more
constexpr int64_t kEnough = 1 << 17;  // threads that keep a GPU busy: runs are longer only where there are more
constexpr int64_t kRun = 32;          // points of a run, at most

// ---- V numbers, for which the header's templates hold

template <class A, int V> struct Lanes { A lane[V]; };

template <class A, int V, class F> FOURDPERF_HOST_DEVICE Lanes<A, V> each(F&& f) {
  Lanes<A, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.lane[v] = f(v);
  return result;
}

template <class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> operator+(Lanes<A, V> a, Lanes<A, V> b) {
  return each<A, V>([&](int v) { return a.lane[v] + b.lane[v]; });
}
template <class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> operator+(Lanes<A, V> a, A b) {
  return each<A, V>([&](int v) { return a.lane[v] + b; });
}
template <class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> operator-(Lanes<A, V> a) {
  return each<A, V>([&](int v) { return -a.lane[v]; });
}
template <class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> operator*(Lanes<A, V> a, Lanes<A, V> b) {
  return each<A, V>([&](int v) { return a.lane[v] * b.lane[v]; });
}
template <class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> operator*(A a, Lanes<A, V> b) {
  return each<A, V>([&](int v) { return a * b.lane[v]; });
}
template <class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> operator*(Lanes<A, V> a, A b) { return b * a; }

template <class A, int V>
FOURDPERF_HOST_DEVICE void sincos_product(Lanes<A, V> x, Lanes<A, V> f, Lanes<A, V>& sine, Lanes<A, V>& cosine) {
  typename bits_of<A>::type quadrant[V];
  A r[V];
  bool far = false;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A p = x.lane[v] * f.lane[v];
    reduce_near<A>(p, sizeof(A) == 4 ? fused(x.lane[v], f.lane[v], -p) : A(0), r[v], quadrant[v]);
    far = far || !(fabs(p) <= Trig<A>::limit);
  }
  if (far) {
#pragma unroll 1
    for (int lane = 0; lane < V; ++lane) {  // lanes are picked by comparison: indexed registers would go to local memory
      A x_lane = x.lane[0], f_lane = f.lane[0];
#pragma unroll
      for (int v = 1; v < V; ++v) {
        if (v == lane) x_lane = x.lane[v], f_lane = f.lane[v];
      }
      if (fabs(x_lane * f_lane) <= Trig<A>::limit) continue;
      uint64_t q;
      const A r_lane = A(reduce_far(far_angle(x_lane, f_lane), q));
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v == lane) r[v] = r_lane, quadrant[v] = typename bits_of<A>::type(q);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) sincos_reduced<A>(r[v], quadrant[v], sine.lane[v], cosine.lane[v]);
}

template <bool Cosine, class A, int V> FOURDPERF_HOST_DEVICE Lanes<A, V> one_product(Lanes<A, V> x, Lanes<A, V> f) {
  if constexpr (sizeof(A) == 4) {
    bool far = false;
#pragma unroll
    for (int v = 0; v < V; ++v) far = far || !(fabs(x.lane[v] * f.lane[v]) <= Trig<A>::limit);
    if (!far) {
      return each<A, V>([&](int v) {
        const A p = x.lane[v] * f.lane[v];
        return one_near<Cosine>(p, fused(x.lane[v], f.lane[v], -p));
      });
    }
  }
  Lanes<A, V> sine, cosine;
  sincos_product<A>(x, f, sine, cosine);
  return Cosine ? cosine : sine;
}

// ---- memory

// What a kernel is compiled for: dtype, channels at a time, modulation, pixels that a point reads.
template <class A, int K> struct Corners;
template <class T_, int V_, Modulate M_, int K_> struct Kind {
  using T = T_;
  using A = acc_t<T>;
  using L = Lanes<A, V_>;
  using C = Corners<A, K_>;
  static constexpr int V = V_, K = K_;
  static constexpr Modulate M = M_;
};

template <class Kind> __device__ __forceinline__ typename Kind::L load_pack(const typename Kind::T* p) {
  const auto pack = *reinterpret_cast<const Pack<typename Kind::T, Kind::V>*>(p);
  return each<typename Kind::A, Kind::V>([&](int v) { return to_float(pack.lane[v]); });
}

template <class Kind> __device__ __forceinline__ void store_pack(typename Kind::T* p, typename Kind::L x) {
  Pack<typename Kind::T, Kind::V> pack;
#pragma unroll
  for (int v = 0; v < Kind::V; ++v) pack.lane[v] = from_float<typename Kind::T>(x.lane[v]);
  *reinterpret_cast<Pack<typename Kind::T, Kind::V>*>(p) = pack;
}

template <class A, int V> __device__ __forceinline__ void add_pack(A* p, Lanes<A, V> x) {
#if __CUDA_ARCH__ >= 900
  if constexpr (V == 4 && sizeof(A) == 4) {
    atomicAdd(reinterpret_cast<float4*>(p), make_float4(x.lane[0], x.lane[1], x.lane[2], x.lane[3]));
  } else
#endif
  {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(p + v, x.lane[v]);
  }
}

template <class T> __device__ __forceinline__ const T* row(const void* p, PointStrides strides, int64_t batch, int64_t point) {
  return static_cast<const T*>(p) + batch * strides.batch + point * strides.point;
}

// The K pixels of a point: number of the lower left one (-2: none) and shares of the next, NaN where a coordinate is.
template <class A, int K> struct Corners {
  A column, row, right, down;

  __device__ __forceinline__ Corners(const SineArgs& a, int64_t batch, int64_t point) {
    const A* xy = static_cast<const A*>(a.xy) + batch * a.xy_stride + 2 * point;
    const Place<A> x = locate(xy[0], a.width, sine_rule(K == 4)), y = locate(xy[1], a.height, sine_rule(K == 4));
    column = x.whole, row = y.whole, right = x.share, down = y.share;
  }

  __device__ __forceinline__ bool same_cell(const Corners& other) const { return column == other.column && row == other.row; }

  __device__ __forceinline__ bool has(const SineArgs& a, int k) const {
    return inside(int64_t(column) + (k & 1), a.width) && inside(int64_t(row) + (k >> 1), a.height);
  }

  __device__ __forceinline__ A weight(int k) const {
    if constexpr (K == 1) return 1 + right + down;
    return (k & 1 ? right : 1 - right) * (k >> 1 ? down : 1 - down);
  }

  __device__ __forceinline__ int64_t offset(PixelStrides strides, int k) const {
    return (int64_t(row) + (k >> 1)) * strides.y + (int64_t(column) + (k & 1)) * strides.x;
  }
};

// A map at a point: channels [i, i + V) of its scales and shifts. Null: a map of zeros.
template <class Kind>
__device__ __forceinline__ Modulation<typename Kind::L> sample(const SineArgs& a, const void* map, PixelStrides strides,
                                                               int64_t batch, const typename Kind::C& corners, int64_t i) {
  Modulation<typename Kind::L> sum{}, pixel[Kind::K] = {};
  if (!map) return sum;
  const typename Kind::T* p = static_cast<const typename Kind::T*>(map) + batch * strides.batch + i;
#pragma unroll
  for (int k = 0; k < Kind::K; ++k) {
    if (!corners.has(a, k)) continue;
    const typename Kind::T* q = p + corners.offset(strides, k);
    if constexpr (has_scale(Kind::M)) pixel[k].scale = load_pack<Kind>(q);
    if constexpr (has_shift(Kind::M)) pixel[k].shift = load_pack<Kind>(q + (has_scale(Kind::M) ? a.channels : 0));
  }
#pragma unroll
  for (int k = 0; k < Kind::K; ++k) {
    sum.scale = sum.scale + corners.weight(k) * pixel[k].scale;
    sum.shift = sum.shift + corners.weight(k) * pixel[k].shift;
  }
  return sum;
}

// ---- gradients at a point, channels [i, i + V)

struct Backward {
  static constexpr bool second = false;
  template <class Kind>
  __device__ __forceinline__ static SineGradients<typename Kind::L> at(const SineArgs& a, int64_t b, int64_t n,
                                                                       const typename Kind::C& corners, int64_t i) {
    using T = typename Kind::T;
    using A = typename Kind::A;
    const auto pre = load_pack<Kind>(row<T>(a.pre, a.pre_strides, b, n) + i);
    const auto g = load_pack<Kind>(row<T>(a.d_out, a.d_out_strides, b, n) + i);
    return sine_bwd<Kind::M, A>(g, pre, sample<Kind>(a, a.map, a.map_strides, b, corners, i), A(a.omega));
  }
};

struct BackwardBackward {
  static constexpr bool second = true;
  template <class Kind>
  __device__ __forceinline__ static SineGradients<typename Kind::L> at(const SineArgs& a, int64_t b, int64_t n,
                                                                       const typename Kind::C& corners, int64_t i) {
    using T = typename Kind::T;
    using A = typename Kind::A;
    const auto pre = load_pack<Kind>(row<T>(a.pre, a.pre_strides, b, n) + i);
    const auto g = load_pack<Kind>(row<T>(a.d_out, a.d_out_strides, b, n) + i);
    const auto u = a.v_pre ? load_pack<Kind>(row<T>(a.v_pre, a.v_pre_strides, b, n) + i) : typename Kind::L{};
    const auto m = sample<Kind>(a, a.map, a.map_strides, b, corners, i);
    const auto v = sample<Kind>(a, a.v_map, a.v_map_strides, b, corners, i);
    return sine_bwd_bwd<Kind::M, A>(u, v, g, pre, m, A(a.omega));
  }
};

// d_map of the points of one cell, summed in registers.
template <class Kind> class CellSums {
  typename Kind::C cell_;
  Modulation<typename Kind::L> sum_[Kind::K] = {};

 public:
  __device__ __forceinline__ explicit CellSums(const typename Kind::C& cell) : cell_(cell) {}

  __device__ __forceinline__ bool is_of(const typename Kind::C& corners) const { return cell_.same_cell(corners); }

  __device__ __forceinline__ void add(const typename Kind::C& corners, const Modulation<typename Kind::L>& d) {
#pragma unroll
    for (int k = 0; k < Kind::K; ++k) {
      sum_[k].scale = sum_[k].scale + corners.weight(k) * d.scale;
      sum_[k].shift = sum_[k].shift + corners.weight(k) * d.shift;
    }
  }

  __device__ __forceinline__ void write(const SineArgs& a, int64_t batch, int64_t i) const {
    const int64_t channels = (Kind::M == Modulate::both ? 2 : 1) * a.channels;
    typename Kind::A* p = static_cast<typename Kind::A*>(a.d_map) + batch * a.height * a.width * channels + i;
#pragma unroll
    for (int k = 0; k < Kind::K; ++k) {
      if (!cell_.has(a, k)) continue;
      typename Kind::A* q = p + cell_.offset({0, a.width * channels, channels}, k);
      if constexpr (has_scale(Kind::M)) add_pack(q, sum_[k].scale);
      if constexpr (has_shift(Kind::M)) add_pack(q + (has_scale(Kind::M) ? a.channels : 0), sum_[k].shift);
    }
  }
};

// ---- kernels

template <class Kind> __global__ void __launch_bounds__(kThreads, kBlocks) sine_kernel(SineArgs a) {
  using T = typename Kind::T;
  using A = typename Kind::A;
  const int64_t total = a.batch * a.points, step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t p = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; p < total; p += step) {
    const int64_t b = p / a.points, n = p - b * a.points;
    const typename Kind::C corners(a, b, n);
    const T* pre = row<T>(a.pre, a.pre_strides, b, n);
    T* out = static_cast<T*>(a.out) + p * a.channels;
    for (int64_t i = threadIdx.x * Kind::V; i < a.channels; i += blockDim.x * Kind::V) {
      const auto m = sample<Kind>(a, a.map, a.map_strides, b, corners, i);
      store_pack<Kind>(out + i, sine<Kind::M, A>(load_pack<Kind>(pre + i), m, A(a.omega)));
    }
  }
}

template <class Pass, class Kind>
__global__ void __launch_bounds__(kThreads, kBlocks) gradient_kernel(SineArgs a, int64_t run) {
  using T = typename Kind::T;
  const int64_t runs = (a.points + run - 1) / run, total = a.batch * runs, step = int64_t(gridDim.x) * blockDim.y;
  const bool scatter = a.d_map && !a.order;
  for (int64_t r = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; r < total; r += step) {
    const int64_t b = r / runs, first = (r - b * runs) * run, end = first + run < a.points ? first + run : a.points;
    for (int64_t i = threadIdx.x * Kind::V; i < a.channels; i += blockDim.x * Kind::V) {
      CellSums<Kind> sums(typename Kind::C(a, b, first));
#pragma unroll 1
      for (int64_t n = first; n < end; ++n) {
        const typename Kind::C corners(a, b, n);
        const auto d = Pass::template at<Kind>(a, b, n, corners, i);
        const int64_t at = (b * a.points + n) * a.channels + i;
        if (Pass::second) store_pack<Kind>(static_cast<T*>(a.d_d_out) + at, d.d_out);
        if (a.d_pre) store_pack<Kind>(static_cast<T*>(a.d_pre) + at, d.pre);
        if (!scatter) continue;
        if (!sums.is_of(corners)) {
          sums.write(a, b, i);
          sums = CellSums<Kind>(corners);
        }
        sums.add(corners, d.map);
      }
      if (scatter) sums.write(a, b, i);
    }
  }
}

// d_map from points sorted by cell: cell (b, y + 1, x + 1) has lower left pixel (y, x).
// threadIdx.x walks over channels, blockIdx.x and threadIdx.y count pixels of a row, blockIdx.y rows of all maps.
template <class Pass, class Kind> __global__ void __launch_bounds__(kThreads, kBlocks) sum_by_cell_kernel(SineArgs a) {
  using A = typename Kind::A;
  const int64_t column = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, rows = a.batch * a.height;
  if (column >= a.width) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t b = row / a.height, y = row - b * a.height;
    for (int64_t i = threadIdx.x; i < a.channels; i += blockDim.x) {
      A scale = 0, shift = 0;
#pragma unroll 1
      for (int k = 0; k < Kind::K; ++k) {
        const int64_t cell = (b * (a.height + 1) + y + 1 - (k >> 1)) * (a.width + 1) + column + 1 - (k & 1);
        const int64_t end = a.starts[cell + 1];
#pragma unroll 1
        for (int64_t s = a.starts[cell]; s < end; ++s) {
          const int64_t n = a.order[s] - b * a.points;
          const typename Kind::C corners(a, b, n);
          const auto d = Pass::template at<Kind>(a, b, n, corners, i).map;
          scale += corners.weight(k) * d.scale.lane[0];
          shift += corners.weight(k) * d.shift.lane[0];
        }
      }
      constexpr int parts = Kind::M == Modulate::both ? 2 : 1;
      A* d_map = static_cast<A*>(a.d_map) + (row * a.width + column) * parts * a.channels + i;
      if constexpr (has_scale(Kind::M)) d_map[0] = scale;
      if constexpr (has_shift(Kind::M)) d_map[(parts - 1) * a.channels] = shift;
    }
  }
}

// ---- launches

unsigned grid(int64_t blocks) { return unsigned(blocks < (1 << 30) ? blocks : 1 << 30); }

// Threads as wide as the channels want, up to a warp.
dim3 group(const SineArgs& a, int v) {
  int width = 1;
  while (width < 32 && width * v < a.channels) width *= 2;
  return dim3(width, kThreads / width);
}

// f(Kind): 4 channels at a time if every row of them starts at a multiple of as many elements, else 1.
template <class T, Modulate M, int K, class F> void with_width(const SineArgs& a, F&& f) {
  if constexpr (sizeof(T) < 8) {
    bool wide = a.channels % 4 == 0;
    for (const PointStrides s : {a.pre_strides, a.d_out_strides, a.v_pre_strides}) wide = wide && (s.batch | s.point) % 4 == 0;
    for (const PixelStrides s : {a.map_strides, a.v_map_strides}) wide = wide && (s.batch | s.y | s.x) % 4 == 0;
    for (const void* p : {a.pre, a.map, a.d_out, a.v_pre, a.v_map}) wide = wide && uintptr_t(p) % (4 * sizeof(T)) == 0;
    for (const void* p : {a.out, a.d_d_out, a.d_pre, a.d_map}) wide = wide && uintptr_t(p) % 16 == 0;
    if (wide) return f(Kind<T, 4, M, K>{});
  }
  return f(Kind<T, 1, M, K>{});
}

template <class F> void with_kind(const SineArgs& a, F&& f) {
  if (a.batch == 0 || a.points == 0 || a.channels == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    const auto with_mode = [&](auto modulate) {
      constexpr Modulate M = decltype(modulate)::value;
      if (a.bilinear) return with_width<T, M, 4>(a, f);
      return with_width<T, M, 1>(a, f);
    };
    switch (a.modulate) {
      case Modulate::shift: return with_mode(std::integral_constant<Modulate, Modulate::shift>{});
      case Modulate::scale: return with_mode(std::integral_constant<Modulate, Modulate::scale>{});
      case Modulate::both: return with_mode(std::integral_constant<Modulate, Modulate::both>{});
    }
  });
}

template <class Pass, class Kind> void launch_by_cell(const SineArgs& a) {
  const dim3 block = group(a, 1);
  const int64_t rows = a.batch * a.height;
  const dim3 blocks(grid(ceil_div(a.width, block.y)), unsigned(rows < 65535 ? rows : 65535));
  sum_by_cell_kernel<Pass, Kind><<<blocks, block, 0, cudaStream_t(a.stream)>>>(a);
  check_launch("modulated_siren sum_by_cell_kernel");
}

template <class Pass> void gradients(const SineArgs& a) {
  with_kind(a, [&](auto kind) {
    using K = decltype(kind);
    if (a.d_map && a.order) launch_by_cell<Pass, Kind<typename K::T, 1, K::M, K::K>>(a);
    if (!a.d_d_out && !a.d_pre && (!a.d_map || a.order)) return;
    const dim3 block = group(a, K::V);
    const int64_t fitting = a.batch * a.points * block.x / kEnough, run = fitting < 1 ? 1 : fitting < kRun ? fitting : kRun;
    const int64_t groups = a.batch * ceil_div(a.points, run);
    gradient_kernel<Pass, K><<<grid(ceil_div(groups, block.y)), block, 0, cudaStream_t(a.stream)>>>(a, run);
    check_launch("modulated_siren gradient_kernel");
  });
}

}  // namespace

void modulated_sine_fwd_cuda(const SineArgs& a) {
  with_kind(a, [&](auto kind) {
    using K = decltype(kind);
    const dim3 block = group(a, K::V);
    sine_kernel<K><<<grid(ceil_div(a.batch * a.points, block.y)), block, 0, cudaStream_t(a.stream)>>>(a);
    check_launch("modulated_siren sine_kernel");
  });
}

void modulated_sine_bwd_cuda(const SineArgs& a) { gradients<Backward>(a); }

void modulated_sine_bwd_bwd_cuda(const SineArgs& a) { gradients<BackwardBackward>(a); }

}  // namespace fourdperf
