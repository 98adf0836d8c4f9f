// procrustes on a GPU, n <= 64. The header states maths and shapes.
//
// work      a block of 256 threads has a matrix to itself, in shared memory (3 n^2 numbers). One-sided Jacobi: a round turns
//           n / 2 disjoint pairs of rows, one pair a warp; n - 1 rounds are a sweep, and 6 to 10 sweeps suffice. Products
//           are loops over shared memory.
// numerics  everything in the dtype of x, scaled by a power of two. Thousands of turns leave the vectors orthogonal to some n
//           roundings only: a step of Newton and Schulz, R - R (R^T R - 1) / 2, and for the gradient a second pass over what
//           is left of the equation, bring it back to a few. Sums have a fixed order: the same bits in every run
// limits    n <= 64; for more, products of whole matrices on the device are faster (fourdperf/ops/procrustes.py)
#include "common/cuda.h"
#include "common/dispatch.h"
#include "procrustes/procrustes.h"

namespace fourdperf {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSweeps = 24;

template <class A> __device__ A warp_sum(A x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Three matrices of n rows (of `ld` numbers, which is odd) and two vectors in shared memory, and what a block does there.
template <class A> struct Shared {
  A *g, *v, *m, *size, *turn;
  int n, ld;

  __device__ Shared(unsigned char* memory, int n) : n(n), ld(n | 1) {
    g = reinterpret_cast<A*>(memory);
    v = g + n * ld;
    m = v + n * ld;
    size = m + n * ld;
    turn = size + n;
  }

  template <class F> __device__ void each(F&& f) const {
    for (int at = threadIdx.x; at < n * n; at += kThreads) f(at / n, at % n);
    __syncthreads();
  }

  // One number from all threads: the largest.
  __device__ A largest(A x) const {
    __shared__ A of_warp[kWarps];
    for (int offset = 16; offset > 0; offset /= 2) {
      const A other = __shfl_xor_sync(0xffffffffu, x, offset);
      x = other > x ? other : x;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[0];
    for (int w = 1; w < kWarps; ++w) x = of_warp[w] > x ? of_warp[w] : x;
    __syncthreads();
    return x;
  }

  // The factor 2^-e that brings the largest entry of `in` into [1/2, 1); 0 for a matrix of zeros, -1 for NaN and infinity.
  __device__ A scale(const A* in) const {
    A most = 0;
    bool finite = true;
    for (int at = threadIdx.x; at < n * n; at += kThreads) {
      const A x = fabs(in[at]);
      finite = finite && x <= std::numeric_limits<A>::max();
      most = x > most ? x : most;
    }
    if (!__syncthreads_and(finite)) return -1;
    most = largest(most);
    if (most == 0) return 0;
    int exponent;
    frexp(most, &exponent);
    const int least = std::numeric_limits<A>::min_exponent;
    return ldexp(A(1), exponent > least ? -exponent : -least);
  }

  // Rows of g become orthogonal, size their lengths; v, the identity before, turns with them.
  __device__ void jacobi() {
    each([&](int i, int j) { v[i * ld + j] = i == j; });
    const int players = n + n % 2, lane = threadIdx.x % 32;
    bool turned = n > 1;
    for (int sweep = 0; turned && sweep < kSweeps; ++sweep) {
      turned = false;
      for (int round = 0; round + 1 < players; ++round) {
        for (int pair = threadIdx.x / 32; pair < players / 2; pair += kWarps) {  // everybody meets everybody once
          int p = pair == 0 ? players - 1 : (round + pair) % (players - 1), q = (round + players - 1 - pair) % (players - 1);
          if (p > q) {
            const int swap = p;
            p = q, q = swap;
          }
          if (q >= n) continue;
          A pp = 0, qq = 0, pq = 0;
          for (int j = lane; j < n; j += 32) {
            const A x = g[p * ld + j], y = g[q * ld + j];
            pp += x * x, qq += y * y, pq += x * y;
          }
          A cosine, sine;
          if (!jacobi_turn(warp_sum(pp), warp_sum(qq), warp_sum(pq), 2 * std::numeric_limits<A>::epsilon(), &cosine, &sine)) {
            continue;
          }
          turned = true;
          for (int j = lane; j < n; j += 32) {
            rotate(g + p * ld + j, g + q * ld + j, cosine, sine);
            rotate(v + p * ld + j, v + q * ld + j, cosine, sine);
          }
        }
        __syncthreads();
      }
      turned = __syncthreads_or(turned);
    }
    for (int i = threadIdx.x / 32; i < n; i += kWarps) {
      const A length = sqrt(row_dot(g + i * ld, g + i * ld));
      if (lane == 0) size[i] = length;
    }
    __syncthreads();
  }

  static __device__ void rotate(A* x, A* y, A cosine, A sine) {
    const A p = *x, q = *y;
    *x = cosine * p - sine * q;
    *y = sine * p + cosine * q;
  }

  __device__ A row_dot(const A* x, const A* y) const {
    A sum = 0;
    for (int j = threadIdx.x % 32; j < n; j += 32) sum += x[j] * y[j];
    return warp_sum(sum);
  }

  // Rows of g to unit length; those of no length become orthogonal to the others.
  __device__ void normalise() {
    A most = 0;
    for (int i = 0; i < n; ++i) most = size[i] > most ? size[i] : most;
    const A least = std::numeric_limits<A>::epsilon() * std::numeric_limits<A>::epsilon() * most;
    each([&](int i, int j) { g[i * ld + j] = size[i] > least ? g[i * ld + j] / size[i] : A(0); });
    for (int i = 0; i < n; ++i) {
      if (size[i] > least) continue;
      if (threadIdx.x < 32) {
        A emptiest = 2;
        int axis = 0;
        for (int j = 0; j < n; ++j) {
          A sum = 0;
          for (int q = threadIdx.x; q < n; q += 32) sum += g[q * ld + j] * g[q * ld + j];
          sum = warp_sum(sum);
          if (sum < emptiest) emptiest = sum, axis = j;
        }
        if (threadIdx.x == 0) g[i * ld + axis] = 1;
        __syncwarp();
        for (int twice = 0; twice < 2; ++twice) {
          for (int q = 0; q < n; ++q) {
            if (q == i) continue;
            const A along = row_dot(g + q * ld, g + i * ld);
            for (int j = threadIdx.x; j < n; j += 32) g[i * ld + j] -= along * g[q * ld + j];
            __syncwarp();
          }
          const A length = sqrt(row_dot(g + i * ld, g + i * ld));
          for (int j = threadIdx.x; j < n; j += 32) g[i * ld + j] /= length;
          __syncwarp();
        }
      }
      __syncthreads();
    }
  }

  // Whether the determinant of g, which is orthogonal, is negative: elimination in m, pivots from the rows below.
  __device__ bool negative() {
    each([&](int i, int j) { m[i * ld + j] = g[i * ld + j]; });
    bool sign = false;
    for (int k = 0; k < n; ++k) {
      int pivot = k;  // every thread finds it
      A most = fabs(m[k * ld + k]);
      for (int i = k + 1; i < n; ++i) {
        if (fabs(m[i * ld + k]) > most) most = fabs(m[i * ld + k]), pivot = i;
      }
      sign = sign != ((pivot != k) != (m[pivot * ld + k] < 0));
      __syncthreads();
      for (int j = threadIdx.x; j < n && pivot != k; j += kThreads) {
        const A swap = m[k * ld + j];
        m[k * ld + j] = m[pivot * ld + j];
        m[pivot * ld + j] = swap;
      }
      __syncthreads();
      const int rest = n - k - 1;
      for (int at = threadIdx.x; at < rest * rest; at += kThreads) {
        const int i = k + 1 + at / rest, j = k + 1 + at % rest;
        m[i * ld + j] -= m[i * ld + k] / m[k * ld + k] * m[k * ld + j];
      }
      __syncthreads();
    }
    return sign;
  }
};

template <class A> __global__ void __launch_bounds__(kThreads)
procrustes_kernel(const A* x, A* out, A* flip, int n, bool special) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared<A> s(memory, n);
  x += int64_t(blockIdx.x) * n * n;
  out += int64_t(blockIdx.x) * n * n;
  const A scale = s.scale(x);
  int last = -1;
  if (scale >= 0) {
    s.each([&](int i, int j) { s.g[j * s.ld + i] = x[i * n + j] * scale; });
    s.jacobi();
    s.normalise();
    if (special && s.negative()) {
      last = 0;
      for (int i = 1; i < n; ++i) {
        if (s.size[i] < s.size[last]) last = i;
      }
    }
  }
  s.each([&](int i, int j) {
    A sum = scale < 0 ? std::numeric_limits<A>::quiet_NaN() : A(0);
    for (int k = 0; k < n; ++k) {
      const A term = s.g[k * s.ld + i] * s.v[k * s.ld + j];
      sum += k == last ? -term : term;
    }
    s.m[i * s.ld + j] = sum;
  });
  s.each([&](int i, int j) {
    A sum = i == j ? A(-1) : A(0);
    for (int k = 0; k < n; ++k) sum += s.m[k * s.ld + i] * s.m[k * s.ld + j];
    s.g[i * s.ld + j] = sum;
  });
  s.each([&](int i, int j) {
    A sum = 0;
    for (int k = 0; k < n; ++k) sum += s.m[i * s.ld + k] * s.g[k * s.ld + j];
    out[i * n + j] = s.m[i * s.ld + j] - sum / 2;
  });
  for (int j = threadIdx.x; flip && j < n; j += kThreads) {
    flip[int64_t(blockIdx.x) * n + j] = last < 0 ? A(0) : s.v[last * s.ld + j];
  }
}

template <class A> __global__ void __launch_bounds__(kThreads)
procrustes_solve_kernel(const A* h, const A* p, const A* flip, A* y, int n) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared<A> s(memory, n);
  const int64_t first = int64_t(blockIdx.x) * n * n;
  h += first, p += first, y += first;
  const A scale = s.scale(h);
  if (scale <= 0) {
    const A fill = scale < 0 ? std::numeric_limits<A>::quiet_NaN() : A(0);
    s.each([&](int i, int j) { y[i * n + j] = fill; });
    return;
  }
  bool any = false;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    s.turn[j] = flip ? flip[int64_t(blockIdx.x) * n + j] : A(0);
    any = any || s.turn[j] != 0;
  }
  const bool turned = __syncthreads_or(any);
  s.each([&](int i, int j) { s.g[i * s.ld + j] = scale * (h[i * n + j] + h[j * n + i]) / 2; });
  A last = 0;
  if (turned) {  // v turned back, then made an eigenvector apart: the largest
    for (int i = 0; i < n; ++i) {
      A sum = 0;
      for (int j = threadIdx.x % 32; j < n; j += 32) sum += s.g[i * s.ld + j] * s.turn[j];
      last -= warp_sum(sum) * s.turn[i];
    }
    __syncthreads();
    s.each([&](int i, int j) { s.g[i * s.ld + j] += (2 * last + 2 * n) * s.turn[i] * s.turn[j]; });
  }
  s.jacobi();
  int apart = 0;
  for (int i = 1; i < n; ++i) {
    if (s.size[i] > s.size[apart]) apart = i;
  }
  __syncthreads();
  if (turned && threadIdx.x == 0) s.size[apart] = -last;
  __syncthreads();
  A most = last;
  for (int i = 0; i < n; ++i) most = s.size[i] > most ? s.size[i] : most;
  const auto product = [&](const A* a, int row, int column, const A* b, int b_row, int b_column, A* out) {
    s.each([&](int i, int j) {
      A sum = 0;
      for (int k = 0; k < n; ++k) sum += a[i * row + k * column] * b[k * b_row + j * b_column];
      out[i * s.ld + j] = sum;
    });
  };
  // the second time for what the first left: h y + y h is not yet p - p^T, as v is orthogonal but to n roundings
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    s.each([&](int i, int j) {
      A rest = p[i * n + j] - p[j * n + i];
#pragma unroll 1
      for (int k = 0; pass && k < n; ++k) {
        rest -= (h[i * n + k] + h[k * n + i]) / 2 * y[k * n + j] + y[i * n + k] * ((h[k * n + j] + h[j * n + k]) / 2);
      }
      s.m[i * s.ld + j] = scale * rest;
    });
    product(s.v, s.ld, 1, s.m, s.ld, 1, s.g);
    product(s.g, s.ld, 1, s.v, 1, s.ld, s.m);
    s.each([&](int i, int j) {
      if (i > j) return;
      const A weight = procrustes_weight(s.size[i] + s.size[j], most, n, std::numeric_limits<A>::epsilon());
      const A x = i == j ? A(0) : s.m[i * s.ld + j] * weight;
      s.m[i * s.ld + j] = x;
      s.m[j * s.ld + i] = -x;
    });
    product(s.v, 1, s.ld, s.m, s.ld, 1, s.g);
    s.each([&](int i, int j) {
      A sum = pass ? y[i * n + j] : A(0);
      for (int k = 0; k < n; ++k) sum += s.g[i * s.ld + k] * s.v[k * s.ld + j];
      y[i * n + j] = sum;
    });
  }
}

template <class F> void launch(const ProcrustesArgs& a, F&& f) {
  if (a.batch == 0 || a.n == 0) return;
  if (a.n > kProcrustesCudaSize) throw std::invalid_argument("procrustes: n must be at most 64 on a GPU");
  if (a.batch > 0x7fffffff) throw std::invalid_argument("procrustes: too many matrices");
  with_dtype(a.dtype, [&](auto tag) {
    using A = untag<decltype(tag)>;
    if constexpr (sizeof(A) < 4) {
      throw std::invalid_argument("procrustes: dtype must be f64 or f32");
    } else {
      const int n = int(a.n), bytes = (3 * n * (n | 1) + 2 * n) * int(sizeof(A));
      f(n, bytes, tag);
    }
  });
}

}  // namespace

void procrustes_cuda(const ProcrustesArgs& a) {
  launch(a, [&](int n, int bytes, auto tag) {
    using A = untag<decltype(tag)>;
    cudaFuncSetAttribute(procrustes_kernel<A>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    procrustes_kernel<A><<<unsigned(a.batch), kThreads, bytes, cudaStream_t(a.stream)>>>(
        static_cast<const A*>(a.x), static_cast<A*>(a.out), static_cast<A*>(a.flip), n, a.special);
    check_launch("procrustes_kernel");
  });
}

void procrustes_solve_cuda(const ProcrustesArgs& a) {
  launch(a, [&](int n, int bytes, auto tag) {
    using A = untag<decltype(tag)>;
    cudaFuncSetAttribute(procrustes_solve_kernel<A>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    procrustes_solve_kernel<A><<<unsigned(a.batch), kThreads, bytes, cudaStream_t(a.stream)>>>(
        static_cast<const A*>(a.x), static_cast<const A*>(a.p), static_cast<const A*>(a.flip), static_cast<A*>(a.out), n);
    check_launch("procrustes_solve_kernel");
  });
}

}  // namespace fourdperf
