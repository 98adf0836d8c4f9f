// Products, inverses and rotations of square matrices in one thread's scratch memory, for the CPU kernels.
//
// A matrix has n rows of `ld` numbers. Columns n .. ld are zeros and stay so; rows n .. rows are never read as data.
// multiply   c = alpha a b + beta c, tiles of kRows x 2 vectors held in registers, a panel of b packed at a time
// invert     Gauss-Jordan with row pivoting, in place, kBlock columns at a time; the rest is multiply
// sweep      minus the inverse of a symmetric positive definite matrix, its upper half alone
// jacobi     one-sided rotations: rows of g become orthogonal
#pragma once
#include "common/buffer.h"
#include "common/simd.h"
#include "procrustes/procrustes.h"

namespace fourdperf {
namespace {

constexpr int64_t kRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;
constexpr int64_t kBlock = 32;  // a multiple of every panel's width
constexpr int kSweeps = 24;
template <class A> constexpr int64_t kPanel = 2 * lanes<A>;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A> struct Square {
  int64_t n, columns, ld, rows;
  Buffer<A> panel, strips;

  explicit Square(int64_t n)
      : n(n), columns(round_up(n, kPanel<A>)), ld(padded(columns)), rows(round_up(n, kRows)), panel(n * kPanel<A>),
        strips(3 * strip_size()) {
    clear(strips.data(), 3 * strip_size());
  }

  static void clear(A* p, int64_t count) { memset(p, 0, size_t(count) * sizeof(A)); }

  // Rows that differ by a power of two in their addresses would meet in one set of the cache.
  static int64_t padded(int64_t columns) {
    const int64_t line = 64 / int64_t(sizeof(A));
    return columns + (columns / line % 2 ? 2 * line : line);
  }

  int64_t size() const { return rows * ld; }
  int64_t strip_size() const { return round_up(kBlock, kRows) * ld; }

  // c (rows x columns) = alpha a b + beta c; a (rows, depth) or, transposed, (depth, rows). upper: only tiles that reach
  // the diagonal or lie above. skip: columns skip .. skip + kBlock of c are left alone.
  template <bool transposed>
  void multiply(A alpha, const A* a, const A* b, A beta, A* c, int64_t c_rows, int64_t depth, bool upper = false,
                int64_t skip = -1) {
    for (int64_t j = 0; j < columns; j += kPanel<A>) {
      if (skip >= 0 && j >= skip && j < skip + kBlock) continue;
      for (int64_t k = 0; k < depth; ++k) {
        store(&panel[k * kPanel<A>], load<A>(b + k * ld + j));
        store(&panel[k * kPanel<A> + lanes<A>], load<A>(b + k * ld + j + lanes<A>));
      }
      const int64_t end = upper ? smaller(c_rows, j + kPanel<A>) : c_rows;
      for (int64_t i = 0; i < end; i += kRows) {
        tile<transposed>(alpha, transposed ? a + i : a + i * ld, beta, c + i * ld + j, depth);
      }
    }
  }

  template <bool transposed> void tile(A alpha, const A* a, A beta, A* c, int64_t depth) {
    vec<A> sum[kRows][2] = {};
    const A* b = panel.data();
    for (int64_t k = 0; k < depth; ++k, b += kPanel<A>) {
      const vec<A> b0 = load<A>(b), b1 = load<A>(b + lanes<A>);
#pragma GCC unroll 12
      for (int64_t r = 0; r < kRows; ++r) {
        const vec<A> x = broadcast<A>(transposed ? a[k * ld + r] : a[r * ld + k]);
        sum[r][0] += x * b0;
        sum[r][1] += x * b1;
      }
    }
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < 2; ++v) {
        A* to = c + r * ld + v * lanes<A>;
        store(to, beta == 0 ? alpha * sum[r][v] : alpha * sum[r][v] + beta * load<A>(to));
      }
    }
  }

  // The lower half from the upper: c^T = sign c.
  void mirror(A* c, A sign) const {
    for (int64_t block = 0; block < n; block += 16) {
      for (int64_t j = block; j < n; ++j) {
        const int64_t end = smaller(block + 16, j);
        for (int64_t i = block; i < end; ++i) c[j * ld + i] = sign * c[i * ld + j];
      }
    }
    if (sign < 0) {
      for (int64_t i = 0; i < n; ++i) c[i * ld + i] = 0;
    }
  }

  // f(row, first column) for every vector of the matrix
  template <class F> void each(F&& f) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < columns; j += lanes<A>) f(i * ld + j);
    }
  }

  A dot(const A* x, const A* y) const {
    vec<A> sum = {};
    for (int64_t j = 0; j < columns; j += lanes<A>) sum += load<A>(x + j) * load<A>(y + j);
    return reduce_add(sum);
  }

  void add_row(A f, const A* x, A* y) const {
    for (int64_t j = 0; j < columns; j += lanes<A>) store(y + j, load<A>(y + j) + f * load<A>(x + j));
  }

  // The largest singular value, from below, to a few percent. scratch: two rows.
  A norm(const A* a, A* scratch) const {
    A *v = scratch, *w = scratch + ld, length = 0;
    clear(v, ld);
    for (int64_t j = 0; j < n; ++j) v[j] = A(start_entry(j));
    for (int step = 0; step < 8; ++step) {
      const A size = sqrt(dot(v, v));
      if (!(size > 0)) return size;
      clear(w, ld);
      A squares = 0;
      for (int64_t i = 0; i < n; ++i) {
        const A t = dot(a + i * ld, v) / size;
        squares += t * t;
        add_row(t, a + i * ld, w);
      }
      length = sqrt(squares);
      A* swap = v;
      v = w, w = swap;
    }
    return length;
  }

  // a <- a^-1 with its columns in another order: column j of the inverse is column order[j].
  // order: 2 n. sign: that of the determinant. False where a is singular.
  bool invert(A* a, int64_t* order, int* sign) {
    A* strip = strips.data();
    *sign = 1;
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
      const int64_t k1 = smaller(k0 + kBlock, n), width = round_up(k1 - k0, lanes<A>);
      int64_t pivot = k0;
      for (int64_t i = k0; i < n; ++i) {
        if (fabs(a[i * ld + k0]) > fabs(a[pivot * ld + k0])) pivot = i;
      }
      for (int64_t j = k0; j < k1; ++j) {
        if (!(fabs(a[pivot * ld + j]) > 0)) return false;
        order[j] = pivot;
        if (pivot != j) {
          *sign = -*sign;
          for (int64_t c = 0; c < columns; c += lanes<A>) {
            const vec<A> row = load<A>(a + j * ld + c);
            store(a + j * ld + c, load<A>(a + pivot * ld + c));
            store(a + pivot * ld + c, row);
          }
        }
        if (a[j * ld + j] < 0) *sign = -*sign;
        pivot = eliminate(a + k0, j, j - k0, width);
      }
      if (k1 - k0 == n) break;
      // the other columns: rows of the block are replaced by the panel's combination of them, which joins the other rows
      clear(strip, strip_size());
      for (int64_t i = k0; i < k1; ++i) {
        memcpy(strip + (i - k0) * ld, a + i * ld, size_t(columns) * sizeof(A));
        A* row = a + i * ld;
        for (int64_t c = 0; c < columns; ++c) row[c] = c >= k0 && c < k1 ? row[c] : 0;
      }
      multiply<false>(1, a + k0, strip, 1, a, rows, k1 - k0, false, k0);
    }
    // undo the exchanges: pivots become the order of the columns
    for (int64_t j = 0; j < n; ++j) order[j + n] = order[j], order[j] = j;
    for (int64_t j = n - 1; j >= 0; --j) {
      const int64_t other = order[order[j + n]];
      order[order[j + n]] = order[j], order[j] = other;
    }
    return true;
  }

  // One step of Gauss-Jordan on the columns of a panel: row j, column `at` of the panel. Returns the next pivot's row.
  // (What is stored as a number and loaded at once within a vector waits for the cache: column `at` is set last.)
  int64_t eliminate(A* panel_of_a, int64_t j, int64_t at, int64_t width) const {
    A* top = panel_of_a + j * ld;
    const A inverse = 1 / top[at];
    alignas(64) A scaled[kBlock];
    for (int64_t c = 0; c < width; ++c) scaled[c] = top[c] * inverse;
    scaled[at] = inverse;
    memcpy(top, scaled, size_t(width) * sizeof(A));
    const int64_t next = smaller(at + 1, width - 1);
    int64_t pivot = j + 1;
    A largest = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (i == j) continue;
      A* row = panel_of_a + i * ld;
      const A f = row[at];
      if (width == kBlock) {
#pragma GCC unroll 16
        for (int64_t c = 0; c < kBlock; c += lanes<A>) store(row + c, load<A>(row + c) - f * load<A>(scaled + c));
      } else {
        for (int64_t c = 0; c < width; c += lanes<A>) store(row + c, load<A>(row + c) - f * load<A>(scaled + c));
      }
      row[at] = -f * inverse;
      if (i > j && fabs(row[next]) > largest) largest = fabs(row[next]), pivot = i;
    }
    return pivot;
  }

  // Turns rows of g (and v alike) in pairs until they are orthogonal: v g0 = g, where v began as the identity.
  void jacobi(A* g, A* v, int64_t count, int64_t length) const {
    const A tolerance = 2 * std::numeric_limits<A>::epsilon();
    bool turned = true;
    for (int sweep = 0; turned && sweep < kSweeps; ++sweep) {
      turned = false;
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t q = p + 1; q < count; ++q) {
          A *gp = g + p * ld, *gq = g + q * ld;
          vec<A> pp = {}, qq = {}, pq = {};
          for (int64_t j = 0; j < length; j += lanes<A>) {
            const vec<A> x = load<A>(gp + j), y = load<A>(gq + j);
            pp += x * x, qq += y * y, pq += x * y;
          }
          A cosine, sine;
          if (!jacobi_turn(reduce_add(pp), reduce_add(qq), reduce_add(pq), tolerance, &cosine, &sine)) continue;
          turned = true;
          turn_rows(gp, gq, cosine, sine, length);
          turn_rows(v + p * ld, v + q * ld, cosine, sine, length);
        }
      }
    }
  }

  static void turn_rows(A* p, A* q, A cosine, A sine, int64_t length) {
    for (int64_t j = 0; j < length; j += lanes<A>) {
      const vec<A> x = load<A>(p + j), y = load<A>(q + j);
      store(p + j, cosine * x - sine * y);
      store(q + j, sine * x + cosine * y);
    }
  }

  void identity(A* a) const {
    clear(a, n * ld);
    for (int64_t i = 0; i < n; ++i) a[i * ld + i] = 1;
  }

  // The upper half of a <- minus that of a^-1, a symmetric (its upper half is read). False where it is not positive
  // definite.
  bool sweep(A* a) {
    A *strip = strips.data(), *product = strip + strip_size(), *inverse_block = product + strip_size();
    alignas(64) A block[kBlock * kBlock] = {}, scaled[kBlock];
    for (int64_t k0 = 0; k0 < n; k0 += kBlock) {
      const int64_t k1 = smaller(k0 + kBlock, n), b = k1 - k0;
      clear(strip, b * ld);
      for (int64_t i = 0; i < k0; ++i) {
        for (int64_t r = 0; r < b; ++r) strip[r * ld + i] = a[i * ld + k0 + r];
      }
      for (int64_t r = 0; r < b; ++r) {
        for (int64_t j = k1; j < n; ++j) strip[r * ld + j] = a[(k0 + r) * ld + j];
        for (int64_t c = 0; c < b; ++c) block[r * kBlock + c] = c < r ? a[(k0 + c) * ld + k0 + r] : a[(k0 + r) * ld + k0 + c];
      }
      for (int64_t j = 0; j < b; ++j) {  // Gauss-Jordan
        if (!(block[j * kBlock + j] > 0)) return false;
        const A inverse = 1 / block[j * kBlock + j];
        for (int64_t c = 0; c < kBlock; ++c) scaled[c] = block[j * kBlock + c] * inverse;
        scaled[j] = inverse;
        memcpy(block + j * kBlock, scaled, sizeof(scaled));
        for (int64_t i = 0; i < b; ++i) {
          if (i == j) continue;
          const A f = block[i * kBlock + j];
          for (int64_t c = 0; c < kBlock; c += lanes<A>) {
            store(block + i * kBlock + c, load<A>(block + i * kBlock + c) - f * load<A>(scaled + c));
          }
          block[i * kBlock + j] = -f * inverse;
        }
      }
      if (b < n) {
        for (int64_t r = 0; r < b; ++r) memcpy(inverse_block + r * ld, block + r * kBlock, size_t(b) * sizeof(A));
        multiply<false>(1, inverse_block, strip, 0, product, b, b);
        multiply<true>(-1, strip, product, 1, a, rows, b, true);
      }
      for (int64_t i = 0; i < k0; ++i) {
        for (int64_t r = 0; r < b; ++r) a[i * ld + k0 + r] = product[r * ld + i];
      }
      for (int64_t r = 0; r < b; ++r) {
        for (int64_t j = k1; j < n; ++j) a[(k0 + r) * ld + j] = product[r * ld + j];
        for (int64_t c = r; c < b; ++c) a[(k0 + r) * ld + k0 + c] = -block[r * kBlock + c];
      }
    }
    return true;
  }
};

}  // namespace
}  // namespace fourdperf
