// window_attention on CUDA, for what Triton's tensor-core kernels do not take (float64) or where there is no Triton.
//
// maths     see the header
// shapes    see the header
// work      a warp owns a query (forward, d_q), a key (d_k, d_v) or an extra token and walks what it sees in groups of 8, 16 or
//           32 lanes (by the size of the head): a group takes every fourth, second or each of them, shares its dot product,
//           and keeps a running softmax or sum; groups are merged at the end. Neighbouring warps own neighbouring tokens.
// numerics  sums in float (double for double); p is divided by its own sum in backward; no atomics: deterministic
// limits    dim <= 256; 16-byte loads where dim, strides and pointers allow them; 64-bit addressing
#include "common/cuda.h"
#include "common/dispatch.h"
#include "window_attention/window_attention.h"

namespace fourdperf {
namespace {

constexpr int kWarps = 4;
constexpr int E = 8;  // elements of a head that a lane holds
constexpr unsigned kAll = 0xffffffffu;

// A head in registers, LANES lanes with E elements each: lane l has (c * LANES + l) * V + 0 .. V - 1 for c = 0, 1 ...
template <class T> constexpr int kPack = 16 / int(sizeof(T));

template <class T, int LANES, bool WIDE> __device__ __forceinline__ void load_head(const T* p, int lane, int dim, acc_t<T> (&x)[E]) {
  constexpr int V = WIDE ? kPack<T> : 1;
#pragma unroll
  for (int c = 0; c < E / V; ++c) {
    const int d = (c * LANES + lane) * V;
    if (d < dim) {
      const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p + d);
#pragma unroll
      for (int v = 0; v < V; ++v) x[c * V + v] = to_float(pack.lane[v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) x[c * V + v] = 0;
    }
  }
}

template <class T, int LANES, bool WIDE>
__device__ __forceinline__ void store_head(T* p, int lane, int dim, const acc_t<T> (&x)[E], acc_t<T> factor) {
  constexpr int V = WIDE ? kPack<T> : 1;
#pragma unroll
  for (int c = 0; c < E / V; ++c) {
    const int d = (c * LANES + lane) * V;
    if (d < dim) {
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.lane[v] = from_float<T>(x[c * V + v] * factor);
      *reinterpret_cast<Pack<T, V>*>(p + d) = pack;
    }
  }
}

template <int LANES, class A> __device__ __forceinline__ A dot(const A (&x)[E], const A (&y)[E]) {
  A sum = 0;
#pragma unroll
  for (int e = 0; e < E; ++e) sum += x[e] * y[e];
#pragma unroll
  for (int offset = 1; offset < LANES; offset *= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

template <class A> __device__ __forceinline__ void add(A (&sum)[E], A factor, const A (&x)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) sum[e] += factor * x[e];
}

// Adds up the groups of a warp.
template <int LANES, class A> __device__ __forceinline__ A total(A x) {
#pragma unroll
  for (int offset = LANES; offset < 32; offset *= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}
template <int LANES, class A> __device__ __forceinline__ void total(A (&x)[E]) {
#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = total<LANES>(x[e]);
}

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// The token that a warp owns, its residue class, and the rectangle of tokens around it.
struct Owner {
  int64_t frame, head, y, x, index;  // index: in lse
  WindowAxis rows, columns;

  __device__ Owner(const WindowAttentionArgs& a, int64_t i)
      : frame(i / a.width / a.height / a.heads), head(i / a.width / a.height % a.heads), y(i / a.width % a.height), x(i % a.width),
        index(i), rows(class_size(a.height, a.dilation_y, y % a.dilation_y), a.window_y, a.border),
        columns(class_size(a.width, a.dilation_x, x % a.dilation_x), a.window_x, a.border) {}
};

struct Place { int64_t y, x; };

struct Rectangle {
  int64_t y, x, height, width;  // in places of the class

  __device__ int64_t count() const { return height * width; }
  // Token n of it: its row and column in the frame.
  __device__ __forceinline__ Place token(const WindowAttentionArgs& a, const Owner& o, int64_t n) const {
    return {(y + n / width) * a.dilation_y + o.y % a.dilation_y, (x + n % width) * a.dilation_x + o.x % a.dilation_x};
  }
};

__device__ Rectangle keys_of(const WindowAttentionArgs& a, const Owner& o) {
  const int64_t y = o.y / a.dilation_y, x = o.x / a.dilation_x;
  return {o.rows.first(y), o.columns.first(x), o.rows.end(y) - o.rows.first(y), o.columns.end(x) - o.columns.first(x)};
}

__device__ Rectangle queries_of(const WindowAttentionArgs& a, const Owner& o) {
  const int64_t y = o.y / a.dilation_y, x = o.x / a.dilation_x;
  return {o.rows.first_query(y), o.columns.first_query(x), o.rows.end_query(y) - o.rows.first_query(y),
          o.columns.end_query(x) - o.columns.first_query(x)};
}

template <class T> __device__ const T* at(const void* p, const GridStrides& s, const Owner& o, int64_t y, int64_t x) {
  return static_cast<const T*>(p) + o.frame * s.frame + o.head * s.head + y * s.y + x * s.x;
}
template <class T> __device__ const T* at(const void* p, const ExtraStrides& s, const Owner& o, int64_t e) {
  return static_cast<const T*>(p) + o.frame * s.frame + o.head * s.head + e * s.token;
}
template <class T> __device__ T* dense(const WindowAttentionArgs& a, void* p, const Owner& o) {
  return static_cast<T*>(p) + (((o.frame * a.height + o.y) * a.width + o.x) * a.heads + o.head) * a.dim;
}

// Key n of a query: the rectangle's tokens, then the extra ones. Lanes beyond the last key get its copy and false.
template <class T, int LANES, bool WIDE>
__device__ __forceinline__ bool load_key(const WindowAttentionArgs& a, const Owner& o, const Rectangle& keys, int64_t n, int lane,
                                         acc_t<T> (&k)[E], acc_t<T> (&v)[E]) {
  const int64_t inside = keys.count(), all = inside + a.extra;
  const int64_t i = n < all ? n : all - 1;
  const bool token = i < inside;
  const Place place = keys.token(a, o, token ? i : 0);
  const T* from_k = token ? at<T>(a.k, a.k_strides, o, place.y, place.x) : at<T>(a.extra_k, a.extra_k_strides, o, i - inside);
  const T* from_v = token ? at<T>(a.v, a.v_strides, o, place.y, place.x) : at<T>(a.extra_v, a.extra_v_strides, o, i - inside);
  load_head<T, LANES, WIDE>(from_k, lane, int(a.dim), k);
  load_head<T, LANES, WIDE>(from_v, lane, int(a.dim), v);
  return n < all;
}

template <class A> __device__ A zeros_of(const WindowAttentionArgs& a, const Rectangle& keys) {
  return a.border == WindowBorder::zero ? A(double(a.window_y) * double(a.window_x) - double(keys.count())) : A(0);
}

template <class T, int LANES, bool WIDE>
__global__ void __launch_bounds__(kWarps * 32) window_attention_kernel(const __grid_constant__ WindowAttentionArgs a) {
  using A = acc_t<T>;
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= a.frames * a.heads * a.height * a.width) return;
  const int lane = threadIdx.x % LANES, group = threadIdx.x % 32 / LANES;
  const Owner o(a, i);
  const Rectangle keys = keys_of(a, o);
  A q[E], k[E], v[E], out[E] = {};
  load_head<T, LANES, WIDE>(at<T>(a.q, a.q_strides, o, o.y, o.x), lane, int(a.dim), q);
  const A zeros = zeros_of<A>(a, keys);
  A largest = group == 0 && zeros > 0 ? A(0) : A(-INFINITY), sum = group == 0 ? zeros : A(0);
  for (int64_t n = group; n - group < keys.count() + a.extra; n += 32 / LANES) {
    const bool real = load_key<T, LANES, WIDE>(a, o, keys, n, lane, k, v);
    const A score = dot<LANES>(q, k) * A(a.scale);
    if (!real) continue;
    const A peak = score > largest ? score : largest, keep = largest == A(-INFINITY) ? A(0) : exp_of(largest - peak);
    const A weight = exp_of(score - peak);
    sum = sum * keep + weight;
#pragma unroll
    for (int e = 0; e < E; ++e) out[e] = out[e] * keep + weight * v[e];
    largest = peak;
  }
  __syncwarp();
  A peak = largest;
#pragma unroll
  for (int offset = LANES; offset < 32; offset *= 2) {
    const A other = __shfl_xor_sync(kAll, peak, offset);
    peak = other > peak ? other : peak;
  }
  const A keep = largest == A(-INFINITY) && sum == A(0) ? A(0) : exp_of(largest - peak);
#pragma unroll
  for (int e = 0; e < E; ++e) out[e] *= keep;
  sum = total<LANES>(sum * keep);
  total<LANES>(out);
  if (group == 0) {
    store_head<T, LANES, WIDE>(dense<T>(a, a.out, o), lane, int(a.dim), out, A(1) / sum);
    if (lane == 0) static_cast<A*>(a.lse)[o.index] = peak + log_of(sum);
  }
}

// Writes d_q, and to the workspace for each query (d_out.out as the weights have it, 1 / sum of the weights).
template <class T, int LANES, bool WIDE>
__global__ void __launch_bounds__(kWarps * 32) window_attention_d_q_kernel(const __grid_constant__ WindowAttentionArgs a) {
  using A = acc_t<T>;
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= a.frames * a.heads * a.height * a.width) return;
  const int lane = threadIdx.x % LANES, group = threadIdx.x % 32 / LANES;
  const Owner o(a, i);
  const Rectangle keys = keys_of(a, o);
  A q[E], d_out[E], k[E], v[E], d_q[E] = {}, mean_k[E] = {};
  load_head<T, LANES, WIDE>(dense<T>(a, a.out, o), lane, int(a.dim), k);
  load_head<T, LANES, WIDE>(at<T>(a.d_out, a.d_out_strides, o, o.y, o.x), lane, int(a.dim), d_out);
  load_head<T, LANES, WIDE>(at<T>(a.q, a.q_strides, o, o.y, o.x), lane, int(a.dim), q);
  const A delta = dot<LANES>(d_out, k), lse = static_cast<const A*>(a.lse)[o.index];
  const A zeros = zeros_of<A>(a, keys);
  A sum = group == 0 && zeros > 0 ? zeros * exp_of(-lse) : A(0), off = -sum * delta;
  for (int64_t n = group; n - group < keys.count() + a.extra; n += 32 / LANES) {
    const bool real = load_key<T, LANES, WIDE>(a, o, keys, n, lane, k, v);
    const A score = dot<LANES>(q, k) * A(a.scale), d_weight = dot<LANES>(d_out, v);
    if (!real) continue;
    const A weight = exp_of(score - lse), d_score = weight * (d_weight - delta);
    sum += weight;
    off += d_score;
    add(d_q, d_score, k);
    add(mean_k, weight, k);
  }
  __syncwarp();
  sum = total<LANES>(sum);
  off = total<LANES>(off) / sum;  // d_out.out was this much off
  add(d_q, -off, mean_k);
  total<LANES>(d_q);
  if (group == 0) {
    store_head<T, LANES, WIDE>(dense<T>(a, a.d_q, o), lane, int(a.dim), d_q, A(a.scale) / sum);
    if (lane == 0) {
      static_cast<A*>(a.workspace)[2 * o.index] = delta + off;
      static_cast<A*>(a.workspace)[2 * o.index + 1] = A(1) / sum;
    }
  }
}

// Gradients of one key and value from `count` queries; query(n) gives the row and column of the n-th.
template <class T, int LANES, bool WIDE, class Query>
__device__ __forceinline__ void gather(const WindowAttentionArgs& a, const Owner& o, const T* key, const T* value, int64_t count,
                                       Query query, T* to_k, T* to_v) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % LANES, group = threadIdx.x % 32 / LANES;
  A k[E], v[E], q[E], d_out[E], d_k[E] = {}, d_v[E] = {};
  load_head<T, LANES, WIDE>(key, lane, int(a.dim), k);
  load_head<T, LANES, WIDE>(value, lane, int(a.dim), v);
  for (int64_t n = group; n - group < count; n += 32 / LANES) {
    const auto [y, x] = query(n < count ? n : count - 1);
    load_head<T, LANES, WIDE>(at<T>(a.q, a.q_strides, o, y, x), lane, int(a.dim), q);
    load_head<T, LANES, WIDE>(at<T>(a.d_out, a.d_out_strides, o, y, x), lane, int(a.dim), d_out);
    const int64_t index = ((o.frame * a.heads + o.head) * a.height + y) * a.width + x;
    const A score = dot<LANES>(q, k) * A(a.scale), d_weight = dot<LANES>(d_out, v);
    if (n >= count) continue;
    const A* saved = static_cast<const A*>(a.workspace) + 2 * index;
    const A weight = exp_of(score - static_cast<const A*>(a.lse)[index]) * saved[1];
    add(d_k, weight * (d_weight - saved[0]), q);
    add(d_v, weight, d_out);
  }
  __syncwarp();
  total<LANES>(d_k);
  total<LANES>(d_v);
  if (group == 0) {
    store_head<T, LANES, WIDE>(to_k, lane, int(a.dim), d_k, A(a.scale));
    store_head<T, LANES, WIDE>(to_v, lane, int(a.dim), d_v, A(1));
  }
}

template <class T, int LANES, bool WIDE>
__global__ void __launch_bounds__(kWarps * 32) window_attention_d_kv_kernel(const __grid_constant__ WindowAttentionArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= a.frames * a.heads * a.height * a.width) return;
  const Owner o(a, i);
  const Rectangle queries = queries_of(a, o);
  gather<T, LANES, WIDE>(a, o, at<T>(a.k, a.k_strides, o, o.y, o.x), at<T>(a.v, a.v_strides, o, o.y, o.x), queries.count(),
                     [&](int64_t n) { return queries.token(a, o, n); }, dense<T>(a, a.d_k, o),
                     dense<T>(a, a.d_v, o));
}

template <class T, int LANES, bool WIDE>
__global__ void __launch_bounds__(kWarps * 32) window_attention_d_extra_kernel(const __grid_constant__ WindowAttentionArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= a.frames * a.heads * a.extra) return;
  const int64_t e = i % a.extra, tokens = a.height * a.width;
  const Owner o(a, i / a.extra * tokens);  // the first token of the frame and head
  const int64_t to = ((o.frame * a.extra + e) * a.heads + o.head) * a.dim;
  gather<T, LANES, WIDE>(a, o, at<T>(a.extra_k, a.extra_k_strides, o, e), at<T>(a.extra_v, a.extra_v_strides, o, e), tokens,
                     [&](int64_t n) { return Place{n / a.width, n % a.width}; },
                     static_cast<T*>(a.d_extra_k) + to, static_cast<T*>(a.d_extra_v) + to);
}

template <class T> bool wide(const void* p, const GridStrides& s) {
  return aligned16(static_cast<const T*>(p)) && (s.frame | s.y | s.x | s.head) % kPack<T> == 0;
}
template <class T> bool wide(const void* p, const ExtraStrides& s) {
  return aligned16(static_cast<const T*>(p)) && (s.frame | s.token | s.head) % kPack<T> == 0;
}

template <class T, int LANES, bool WIDE> void launch(const WindowAttentionArgs& a, bool backward) {
  const auto stream = cudaStream_t(a.stream);
  const unsigned blocks = unsigned(ceil_div(a.frames * a.heads * a.height * a.width, kWarps));
  if (!backward) {
    window_attention_kernel<T, LANES, WIDE><<<blocks, kWarps * 32, 0, stream>>>(a);
    return check_launch("window_attention_kernel");
  }
  window_attention_d_q_kernel<T, LANES, WIDE><<<blocks, kWarps * 32, 0, stream>>>(a);
  check_launch("window_attention_d_q_kernel");
  window_attention_d_kv_kernel<T, LANES, WIDE><<<blocks, kWarps * 32, 0, stream>>>(a);
  check_launch("window_attention_d_kv_kernel");
  if (a.extra) {
    const unsigned extra_blocks = unsigned(ceil_div(a.frames * a.heads * a.extra, kWarps));
    window_attention_d_extra_kernel<T, LANES, WIDE><<<extra_blocks, kWarps * 32, 0, stream>>>(a);
    check_launch("window_attention_d_extra_kernel");
  }
}

template <class T, int LANES> void launch(const WindowAttentionArgs& a, bool backward) {
  bool fits = a.dim % kPack<T> == 0 && wide<T>(a.q, a.q_strides) && wide<T>(a.k, a.k_strides) && wide<T>(a.v, a.v_strides) &&
              aligned16(static_cast<const T*>(a.out));
  if (a.extra) fits = fits && wide<T>(a.extra_k, a.extra_k_strides) && wide<T>(a.extra_v, a.extra_v_strides);
  if (backward) {
    fits = fits && wide<T>(a.d_out, a.d_out_strides) && aligned16(static_cast<const T*>(a.d_q)) &&
           aligned16(static_cast<const T*>(a.d_k)) && aligned16(static_cast<const T*>(a.d_v));
    if (a.extra) fits = fits && aligned16(static_cast<const T*>(a.d_extra_k)) && aligned16(static_cast<const T*>(a.d_extra_v));
  }
  return fits ? launch<T, LANES, true>(a, backward) : launch<T, LANES, false>(a, backward);
}

void run(const WindowAttentionArgs& a, bool backward) {
  if (a.frames * a.heads * a.dim == 0 || a.height * a.width == 0) return;
  if (a.dim > 256) throw std::invalid_argument("window_attention: heads have at most 256 elements on CUDA, got " + std::to_string(a.dim));
  if (ceil_div(a.frames * a.heads * a.height * a.width, kWarps) > 0x7fffffff) throw std::invalid_argument("window_attention: too many tokens");
  with_dtype(a.dtype, [&](auto tag) {
    using T = untag<decltype(tag)>;
    if (a.dim <= 64) return launch<T, 8>(a, backward);
    return a.dim <= 128 ? launch<T, 16>(a, backward) : launch<T, 32>(a, backward);
  });
}

}  // namespace

void window_attention_cuda(const WindowAttentionArgs& a) { run(a, false); }
void window_attention_backward_cuda(const WindowAttentionArgs& a) { run(a, true); }

}  // namespace fourdperf
