// procrustes on the CPU. The header states maths and shapes.
//
// work      a thread has a matrix to itself, in scratch memory that stays in its caches for n up to a few hundred
// floor     n^3 products a matrix: an inverse 1, a full product 1, one of which half is wanted 1/2. Forward, condition
//           600: 3 inverses, 5/2 for the series; solve: 3 times (1/2 inverse, 1, 1/2), then 4 products for the rest
// numerics  everything in the dtype of x, scaled by a power of two; conditions are estimated by power iteration. Newton's
//           error is that of a backward stable SVD
// limits    where Newton cannot tell (a condition near 1 / epsilon; special: no distinct smallest singular vector after
//           many steps), one-sided Jacobi rotations serve, ten times slower and exact in every case. A matrix with NaN or
//           infinity gives NaN.
#include <omp.h>

#include "common/dispatch.h"
#include "procrustes/procrustes_square.h"

namespace fourdperf::FOURDPERF_ISA {
namespace {

constexpr int kSteps = 14, kPowers = 64, kSquare = 6;
constexpr int64_t kProbes = 8, kSmall = 16;  // up to kSmall rotations are as fast as products

template <class A> constexpr A epsilon = std::numeric_limits<A>::epsilon();

// How far from 1 squared singular values may be for the series, by its last term.
template <class A> struct Reach;
template <> struct Reach<float> { static constexpr float fourth = 4.1e-2f, second = 4.6e-3f, first = 2.8e-4f; };
template <> struct Reach<double> { static constexpr double fourth = 7.4e-4, second = 5.6e-6, first = 1.2e-8; };

template <class A> class Solver {
 public:
  explicit Solver(int64_t n) : s(n), pool(6 * s.size()), order(2 * n), vectors(6 * s.ld),
                               probes(4 * round_up(kProbes, kRows) * s.ld), n(n), ld(s.ld) {
    s.clear(pool.data(), 6 * s.size());
    s.clear(vectors.data(), 6 * s.ld);
    s.clear(probes.data(), 4 * round_up(kProbes, kRows) * s.ld);
  }

  void polar(const A* in, A* out, A* flip, bool special) {
    A *x = matrix(0), *v = vector(0);
    s.clear(v, ld);
    const int exponent = load_scaled(in, x);
    if (exponent == kNotFinite) return fill(out, flip, std::numeric_limits<A>::quiet_NaN());
    if (exponent == kZero || n <= kSmall || !newton(x, v, special)) {
      load_scaled(in, x);
      svd(x, v, special);
    }
    for (int64_t i = 0; i < n; ++i) memcpy(out + i * n, x + i * ld, size_t(n) * sizeof(A));
    if (flip) memcpy(flip, v, size_t(n) * sizeof(A));
  }

  void solve(const A* h_in, const A* p, const A* flip, A* out) {
    A *h = matrix(0), *c = matrix(1), *v = vector(0), last = 0;
    bool turned = false;
    for (int64_t j = 0; j < n; ++j) {
      v[j] = flip ? flip[j] : A(0);
      turned = turned || v[j] != 0;
    }
    const int exponent = load_equation(h_in, p, turned, &last);
    if (exponent == kNotFinite) return fill(out, nullptr, std::numeric_limits<A>::quiet_NaN());
    if (exponent == kZero) return fill(out, nullptr, 0);
    A* y = n > kSmall ? sylvester(h, c, v, turned, last) : nullptr;
    if (!y) {
      load_equation(h_in, p, turned, &last);
      y = by_rotations(h, c, v, turned, last);
    }
    for (int64_t i = 0; i < n; ++i) memcpy(out + i * n, y + i * ld, size_t(n) * sizeof(A));
  }

 private:
  static constexpr int kNotFinite = 1 << 20, kZero = kNotFinite + 1;
  Square<A> s;
  Buffer<A> pool;
  Buffer<int64_t> order;
  Buffer<A> vectors, probes;
  int64_t n, ld;

  A* matrix(int i) { return pool.data() + i * s.size(); }
  A* vector(int i) { return vectors.data() + i * ld; }
  A norm(const A* a) { return s.norm(a, vector(4)); }
  bool near_zero(A small, A large) const { return !(small > 4 * sqrt(A(n)) * epsilon<A> * large); }

  void fill(A* out, A* flip, A value) const {
    for (int64_t i = 0; i < n * n; ++i) out[i] = value;
    for (int64_t i = 0; flip && i < n; ++i) flip[i] = 0;
  }

  // a <- in / 2^e with the largest entry in [1/2, 1): e, kZero or kNotFinite
  int load_scaled(const A* in, A* a) const {
    vec<A> most = {}, zero = {};
    for_vectors<A>(n * n, [&](int64_t i, auto count) {
      const vec<A> x = load<A>(in + i, count);
      most = max(most, x < 0 ? -x : x);
      zero += x * 0;
    });
    const A largest = reduce_max(most), finite = reduce_add(zero);
    if (finite != 0 || !(largest <= std::numeric_limits<A>::max())) return kNotFinite;
    if (largest == 0) {
      s.clear(a, n * ld);
      return kZero;
    }
    int exponent;
    frexp(largest, &exponent);
    const A half = ldexp(A(1), -(exponent / 2)), rest = ldexp(A(1), -(exponent - exponent / 2));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) a[i * ld + j] = in[i * n + j] * half * rest;
    }
    return exponent;
  }

  // matrix(0) <- h, symmetric, with v turned back, so that its eigenvalues are positive, `last` that of v;
  // matrix(1) <- p - p^T. Both divided by 2^e, which is returned.
  int load_equation(const A* h_in, const A* p, bool turned, A* last) {
    A *h = matrix(0), *c = matrix(1), *v = vector(0);
    const int exponent = load_scaled(h_in, h);
    if (exponent >= kNotFinite) return exponent;
    const A f = ldexp(A(1), -exponent);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        h[i * ld + j] = h[j * ld + i] = (h[i * ld + j] + h[j * ld + i]) / 2;
        c[i * ld + j] = f * (p[i * n + j] - p[j * n + i]);
      }
    }
    s.mirror(c, -1);
    if (turned) {
      *last = -quadratic(h, v);
      add_outer(2 * *last, v, v, h);
    }
    return exponent;
  }

  void scale(A f, A* a) const {
    s.each([&](int64_t at) { store(a + at, f * load<A>(a + at)); });
  }

  void add_outer(A f, const A* x, const A* y, A* a) const {
    for (int64_t i = 0; i < n; ++i) s.add_row(f * x[i], y, a + i * ld);
  }

  A quadratic(const A* a, const A* v) const {
    A sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += v[i] * s.dot(a + i * ld, v);
    return sum;
  }

  void copy(const A* from, A* to) const { memcpy(to, from, size_t(n * ld) * sizeof(A)); }

  // ---- forward

  // x <- its polar factor; special, where its determinant was negative: with v turned round. False where it cannot tell.
  bool newton(A* x, A* v, bool special) {
    A *y = matrix(1), *u = vector(1);
    A low = 0, high = norm(x);
    bool negative = false;
    for (int step = 0; step < kSteps; ++step) {
      if (step > 0 && (high * high - low * low) / (high * high + low * low) <= Reach<A>::fourth) {
        scale(sqrt(2 / (low * low + high * high)), x);
        if (series(x)) {
          if (negative) turn(x, u, v);
          return true;
        }
        high = norm(x), low = 0;
      }
      copy(x, y);
      int sign;
      if (!s.invert(y, order.data(), &sign)) return false;
      if (low == 0) low = 1 / norm(y);
      if (!(low > 4 * epsilon<A> * high)) return false;
      if (step == 0 && special && sign < 0) {
        negative = true;
        if (!last_left_vector(x, y, low, u)) return false;
      }
      const A mu = 1 / sqrt(low * high);
      add_transpose(mu / 2, 1 / (2 * mu), y, x);
      const A spread = sqrt(high / low);
      low = 1, high = (spread + 1 / spread) / 2;
    }
    return false;
  }

  // x <- f x + g y^-T, with y^-1 as `invert` leaves it
  void add_transpose(A f, A g, const A* y, A* x) {
    constexpr int64_t tile = 16;
    for (int64_t i0 = 0; i0 < n; i0 += tile) {
      for (int64_t j0 = 0; j0 < n; j0 += tile) {
        const int64_t i1 = smaller(i0 + tile, n), j1 = smaller(j0 + tile, n);
        for (int64_t i = i0; i < i1; ++i) {
          const A* column = y + order[i];
          for (int64_t j = j0; j < j1; ++j) x[i * ld + j] = f * x[i * ld + j] + g * column[j * ld];
        }
      }
    }
  }

  // x <- x (1 - z)^(-1/2), z = 1 - x^T x, which is near 0; false where it is not
  bool series(A* x) {
    A *z = matrix(1), *z2 = matrix(2), *w = matrix(3);
    s.template multiply<true>(-1, x, x, 0, z, s.rows, n, true);
    for (int64_t i = 0; i < n; ++i) z[i * ld + i] += 1;
    s.mirror(z, 1);
    const A size = norm(z);
    if (!(size <= A(1.25) * Reach<A>::fourth)) return false;
    if (size > Reach<A>::first) {
      s.template multiply<false>(1, z, z, 0, z2, s.rows, n, true);
      if (size > Reach<A>::second) {
        s.mirror(z2, 1);
        s.each([&](int64_t at) { store(w + at, A(0.3125) * load<A>(z + at) + A(35. / 128) * load<A>(z2 + at)); });
        s.each([&](int64_t at) { store(z + at, A(0.5) * load<A>(z + at) + A(0.375) * load<A>(z2 + at)); });
        s.template multiply<false>(1, z2, w, 1, z, s.rows, n, true);
      } else {
        s.each([&](int64_t at) { store(z + at, A(0.5) * load<A>(z + at) + A(0.375) * load<A>(z2 + at)); });
      }
      s.mirror(z, 1);
    } else {
      scale(A(0.5), z);
    }
    copy(x, w);
    s.template multiply<false>(1, w, z, 1, x, s.rows, n);
    return true;
  }

  // u: the left singular vector of the smallest singular value `low` of x, from y = x^-1 as `invert` leaves it: subspace
  // iteration with y^T y, whose largest eigenvalues are wanted, then Rayleigh and Ritz with x itself, which has them to
  // the last bit. False where they lie too close.
  bool last_left_vector(const A* x, const A* y, A low, A* u) {
    const int64_t count = smaller(n, kProbes), height = round_up(kProbes, kRows), width = round_up(count, lanes<A>);
    A *gram = matrix(2), *w = probes.data(), *b = w + height * ld, *ritz = b + height * ld, *basis = ritz + height * ld;
    s.template multiply<true>(low * low, y, y, 0, gram, s.rows, n, true);
    s.mirror(gram, 1);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < n; ++j) w[r * ld + j] = A(start_entry(r * n + j));
    }
    for (int power = 0; power < kPowers; ++power) {
      for (int64_t r = 0; r < count; ++r) {
        for (int twice = 0; twice < 2; ++twice) {
          for (int64_t q = 0; q < r; ++q) s.add_row(-s.dot(w + q * ld, w + r * ld), w + q * ld, w + r * ld);
          const A length = sqrt(s.dot(w + r * ld, w + r * ld));
          if (!(length > 0)) return false;
          for (int64_t j = 0; j < s.columns; ++j) w[r * ld + j] /= length;
        }
      }
      s.template multiply<false>(1, w, gram, 0, b, height, n);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t q = 0; q < count; ++q) ritz[r * ld + q] = s.dot(w + r * ld, b + q * ld);
      }
      const int64_t best = rotate_probes(ritz, basis, count, width, true);
      A *found = vector(2), *image = vector(3), theta = sqrt(s.dot(ritz + best * ld, ritz + best * ld));
      combine(basis + best * ld, w, count, found);
      combine(basis + best * ld, b, count, image);
      s.add_row(-theta, found, image);
      if (sqrt(s.dot(image, image)) <= 16 * epsilon<A> * theta) {
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t j = 0; j < n; ++j) ritz[r * ld + j] = w[r * ld + order[j]];
        }
        s.template multiply<false>(1, ritz, x, 0, b, height, n);
        combine(basis + rotate_probes(b, basis, count, s.columns, false) * ld, ritz, count, u);
        s.clear(ritz, height * ld);
        return true;
      }
      A* swap = w;
      w = b, b = swap;
      if (power % kSquare == kSquare - 1) {  // close singular values: every step from here on counts twice
        copy(gram, matrix(3));
        s.template multiply<false>(1 / theta, matrix(3), matrix(3), 0, gram, s.rows, n, true);
        s.mirror(gram, 1);
      }
    }
    return false;
  }

  // Turns rows of g until they are orthogonal: which of them is the largest, or the smallest; basis g0 = g.
  int64_t rotate_probes(A* g, A* basis, int64_t count, int64_t length, bool largest) {
    s.clear(basis, count * ld);
    for (int64_t r = 0; r < count; ++r) basis[r * ld + r] = 1;
    s.jacobi(g, basis, count, length);
    int64_t best = 0;
    A found = s.dot(g, g);
    for (int64_t r = 1; r < count; ++r) {
      const A size = s.dot(g + r * ld, g + r * ld);
      if (largest ? size > found : size < found) found = size, best = r;
    }
    return best;
  }

  void combine(const A* weights, const A* rows, int64_t count, A* sum) const {
    s.clear(sum, ld);
    for (int64_t r = 0; r < count; ++r) s.add_row(weights[r], rows + r * ld, sum);
  }

  // x <- x - 2 u v^T, v = x^T u
  void turn(A* x, const A* u, A* v) const {
    for (int64_t i = 0; i < n; ++i) s.add_row(u[i], x + i * ld, v);
    const A length = sqrt(s.dot(v, v));
    for (int64_t j = 0; j < n; ++j) v[j] /= length;
    add_outer(-2, u, v, x);
  }

  // The same for any x, by rotations.
  void svd(A* x, A* v, bool special) {
    A *g = matrix(4), *rows = matrix(5), *copied = matrix(3);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) g[i * ld + j] = x[j * ld + i];
    }
    s.identity(rows);
    s.jacobi(g, rows, n, s.columns);
    A largest = 0, smallest = std::numeric_limits<A>::max(), *length = vector(2);
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
      length[i] = sqrt(s.dot(g + i * ld, g + i * ld));
      if (length[i] > largest) largest = length[i];
      if (length[i] < smallest) smallest = length[i], last = i;
    }
    for (int64_t i = 0; i < n; ++i) {
      const bool null = !(length[i] > epsilon<A> * epsilon<A> * largest);
      for (int64_t j = 0; j < s.columns; ++j) g[i * ld + j] = null ? 0 : g[i * ld + j] / length[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!(length[i] > epsilon<A> * epsilon<A> * largest)) complete(g, i);
    }
    s.template multiply<true>(1, g, rows, 0, x, s.rows, n);
    series(x);  // orthogonal to the last bit
    int sign = 1;
    copy(x, copied);
    if (special && s.invert(copied, order.data(), &sign) && sign < 0) {
      memcpy(v, rows + last * ld, size_t(ld) * sizeof(A));
      add_outer(-2, g + last * ld, v, x);
    }
  }

  // Row i of g, which is zero, becomes a unit vector that is orthogonal to all others.
  void complete(A* g, int64_t i) {
    A least = 2, *sum = vector(3);
    int64_t axis = 0;
    s.clear(sum, ld);
    for (int64_t q = 0; q < n; ++q) {
      for (int64_t j = 0; j < n; ++j) sum[j] += g[q * ld + j] * g[q * ld + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      if (sum[j] < least) least = sum[j], axis = j;
    }
    A* row = g + i * ld;
    row[axis] = 1;
    for (int twice = 0; twice < 2; ++twice) {
      for (int64_t q = 0; q < n; ++q) {
        if (q != i) s.add_row(-s.dot(g + q * ld, row), g + q * ld, row);
      }
      const A length = sqrt(s.dot(row, row));
      for (int64_t j = 0; j < n; ++j) row[j] /= length;
    }
  }

  // ---- solve

  // Products that bring Y = (C - E Y - Y E) / 2 to rounding, |E| = e.
  static int remaining(A e) { return e < A(0.25) ? int(ceil(log(epsilon<A>) / log(e > 0 ? e : epsilon<A>))) - 1 : kSteps; }

  // Where the answer is, or null where it cannot tell. h has positive eigenvalues, `last` that of v, which counts as
  // negative where `turned`.
  A* sylvester(A* h, A* c, const A* v, bool turned, A last) {
    A *z = matrix(2), *t = matrix(3), *y = matrix(4), *joint = vector(1), low = 0, high = norm(h);
    if (turned) {  // (h - last) joint = c v apart from v
      copy(h, z);
      for (int64_t i = 0; i < n; ++i) z[i * ld + i] -= last;
      add_outer(high, v, v, z);
      if (!s.sweep(z)) return nullptr;
      s.mirror(z, 1);
      if (near_zero(1 / norm(z), high)) return nullptr;
      A* cv = vector(2);
      for (int64_t i = 0; i < n; ++i) cv[i] = s.dot(c + i * ld, v);
      for (int64_t i = 0; i < n; ++i) joint[i] = -s.dot(z + i * ld, cv);
      add_outer(-1, cv, v, c);
      add_outer(1, v, cv, c);
    }
    for (int step = 0; step < kSteps; ++step) {
      if (step > 0 && remaining((high - low) / (high + low)) <= 4) {
        const A f = 2 / (low + high);
        s.each([&](int64_t at) { store(z + at, f * load<A>(h + at)); });
        for (int64_t i = 0; i < n; ++i) z[i * ld + i] -= 1;
        const int products = remaining(norm(z));
        if (products <= 5) {
          scale(f / 2, c);
          copy(c, y);
          for (int i = 0; i < products; ++i) {
            copy(c, t);
            s.template multiply<false>(A(-0.5), z, y, 1, t, s.rows, n, true);
            s.template multiply<false>(A(-0.5), y, z, 1, t, s.rows, n, true);
            s.mirror(t, -1);
            A* swap = y;
            y = t, t = swap;
          }
          if (turned) {
            add_outer(1, joint, v, y);
            add_outer(-1, v, joint, y);
          }
          return y;
        }
        high = norm(h), low = 0;
      }
      copy(h, z);
      if (!s.sweep(z)) return nullptr;
      s.mirror(z, 1);
      if (low == 0) {
        low = 1 / norm(z);
        if (near_zero(low, high)) return nullptr;
      }
      const A mu = 1 / sqrt(low * high);
      s.template multiply<false>(1, z, c, 0, t, s.rows, n);
      s.template multiply<false>(1 / (2 * mu), t, z, mu / 2, c, s.rows, n, true);
      s.mirror(c, -1);
      s.each([&](int64_t at) { store(h + at, (mu / 2) * load<A>(h + at) - (1 / (2 * mu)) * load<A>(z + at)); });
      const A spread = sqrt(high / low);
      low = 1, high = (spread + 1 / spread) / 2;
    }
    return nullptr;
  }

  // The same for any h, in its eigenvectors.
  A* by_rotations(A* h, A* c, const A* v, bool turned, A last) {
    A *w = matrix(2), *t = matrix(3), *transposed = matrix(4), *size = vector(3), largest = norm(h);
    if (turned) add_outer(2 * largest, v, v, h);  // which makes v an eigenvector apart, the largest
    s.identity(w);
    s.jacobi(h, w, n, s.columns);
    int64_t apart = 0;
    for (int64_t i = 0; i < n; ++i) {
      size[i] = sqrt(s.dot(h + i * ld, h + i * ld));
      if (size[i] > size[apart]) apart = i;
      for (int64_t j = 0; j < n; ++j) transposed[j * ld + i] = w[i * ld + j];
    }
    if (turned) size[apart] = -last;
    s.template multiply<false>(1, w, c, 0, t, s.rows, n);
    s.template multiply<false>(1, t, transposed, 0, h, s.rows, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) h[i * ld + j] *= procrustes_weight(size[i] + size[j], largest, n, epsilon<A>);
    }
    s.mirror(h, -1);
    s.template multiply<true>(1, w, h, 0, t, s.rows, n);
    s.template multiply<false>(1, t, w, 0, c, s.rows, n);
    return c;
  }
};

// One solver a thread, made before the threads are.
template <class A> class Team {
 public:
  Team(int64_t count, int64_t n) : members_(count) {
    for (; size_ < count; ++size_) members_[size_] = new Solver<A>(n);
  }
  ~Team() {
    while (size_ > 0) delete members_[--size_];
  }
  Solver<A>& operator[](int64_t i) { return *members_[i]; }

 private:
  Buffer<Solver<A>*> members_;
  int64_t size_ = 0;
};

template <class F> void run(const ProcrustesArgs& a, F&& f) {
  if (a.batch == 0 || a.n == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using A = untag<decltype(tag)>;
    if constexpr (sizeof(A) < 4) {
      throw std::invalid_argument("procrustes: dtype must be f64 or f32");
    } else {
      const int threads = int(smaller(a.threads > 1 ? a.threads : 1, a.batch));
      Team<A> team(threads, a.n);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
      for (int64_t i = 0; i < a.batch; ++i) f(team[omp_get_thread_num()], i, Tag<A>{});
    }
  });
}

template <class A> const A* at(const void* p, int64_t elements) { return p ? static_cast<const A*>(p) + elements : nullptr; }
template <class A> A* at(void* p, int64_t elements) { return p ? static_cast<A*>(p) + elements : nullptr; }

}  // namespace

void procrustes(const ProcrustesArgs& a) {
  run(a, [&](auto& solver, int64_t i, auto tag) {
    using A = untag<decltype(tag)>;
    const int64_t matrix = i * a.n * a.n;
    solver.polar(at<A>(a.x, matrix), at<A>(a.out, matrix), at<A>(a.flip, i * a.n), a.special);
  });
}

void procrustes_solve(const ProcrustesArgs& a) {
  run(a, [&](auto& solver, int64_t i, auto tag) {
    using A = untag<decltype(tag)>;
    const int64_t matrix = i * a.n * a.n;
    solver.solve(at<A>(a.x, matrix), at<A>(a.p, matrix), at<A>(static_cast<const void*>(a.flip), i * a.n),
                 at<A>(a.out, matrix));
  });
}

}  // namespace fourdperf::FOURDPERF_ISA
